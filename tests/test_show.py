"Pictures show what would be trained on, and change nothing."
import subprocess
import sys

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, TensorImage, nn, set_seed
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from torch.nn.modules.module import _global_forward_hooks

from apps import close
from fastai_mixup.all import (CutMix, DifferentClass, FMix, GridMix, ManifoldMixUp, MixUp, PreviousBatch, PuzzleMix, RandomMix, RegMixUp, ReMix, ResizeMix,
                              SaliencyMix, SmoothMix, SnapMix, TransMix, plot_lam, plot_schedule)
from fastai_mixup.show import Peek, Shown

N,CLASSES = 8,3
Y = torch.arange(N) % CLASSES
PICTURES = torch.rand(N, 3, 16, 16, generator=torch.Generator().manual_seed(0))
METHODS = dict(mixup=lambda: MixUp(1.), cutmix=CutMix, fmix=FMix, grid=GridMix, smooth=SmoothMix, resize=ResizeMix, saliency=SaliencyMix, puzzle=PuzzleMix, snap=SnapMix,
    regmixup=RegMixUp, random=lambda: RandomMix([MixUp(1.), CutMix()]), items=lambda: RandomMix([MixUp(1.), CutMix()], per='item'), hidden=lambda: ManifoldMixUp(1., include_input=False),
    hidden_boxes=lambda: ManifoldMixUp(method=CutMix()), output=lambda: ManifoldMixUp(layers='output'), different=lambda: MixUp(1., pairing=DifferentClass()),
    previous=lambda: MixUp(1., pairing=PreviousBatch()), remix=lambda: MixUp(1., labels=ReMix()), given=lambda: MixUp(1., generator=torch.Generator().manual_seed(3)))

def net(): return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))

def learner(cb, x=PICTURES, model=None):
    set_seed(0)
    return Learner(DataLoaders([(x, Y)]*2, [], device='cpu'), model or net(), CrossEntropyLossFlat(), cbs=cb)

def losses(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .1)
    return torch.stack(list(learn.recorder.losses))

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

@pytest.mark.parametrize('name', METHODS)
def test_looking_changes_nothing(name):
    plain = losses(learner(METHODS[name]()))
    learn = learner(METHODS[name]())
    streams,caller = torch.get_rng_state(),learn.dls.train[0][0].clone()
    for at in 0., .9: learn.show_mixed_batch(4, at=at)
    assert torch.equal(torch.get_rng_state(), streams) and torch.equal(learn.dls.train[0][0], caller)
    assert torch.equal(losses(learn), plain)

@pytest.mark.parametrize('name', ['mixup', 'cutmix', 'random', 'resize', 'regmixup', 'different'])
def test_the_first_batch_is_the_one_that_is_shown(name):
    "Before a fit the streams are where its first batch will find them"
    learn,seen = learner(METHODS[name]()),[]
    peek = Peek(learn)
    def keep(module, args): seen.append(args[0].detach().clone())
    handle = learn.model.register_forward_pre_hook(keep)
    losses(learn)
    handle.remove()
    close(seen[0][-N:], peek.mixed[0])

@pytest.mark.parametrize('name', METHODS)
def test_titles_say_the_weights_of_the_labels(name):
    learn = learner(METHODS[name]())
    axs = learn.show_mixed_batch(N)
    shown = Shown(Peek(learn), N)
    titles = [ax.get_title() for ax in axs if ax.get_title() and ax.get_title() != 'partner']
    assert len(titles) == N == len(shown.weights)
    for title,(w,w1),a,b in zip(titles, shown.weights, shown.own, shown.partner):
        want = f'{a[1].item()}' if a[1] == b[1] and abs(w+w1-1) < 1e-3 else f'{w:.2f} {a[1].item()}\n{w1:.2f} {b[1].item()}'
        assert title == want or name == 'previous'

def test_an_error_leaves_the_model_as_it_was():
    learn = learner(ManifoldMixUp(1.), model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(99, CLASSES)))
    learn.model.eval()
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(RuntimeError, match='mat1 and mat2'): learn.show_mixed_batch()
    assert not any(m.training for m in learn.model.modules()) and not _global_forward_hooks
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])

def test_axes_of_the_user():
    _,axs = plt.subplots(1, 3)
    assert learner(MixUp(1.)).show_mixed_batch(3, axs=list(axs)) == list(axs) and all(ax.get_title() and ax.images for ax in axs)
    _,ax = plt.subplots()
    assert plot_lam(1., fold=True, axs=ax) == [ax] and plot_schedule(MixUp(), ax=ax) is ax

@pytest.mark.parametrize('x', [torch.rand(N, 2, 30), torch.rand(N, 12), TensorImage(PICTURES), PICTURES[:,:1]], ids=['signals', 'rows', 'images', 'grey'])
def test_kinds_of_inputs(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), CLASSES))
    axs = learner(MixUp(1.), x, model).show_mixed_batch(4)
    assert len([ax for ax in axs if ax.get_title()]) == 4

def test_words():
    x = torch.randint(1, 9, (N, 5))
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, CLASSES))
    table = learner(MixUp(1.), x, model).show_mixed_batch(3)
    assert len(table) == 3 and (table['weight'].astype(float) + table['weight of partner'].astype(float)).sub(1).abs().max() < .011

def test_without_a_notebook():
    "Nothing is imported that only notebooks have, and tables are printed"
    code = """
import sys
sys.modules.update({'IPython': None, 'IPython.display': None, 'jinja2': None, 'nbdev': None})
from fastai.basics import *
from fastai_mixup.all import *
learn = Learner(DataLoaders([(torch.randint(1, 9, (4, 5)), torch.arange(4))], []), nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 4)), CrossEntropyLossFlat(), cbs=MixUp())
learn.show_mixed_batch(2)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'weight of partner' in done.stdout and 'MixUp' in done.stdout, done.stderr[-2000:]

def test_dicts():
    class OfDict(nn.Linear):
        def forward(self, item): return super().forward(item['numbers'])
    items = [({'numbers': torch.full((4,), float(i)), 'kept': torch.tensor(True)}, i % CLASSES) for i in range(N)]
    learn = learner(MixUp(1.), model=OfDict(4, CLASSES))
    learn.dls = DataLoaders.from_dsets(items, items, bs=N, num_workers=0, device='cpu')
    table = learn.show_mixed_batch(3)
    assert len(table) == 3 and 'numbers' in table['item'][0]

@pytest.mark.parametrize('inputs,names,numbers', [(None, True, True), ('x_cont', False, True), ('x_cat', True, False)])
def test_what_is_left_out_of_a_table_is_shown_as_it_is(inputs, names, numbers):
    df = pd.DataFrame(dict(name=[*'abcdefgh'], number=torch.arange(8.).numpy(), y=[*'uvuvuvuv']))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['name'], cont_names=['number'], y_names='y', valid_idx=[0], bs=4, device='cpu')
    table = tabular_learner(dls, layers=[8], cbs=MixUp(1., inputs=inputs)).show_mixed_batch(4)
    assert table['name'].str.contains('|', regex=False).any() == names
    assert (table['number'].astype(float) % 1 > 0).any() == numbers

@pytest.mark.parametrize('f,message', [(lambda: learner(MixUp(1.)).show_mixed_batch(0), 'max_n'), (lambda: plot_schedule(MixUp(), n_epoch=0), 'n_epoch'),
    (lambda: plot_schedule(ResizeMix()), 'cb must be a mixing callback'), (lambda: plot_schedule(None), 'cb must be a mixing callback'), (lambda: plot_lam(1., fold='no'), 'fold')])
def test_refusals_name_the_argument(f, message):
    with pytest.raises((TypeError, ValueError), match=message): f()
