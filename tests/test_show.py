"Pictures show what would be trained on, and change nothing."
import re
import subprocess
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from apps import close
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, TensorImage, TensorMask, nn, set_seed
from fastai.callback.schedule import SchedLin
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from matplotlib.colors import to_rgba
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import RandomSampler, TensorDataset

from fastai_mixup.all import (
    CutMix,
    DifferentClass,
    FMix,
    FromLoader,
    GridMix,
    ManifoldMixUp,
    MixUp,
    PreviousBatch,
    PuzzleMix,
    RandomMix,
    RareClass,
    RegMixUp,
    ReMix,
    ResizeMix,
    SaliencyMix,
    SmoothMix,
    SnapMix,
    plot_lam,
    plot_schedule,
)
from fastai_mixup.batch import draw_lam
from fastai_mixup.tools.plots import lesser_share
from fastai_mixup.tools.show import Peek, Shown, mixed_label

N,CLASSES = 8,3
Y = torch.arange(N) % CLASSES
PICTURES = torch.rand(N, 3, 16, 16, generator=torch.Generator().manual_seed(0))
METHODS = dict(mixup=lambda: MixUp(1.), cutmix=CutMix, fmix=FMix, grid=GridMix, smooth=SmoothMix, resize=ResizeMix, saliency=SaliencyMix,
    puzzle=PuzzleMix, snap=SnapMix,
    regmixup=RegMixUp, random=lambda: RandomMix([MixUp(1.), CutMix()]), items=lambda: RandomMix([MixUp(1.), CutMix()], per='item'),
    hidden=lambda: ManifoldMixUp(1., include_input=False),
    hidden_boxes=lambda: ManifoldMixUp(method=CutMix()), output=lambda: ManifoldMixUp(layers='output'),
    different=lambda: MixUp(1., pairing=DifferentClass()),
    previous=lambda: MixUp(1., pairing=PreviousBatch()), rare=lambda: MixUp(1., pairing=RareClass()),
    second=lambda: MixUp(1., pairing=FromLoader(TorchLoader(TensorDataset(PICTURES, Y), 4, shuffle=True))),
    remix=lambda: MixUp(1., labels=ReMix()),
    given=lambda: MixUp(1., generator=torch.Generator().manual_seed(3)))

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))

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

@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_looking_changes_nothing(name):
    plain = losses(learner(METHODS[name]()))
    learn = learner(METHODS[name]())
    streams,caller = torch.get_rng_state(),learn.dls.train[0][0].clone()
    for at in 0., .9: learn.show_mixed_batch(4, at=at)
    assert torch.equal(torch.get_rng_state(), streams) and torch.equal(learn.dls.train[0][0], caller)
    assert torch.equal(losses(learn), plain)

@pytest.mark.slow
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

@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_titles_say_the_weights_of_the_labels(name):
    learn = learner(METHODS[name]())
    axs = learn.show_mixed_batch(N)
    shown = Shown(Peek(learn), N)
    titles = [ax.get_title() for ax in axs if ax.get_title() and ax.get_title() != 'partner']
    assert len(titles) == N == len(shown.weights)
    for title,(w,w1),a,b in zip(titles, shown.weights, shown.own, shown.partner):
        said,told = said_weights(title),{}
        for y,part in (a[1].item(), w), (b[1].item(), w1): told[y] = told.get(y, 0) + 100*part
        assert name in ('previous', 'second') or all(abs(said.get(y, 0) - told.get(y, 0)) <= 1 for y in said.keys() | told.keys())

def said_weights(title):
    "Percent of each class that a title such as `84% “4”\\n+ 16% “2”` names; a label alone is all there is"
    return {int(y): float(percent or 100) for percent,y in re.findall(r'(?:(\d+)% )?“(\d+)”', title)}

@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_the_title_says_how_much_is_kept(name):
    learn = learner(METHODS[name]())
    axs = learn.show_mixed_batch(5)
    title = axs[0].figure._suptitle.get_text().replace('\n', ' ')
    plan = Peek(learn).plan
    kept = plan.lam if name in ('previous', 'second') else plan.lam.where(plan.index != torch.arange(N), 1.)
    low,high = (f'{f(kept[:5].tolist()):.0%}' for f in (min, max))
    assert f'items keep {low if low == high else f"{low} to {high}"} of themselves' in title and 'Callback' not in title
    assert ('of their labels' in title) == plan.has_own_labels

@pytest.mark.parametrize('method', [None, lambda: CutMix()], ids=['whole', 'boxes'])
def test_the_weights_of_a_hidden_mixture_are_those_of_the_loss(method):
    def make():
        return learner(ManifoldMixUp(**dict(alpha=1.) if method is None else dict(method=method()), layers='2', include_input=False))
    learn,told = make(),[]
    peek = Peek(learn)
    class Note(Callback):
        order,run_valid = 9,False
        def after_pred(self): told.append(self.learn.manifold_mix_up.plan.label_weights[0].tolist())
    learn.add_cb(Note())
    losses(learn)
    close(torch.tensor(peek.weights[0]), torch.tensor(told[0]))

def test_a_label_that_looks_like_a_number_is_quoted():
    assert mixed_label('cat', 'dog', .84, .16) == '84% cat + 16% dog' and mixed_label('4', '2', .84, .16) == '84% “4” + 16% “2”'
    assert mixed_label('cat', 'dog', .996, .004) == '100% cat' and mixed_label('cat', 'dog', .004, .996) == '100% dog'
    for w in torch.linspace(0, 1, 201).tolist():
        assert sum(float(p) for p in re.findall(r'(\d+)%', mixed_label('cat', 'dog', w, 1-w))) == 100

@pytest.mark.parametrize('alpha', [.05, .4, 1., 3., 50.])
def test_the_titles_of_curves_say_what_is_drawn(alpha):
    share = (1-draw_lam(alpha, 400_000, True, torch.Generator().manual_seed(0))).mean().item()
    assert abs(lesser_share(alpha) - share) < 1e-3
    said = re.findall(r'(\d+)%', plot_schedule(MixUp(alpha), n_epoch=3).get_title()) + re.findall(r'(\d+)%',
        plot_lam(alpha)[0].figure._suptitle.get_text())
    assert abs(float(said[0]) - 100*share) < .6 and float(said[0]) + float(said[1]) == pytest.approx(100, abs=1)

def test_a_schedule_does_not_jitter_and_names_its_ends():
    ax = plot_schedule(MixUp(SchedLin(2., .1), start=2, stop=8), n_epoch=10)
    x,y = ax.lines[0].get_data()
    within = (x >= 2) & (x < 8)
    assert (y[~within] == 0).all() and (np.diff(y[within]) < 0).all()
    assert ax.get_title().replace("\n",
        " ") == f"Partners' share is 0 until epoch 2, then falls from {y[within][0]:.0%} to {y[within][-1]:.0%}, and is 0 after epoch 8"

def test_layers_are_named():
    def title(**kwargs): return learner(ManifoldMixUp(1., **kwargs)).manifold_mix_up.plot_layers().get_title()
    assert title(layers=['2', '3'], include_input=True) == 'Mixed at the input, after “2” or after “3”'
    assert title(layers='output') == 'Mixed at the output'

def test_pasted_classes_keep_their_colours():
    mask = torch.zeros(N, 16, 16, dtype=torch.long)
    mask[:,:8],mask[:,8:,:8] = 1,2
    learn = Learner(DataLoaders([(TensorImage(PICTURES), TensorMask(mask))], [], device='cpu'), nn.Conv2d(3, 3, 1),
        CrossEntropyLossFlat(axis=1), cbs=MixUp(1.))
    ax = learn.show_mixed_batch(2)[0]
    assert re.fullmatch(r'\d+% own\n\+ \d+% partner', ax.get_title())
    over = ax.images[1]
    assert over.get_array().mask[8:,8:].all() and not over.get_array().mask[:8].any()
    for at,colour in ((0, 0), 'C0'), ((12, 0), 'C1'): assert over.cmap(over.norm(over.get_array()[at])) == to_rgba(colour)

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

@pytest.mark.parametrize('x', [torch.rand(N, 2, 30), torch.rand(N, 12), TensorImage(PICTURES), PICTURES[:,:1]],
    ids=['signals', 'rows', 'images', 'grey'])
def test_kinds_of_inputs(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), CLASSES))
    axs = learner(MixUp(1.), x, model).show_mixed_batch(4)
    assert len([ax for ax in axs if ax.get_title()]) == 4

def test_words():
    x = torch.randint(1, 9, (N, 5))
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, CLASSES))
    table = learner(MixUp(1.), x, model).show_mixed_batch(3)
    assert len(table) == 3 and all(float(w[:-1]) + float(w1[:-1]) == pytest.approx(100, abs=1) for w,
        w1 in zip(table['weight'], table['weight of partner']))

@pytest.mark.slow
def test_without_a_notebook():
    "Nothing is imported that only notebooks have, and tables are printed"
    code = """
import sys
sys.modules.update({'IPython': None, 'IPython.display': None, 'jinja2': None, 'nbdev': None})
from fastai.basics import *
from fastai_mixup.all import *
learn = Learner(DataLoaders([(torch.randint(1, 9, (4, 5)), torch.arange(4))], []), nn.Sequential(nn.Embedding(9, 4), nn.Flatten(),
nn.Linear(20, 4)), CrossEntropyLossFlat(), cbs=MixUp())
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
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['name'], cont_names=['number'], y_names='y', valid_idx=[0], bs=4,
        device='cpu')
    table = tabular_learner(dls, layers=[8], cbs=MixUp(1., inputs=inputs)).show_mixed_batch(4)
    assert table['name'].str.contains('|', regex=False).any() == names
    assert (table['number'].astype(float) % 1 > 0).any() == numbers

@pytest.mark.parametrize('f,message', [(lambda: learner(MixUp(1.)).show_mixed_batch(0), 'max_n'),
    (lambda: plot_schedule(MixUp(), n_epoch=0), 'n_epoch'),
    (lambda: plot_schedule(ResizeMix()), 'cb must be a mixing callback'), (lambda: plot_schedule(None), 'cb must be a mixing callback'),
    (lambda: plot_lam(1., fold='no'), 'fold')])
def test_refusals_name_the_argument(f, message):
    with pytest.raises((TypeError, ValueError), match=message): f()

class OwnDraws:
    "A pairing and a label rule that draw from a generator of their own, and count"
    def __init__(self): self.generator,self.n = torch.Generator().manual_seed(5),[0]
    def __call__(self, batch, plan=None):
        self.n[0] += 1
        drawn = torch.rand(batch.n, generator=self.generator)
        return drawn.argsort() if plan is None else drawn

@pytest.mark.parametrize('how', ['pairing', 'labels'])
def test_what_draws_and_remembers_is_left_as_it_was(how):
    own,loader_draws = OwnDraws(),torch.Generator().manual_seed(7)
    items = TensorDataset(torch.randn(32, 4), torch.arange(32) % CLASSES)
    def loader(g): return TorchLoader(items, 8, sampler=RandomSampler(items, generator=g), generator=g)
    learn = Learner(DataLoaders(loader(loader_draws), loader(loader_draws), device='cpu'), nn.Linear(4, CLASSES), CrossEntropyLossFlat(),
        cbs=MixUp(1., **{how: own}))
    before = own.generator.get_state(),loader_draws.get_state()
    learn.show_mixed_batch(3)
    assert own.n == [0] and torch.equal(own.generator.get_state(), before[0]) and torch.equal(loader_draws.get_state(), before[1])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert own.n == [4]
