"A search leaves the Learner and the world as they were, gives every setting the same chances, and advises with care"
import random

import matplotlib

matplotlib.use('Agg')
import fastai.callback.schedule  # noqa: F401, gives Learner `fit_one_cycle`
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, nn
from fastai.callback.hook import Hook
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.basics import noop
from fastcore.foundation import L
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.callback import MixCallback, MixUp
from fastai_mixup.methods.cutmix import CutMix
from fastai_mixup.methods.manifold_mixup import ManifoldMixUp
from fastai_mixup.methods.random_mix import RandomMix
from fastai_mixup.methods.smoothmix import SmoothMix
from fastai_mixup.tools.metrics import MixedAccuracy
from fastai_mixup.tools.mix_find import *

class Counter(Callback):
    "A callback with a state of its own, which may strike at an event"
    def __init__(self, event=None, error=None, after=0): self.event,self.error,self.after,self.seen = event,error,after,[]
    def before_fit(self): self.strike('before_fit')
    def after_pred(self): self.strike('after_pred')
    def after_step(self): self.strike('after_step')
    def before_validate(self): self.strike('before_validate')
    def strike(self, event):
        self.seen.append(event)
        if event == self.event and self.seen.count(event) > self.after and hasattr(self.learn, 'lr_finder'): raise self.error

class Striker(Counter): order = 20

class Recalls(nn.Module):
    "Holds on to what it answered, which has a graph"
    def forward(self, x):
        self.last = x*1.
        return self.last

def torch_dls():
    g = torch.Generator().manual_seed(5)
    x,y = torch.randn(48, 4),torch.arange(48) % 3
    train = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=g)
    return DataLoaders(train, DataLoader(TensorDataset(x, y), 48), device='cpu')

def fastai_dls():
    items = [(torch.randn(4), i % 3) for i in range(48)]
    return DataLoaders.from_dsets(items, items, bs=16, num_workers=0, device='cpu')

def learner(*cbs, dls=torch_dls, **kwargs):
    set_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(.2), Recalls(), nn.Linear(8, 3))
    learn = Learner(dls(), model, CrossEntropyLossFlat(), lr=1e-2, metrics=[accuracy, MixedAccuracy()], cbs=[Counter(), *cbs], **kwargs)
    learn.logger = noop
    return learn.remove_cbs(learn._grab_cbs(ProgressCallback))

def frozen(o):
    "What can be compared with `==`"
    if isinstance(o, torch.Tensor): return str(o.dtype),o.detach().tolist()
    if isinstance(o, np.ndarray): return o.tolist()
    if isinstance(o, dict): return {str(k): frozen(v) for k,v in o.items()}
    if isinstance(o, (list, tuple, L)): return [frozen(v) for v in o]
    return o if isinstance(o, (int, float, str, bool, type(None))) else id(o)

def world(learn):
    "All that a search must leave as it is"
    train = learn.dls.train
    return dict(
        learner={k: frozen(v) for k,v in vars(learn).items() if k not in ('opt', 'model')},
        model=(id(learn.model), frozen(learn.model.state_dict())),
        modes=[m.training for m in learn.model.modules()], grads=[frozen(p.grad) for p in learn.model.parameters()],
        needs=[p.requires_grad for p in learn.model.parameters()], parameters=[id(p) for p in learn.model.parameters()],
        modules=[{k: frozen(v) for k,v in vars(m).items()} for m in learn.model.modules()],
        opt=(id(learn.opt), frozen(learn.opt.state_dict()) if learn.opt else None), cbs=[id(cb) for cb in learn.cbs],
        callbacks=[{k: frozen(v) for k,v in vars(cb).items()} for cb in learn.cbs], owners=[id(cb.learn) for cb in learn.cbs],
        streams=(frozen(torch.get_rng_state()), random.getstate(), frozen(np.random.get_state())),
        loader=frozen({k: v for k,v in vars(train).items()}),
        rng=(id(train.rng), train.rng.getstate()) if hasattr(train, 'rng') else frozen(train.generator.get_state()),
        hooks=[len(_global_forward_hooks)]+[len(d) for m in learn.model.modules()
        for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)],
        loss=vars(learn.loss_func) and frozen(vars(learn.loss_func)), files=sorted(p.name for p in learn.path.iterdir()))

def search(learn, mixes=(0., .5), **kwargs): return learn.mix_find(mixes, **{**dict(epochs=1, repeats=2, show=False), **kwargs})

SETTINGS = dict(alphas=[0., .5], callbacks=[MixUp(.3), None], hidden=[ManifoldMixUp(1., layers=nn.BatchNorm1d, include_input=False), None])

@pytest.mark.slow
@pytest.mark.parametrize('dls', [torch_dls, fastai_dls])
@pytest.mark.parametrize('trained', [False, True], ids=['new', 'trained'])
@pytest.mark.parametrize('mixer', [lambda: [], lambda: [MixUp(.2)], lambda: [ManifoldMixUp(.2, layers=nn.BatchNorm1d)]],
    ids=['none', 'mixup', 'hidden'])
def test_all_is_as_before(mixer, trained, dls, tmp_path):
    learn = learner(*mixer(), dls=dls, path=tmp_path)
    if trained:
        learn.fit_one_cycle(1)
        learn.model.train()(torch.randn(8, 4)) # leaves a graph behind
    before = world(learn)
    for mixes in SETTINGS.values():
        search(learn, mixes)
        assert world(learn) == before

@pytest.mark.parametrize('error', [ValueError('mine'), KeyboardInterrupt()], ids=['error', 'interrupt'])
@pytest.mark.parametrize('event', ['before_fit', 'after_pred', 'after_step', 'before_validate'])
@pytest.mark.parametrize('mixes', SETTINGS.values(), ids=SETTINGS)
def test_all_is_as_before_after_an_error(mixes, event, error, tmp_path):
    learn = learner(Striker(event, error), MixUp(.2), dls=fastai_dls, path=tmp_path)
    learn.fit_one_cycle(1)
    before = world(learn)
    with pytest.raises(type(error)) as held: search(learn, mixes)
    assert held.tb and world(learn) == before # while the traceback still holds the copy
    learn.fit_one_cycle(1)

def test_the_training_that_follows_is_the_same(tmp_path):
    def after(*searches):
        learn = learner(MixUp(.4), dls=fastai_dls, path=tmp_path)
        learn.fit_one_cycle(1)
        for mixes in searches: search(learn, mixes)
        learn.fit_one_cycle(1)
        return frozen(learn.model.state_dict()),frozen(learn.recorder.losses)
    assert after() == after([0, .5], [None, ManifoldMixUp(1., layers=nn.BatchNorm1d)])

def test_callbacks_that_were_given_stay_as_they_are():
    mixes,learn = [MixUp(.3),MixUp(.4)],learner()
    learn.add_cb(mixes[0])
    before = [dict(vars(cb)) for cb in mixes]
    search(learn, mixes)
    assert [dict(vars(cb)) for cb in mixes] == before and mixes[1].learn is None and mixes[0].learn is learn

def test_files_are_left_alone(tmp_path):
    learn = learner(CSVLogger(), SaveModelCallback(), path=tmp_path)
    learn.fit_one_cycle(1)
    def files(): return {p.name: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    before = files()
    search(learn)
    assert files() == before and len(before) == 2


def test_a_language_model(tmp_path):
    "Its texts are shuffled in place, its modules and callbacks hold on to what has a graph"
    from fastai.text.all import AWD_LSTM, LMDataLoader, LMTensorText, awd_lstm_lm_config, language_model_learner
    set_seed(0)
    texts = [LMTensorText(torch.randint(20, (20+i % 7,))) for i in range(30)]
    dls = DataLoaders(LMDataLoader(texts[:20], bs=4, seq_len=16, shuffle=True), LMDataLoader(texts[20:], bs=4, seq_len=16))
    dls.vocab = list(map(str, range(20)))
    learn = language_model_learner(dls, AWD_LSTM, config={**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 8, 'n_layers': 2}, pretrained=False,
        path=tmp_path)
    learn.remove_cbs(learn._grab_cbs(ProgressCallback)).logger = noop
    learn.lr_find(num_it=6, show_plot=False)
    def data(): return list(dls.train.items.idxs),id(dls.train.chunks),dls.train.rng.getstate()
    before = data(),frozen(learn.model.state_dict())
    found = search(learn, [.4, .4, 0])
    assert (found.losses[0] == found.losses[1]).all() and (found.losses[0] != found.losses[2]).all()
    assert (data(),frozen(learn.model.state_dict())) == before

@pytest.mark.parametrize('dls', [torch_dls, fastai_dls])
def test_equal_settings_give_equal_numbers(dls):
    found = search(learner(dls=dls), [.4, MixUp(.4), 0, None, .4], repeats=3)
    assert (found.losses[0] == found.losses[1]).all() and (found.losses[0] == found.losses[4]).all()
    assert (found.losses[2] == found.losses[3]).all() # the identity law
    assert len({*found.losses[0]}) == 3 and (found.losses[0] != found.losses[2]).all()

def test_seeds():
    learn = learner(dls=fastai_dls)
    one = search(learn, seed=4, repeats=3)
    assert (search(learn, seed=5, repeats=2).losses == one.losses[:,1:]).all()
    torch.rand(3), random.random(), np.random.rand()
    assert (search(learn, seed=4, repeats=3).losses == one.losses).all()

def test_numbers_are_those_of_the_training_itself():
    learn = learner(dls=fastai_dls)
    found = search(learn, [None, .5], epochs=2, lr=.05, seed=3)
    twin = learner(MixUp(.5), dls=fastai_dls)
    twin.dls.train.rng = random.Random(3)
    set_seed(3)
    twin.fit_one_cycle(2, .05)
    want = twin.recorder.values[-1][1:]
    assert [found.losses[1,0], *(found.metrics[name][1,0] for name in ('accuracy', 'mixed_accuracy'))] == pytest.approx(list(want),
        abs=1e-6)

def test_numbers_keep_the_method_of_the_learner():
    learn,seen = learner(MixUp(.2, p=.5, fold=False)),[]
    class Spy(Callback):
        def before_fit(self): seen.append([(type(cb), cb.alpha, cb.p, cb.fold) for cb in self.learn.cbs if isinstance(cb, MixCallback)])
    learn.add_cb(Spy())
    search(learn, [0, .7, None, ManifoldMixUp(.3)])
    assert seen == 2*[[(MixUp, 0, .5, False)], [(MixUp, .7, .5, False)], [], [(ManifoldMixUp, .3, 1, True)]]

def test_a_torch_optimiser():
    learn = learner()
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), lr=.1))
    before = frozen(learn.model.state_dict())
    found = search(learn)
    assert frozen(learn.model.state_dict()) == before and (found.losses[0] != found.losses[1]).all()

def test_layers_given_as_modules_are_those_of_the_copy():
    learn = learner()
    assert np.isfinite(search(learn, [0, ManifoldMixUp(1., layers=[learn.model[1]])]).losses).all()

def test_settings_of_the_learner_hold_in_the_search():
    seen = []
    class Spy(Callback):
        def before_fit(self):
            seen.append((self.learn.wd, self.learn.moms, len(self.learn.opt.param_groups), self.learn.opt is not learn.opt,
                type(self.learn)))
    class Mine(Learner): pass
    def groups(m): return [list(m[0].parameters()), list(m[1:].parameters())]
    learn = learner(Spy(), wd=.1, moms=(.9, .8, .9), splitter=groups)
    learn.__class__ = Mine
    search(learn)
    assert seen == 4*[(.1, (.9, .8, .9), 2, True, Mine)]

def test_frozen_layers_stay_frozen():
    learn,kept = learner(splitter=lambda m: [list(m[0].parameters()), list(m[1:].parameters())]),[]
    learn.freeze()
    weight = learn.model[0].weight.clone()
    class Spy(Callback):
        def after_fit(self): kept.append(torch.equal(self.learn.model[0].weight, weight))
    learn.add_cb(Spy())
    search(learn)
    assert kept == [True]*4

def test_hooks_that_hold_a_graph():
    learn = learner()
    with Hook(learn.model[0], lambda m,i,o: o, detach=False) as hook:
        learn.fit_one_cycle(1)
        learn.model(torch.randn(8, 4))
        assert hook.stored.grad_fn is not None and learn.model[3].last.grad_fn is not None
        stored = hook.stored
        search(learn)
        assert hook.stored is stored

def test_a_training_that_stops_early_is_validated():
    class Stop(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.iter == 1: self.learn.model[4].bias.data.fill_(float('nan'))
    found = search(learner(Stop(), TerminateOnNaNCallback()), epochs=2)
    assert np.isnan(found.losses).all() and found.suggestion == 0.

def test_what_cannot_be_copied_is_named():
    learn = learner()
    learn.stream = (i for i in range(3))
    with pytest.raises(TypeError, match='cannot be copied: .*generator'): search(learn)

@pytest.mark.parametrize('bar', [True, False])
def test_the_bar(bar, monkeypatch):
    import fastai_mixup.tools.mix_find as find
    shown = []
    monkeypatch.setattr(find, 'progress_bar', lambda jobs,**kwargs: shown.append(len(jobs)) or jobs)
    learn = learner()
    learn.add_cb(ProgressCallback())
    if bar: search(learn, repeats=3)
    else:
        with learn.no_bar(): search(learn)
    assert shown == [6]*bar

def test_nothing_is_printed(capsys):
    search(learner())
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('losses, want', [
    ([[1, 1.1, 1.2], [.9, 1., 1.1]], 1),                          # the same gain each time
    ([[1, 1.1, 1.2], [1.1, 1.2, 1.3]], 0),                        # the same loss each time
    ([[1, 1, 1], [.4, 1.1, 1.2]], 0),                             # a lucky seed
    ([[1, 1, 1], [.9, .8, .85], [.6, .65, .7]], 2),               # the smallest of two that are clear
    ([[1, 1, 1], [.9, .8, .85], [.1, 1.2, .5]], 1),               # the smallest is not clear
    ([[1, 1], [float('nan'), .1]], 0), ([[float('nan'), 1], [.1, .1]], 0), ([[1, 1]], 0), ([[1, 1], [1, 1]], 0)])
def test_suggestions(losses, want):
    found = MixFound([0, .1, .2][:len(losses)], losses)
    assert found.suggestion == [0, .1, .2][want]
    assert repr(found).count('suggestion: alpha=') == 1 and 'suggestion: ' in found._repr_html_()
    assert ('no setting is clearly better' in found.finding) == (want == 0 and len(losses) > 1)

def test_two_standard_errors():
    "A gain with mean 1 and sd s is clear for s < sqrt(4)/2 with four repeats"
    def clear(s): return MixFound([0, 1], [[5.]*4, [4+d*s*.75**.5 for d in (-1, -1, 1, 1)]]).clear[1]
    assert clear(.99) and not clear(1.01)

def test_the_table():
    found = MixFound([None, CutMix(1.)], [[1., 3.], [0., 1.]], dict(accuracy=[[.1, .3], [.5, .7]]))
    row = found.table.iloc[1]
    assert row.to_dict() == pytest.approx(dict(mix='CutMix(alpha=1)', valid_loss=.5, sd=.5**.5, gain=1.5, gain_sd=.5**.5, accuracy=.6))

def test_the_plot():
    found = MixFound([0, .1, .8], [[1, 1.1, 1.2], [.9, 1., 1.1], [2, 2, 2.]], axis_name='alpha of MixUp')
    with plt.rc_context({'axes.prop_cycle': plt.cycler(color=['#123456', '#654321'])}):
        fig,ax = plt.subplots()
        assert found.plot(ax) is ax
        assert {line.get_color() for line in ax.lines} >= {'C0'} and matplotlib.colors.to_hex('C0') == '#123456'
    dots = [line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) == 3][:3]
    assert dots == [[1, .9, 2], [1.1, 1, 2], [1.2, 1.1, 2]]
    assert [o.get_text() for o in ax.get_xticklabels()] == ['0', '0.1', '0.8'] and ax.get_xlabel() == 'alpha of MixUp'
    assert ax.get_title() == 'alpha=0.1 lowers the loss by 0.100 ± 0.000 against alpha=0'
    plt.close('all')

def test_show():
    plt.close('all')
    learn = learner()
    search(learn)
    assert not plt.get_fignums()
    search(learn, show=True)
    assert len(plt.get_fignums()) == 1
    plt.close('all')


@pytest.mark.parametrize('kwargs, error, said', [
    (dict(mixes=[]), ValueError, 'mixes must not be empty'),
    (dict(mixes=.4), TypeError, 'mixes must be a list of alphas, mixing callbacks or None, got 0.4'),
    (dict(mixes=MixUp()), TypeError, 'mixes must be a list'),
    (dict(mixes='0.4'), TypeError, 'mixes must be a list'),
    (dict(mixes=[0, MixUp]), TypeError, r'mixes\[1\] must be an alpha, a mixing callback such as CutMix\(1.\), or None'),
    (dict(mixes=[0, True]), TypeError, r'mixes\[1\] must be an alpha'),
    (dict(mixes=[0, Counter()]), TypeError, r'mixes\[1\] must be an alpha'),
    (dict(mixes=[0, float('nan')]), ValueError, r'mixes\[1\]: alpha must be 0 \(no mixing\) or a positive number \(1e-9 to 1e9\), got nan'),
    (dict(repeats=1), ValueError, 'repeats must be a whole number from 2 up, got 1'),
    (dict(repeats=2.), TypeError, 'repeats must be a whole number from 2 up, got 2.0 of type float'),
    (dict(epochs=0), ValueError, 'epochs must be a whole number from 1 up, got 0'),
    (dict(epochs=True), TypeError, 'epochs must be a whole number'),
    (dict(seed=-1), ValueError, 'seed must be a whole number from 0 up, got -1')])
def test_errors_come_before_any_training(kwargs, error, said):
    learn = learner(Striker('before_fit', RuntimeError('trained')))
    with pytest.raises(error, match=said): search(learn, **kwargs)

@pytest.mark.parametrize('mixer', [lambda: RandomMix([MixUp(), CutMix()]), SmoothMix, lambda: CutMix(minmax=(.2, .4))])
def test_a_method_without_alpha(mixer):
    with pytest.raises(TypeError, match='takes no alpha'): search(learner(mixer()))

@pytest.mark.parametrize('dls', [lambda: DataLoaders(torch_dls().train), lambda: DataLoaders(torch_dls().train, [])])
def test_without_a_validation_set(dls):
    with pytest.raises(ValueError, match='no validation set'): search(learner(dls=dls))
