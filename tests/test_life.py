"What happens to a Learner in its life: each time the oracle agrees, or nothing is mixed."
import copy
import gc
import importlib.util
import weakref

import fastai.vision.learner  # noqa: F401 (shows the items of images)
import pytest
import torch
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.mixup import CutMix
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from life import KINDS, At, N, Net, batches, check, check_page, each_kind, hooks, learner, mixer, quiet
from torch import nn

from fastai_mixup.all import FromLoader, ManifoldMixUp, MixUp, PreviousBatch, RareClass

# Ways to train

def test_module_loaded_twice():
    "As by `importlib.reload`, `%autoreload`, or a notebook that defines the module: each version's callback has its scope"
    from fastai_mixup import callback as first
    spec = importlib.util.spec_from_file_location('fastai_mixup.callback_again', first.__file__)
    spec.loader.exec_module(second := importlib.util.module_from_spec(spec))
    for module in first, second, first, second:
        set_seed(0)
        seen = []
        class Seen(nn.Linear):
            def forward(self, x): seen.append(x.detach()); return super().forward(x)
        learn = Learner(DataLoaders([(torch.eye(N), torch.arange(N))], [], device='cpu'), Seen(N, N), CrossEntropyLossFlat(), lr=0.,
            cbs=module.MixUp(1.))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        pred = learn.model(seen[0])
        torch.testing.assert_close(torch.as_tensor(learn.recorder.losses[0]), nn.functional.cross_entropy(pred, seen[0]))
        assert not seen[0].equal(torch.eye(N))
        with pytest.raises(ZeroDivisionError), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=At('after_pred', lambda cb: 1/0))
        assert type(learn.loss_func) is CrossEntropyLossFlat

@each_kind
@pytest.mark.parametrize('n,train', [
    (2, lambda learn: learn.fit(1)),
    (4, lambda learn: learn.fit_one_cycle(2)),
    (6, lambda learn: learn.fine_tune(2, freeze_epochs=1)),
    (4, lambda learn: [learn.fit(1), learn.fit(1)]),
    (4, lambda learn: [learn.freeze(), learn.fit(1), learn.unfreeze(), learn.fit_flat_cos(1)]),
    (4, lambda learn: [learn.fit(1), learn.validate(), learn.get_preds(), learn.fit(1)]),
], ids=['fit', 'fit_one_cycle', 'fine_tune', 'twice', 'freeze', 'fit, look, fit'])
def test_training(n, train, kind, real):
    learn = real(kind)
    train(learn)
    check(learn, n)

@each_kind
def test_lr_find(kind, real):
    learn = real(kind)
    before = copy.deepcopy(learn.model.state_dict())
    learn.lr_find(num_it=10, show_plot=False)
    check(learn, 10, 0)
    torch.testing.assert_close(learn.model.state_dict(), before)
    learn.fit(1)
    check(learn, 2, 2)

@each_kind
def test_model_is_replaced_between_fits(kind):
    learn = learner(kind)
    learn.fit(1)
    old,learn.model,learn.opt = learn.model,Net(kind == 'integers'),None
    learn.fit(1)
    check(learn, 4, 4)
    assert not hooks(old)
    if kind == 'hidden': assert mixer(learn).layers == [learn.model.ids]

@each_kind
@pytest.mark.parametrize('off', [dict(p=0), dict(alpha=0)], ids=str)
def test_switched_off_is_training_without(off, kind, real):
    plain,learn = real(kind, mix=False),real(kind)
    for name,value in off.items(): setattr(mixer(learn), name, value)
    for o in plain, learn:
        set_seed(1)
        o.fit(2)
    torch.testing.assert_close(learn.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    assert learn.recorder.losses == plain.recorder.losses and learn.recorder.values == plain.recorder.values

# Looking at it

def interpretation(learn): return Interpretation.from_learner(learn).top_losses(2)
def confusion(learn): return ClassificationInterpretation.from_learner(learn).confusion_matrix()

@each_kind
@pytest.mark.parametrize('look', [
    lambda learn: learn.get_preds(), lambda learn: learn.get_preds(ds_idx=0, with_loss=True),
    lambda learn: learn.get_preds(with_loss=True, with_input=True),
    lambda learn: learn.validate(), lambda learn: learn.predict(3), lambda learn: learn.predict(3, with_input=True),
    lambda learn: learn.tta(n=2),
    lambda learn: learn.summary().split('Callbacks')[0], interpretation, confusion,
], ids=['get_preds', 'train set', 'with_loss', 'validate', 'predict', 'with_input', 'tta', 'summary', 'interpretation', 'confusion'])
def test_looking_is_not_mixed(look, kind, real):
    learn,plain = real(kind),real(kind, mix=False)
    learn.fit(1)
    plain.model.load_state_dict(learn.model.state_dict())
    plain.create_opt()
    learn.oracle.take()
    seen,expected = look(learn),look(plain)
    assert str(seen) == str(expected)
    assert len(learn.oracle.pages) == len(plain.oracle.pages)
    check(learn, 0)
    learn.fit(1)
    check(learn, 2, 2)

@pytest.mark.parametrize('kind', [o for o in KINDS if o != 'integers'])
def test_show_results(kind, real):
    learn = real(kind)
    learn.fit(1)
    learn.oracle.take()
    learn.show_results()
    ClassificationInterpretation.from_learner(learn).plot_top_losses(2)
    check(learn, 0, 4)

@each_kind
@pytest.mark.parametrize('ours_removed', [False, True])
def test_fetch_preds(ours_removed, kind, real):
    learn = real(kind)
    fetch = FetchPredsCallback(cbs=[mixer(learn)] if ours_removed else None)
    learn.fit(2, cbs=fetch)
    check(learn, 4, 8)
    torch.testing.assert_close(fetch.preds[0], learn.get_preds()[0])

@pytest.mark.slow
@each_kind
@pytest.mark.parametrize('event', ['after_epoch', 'after_train', 'after_validate'])
@pytest.mark.parametrize('inner', [False, True])
def test_nested_get_preds(inner, event, kind, real):
    learn = real(kind)
    learn.fit(2, cbs=At(event, lambda learn: learn.get_preds(inner=inner), order=1000))
    check(learn, 4, 8)

@each_kind
def test_recorder_has_the_mixed_losses_and_finds_targets(kind, real):
    learn = real(kind, metrics=accuracy)
    learn.recorder.train_metrics,hits = True,[]
    learn.fit(1, cbs=At('before_backward', lambda learn: hits.append(accuracy(learn.pred, learn.y))))
    train,valid = [[o.want for o in learn.oracle.pages if o.training == training] for training in (True, False)]
    torch.testing.assert_close(learn.recorder.losses, [train[0], (.98*.02*train[0]+.02*train[1])/(1-.98**2)])
    names = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert names['train_accuracy'] == pytest.approx(sum(hits).item()/2, rel=1e-4)
    assert names['valid_loss'] == pytest.approx(sum(valid).item()/2, rel=1e-4)

# Coming and going

@each_kind
def test_guest(kind, real):
    learn = real(kind, mix=False)
    learn.fit(1, cbs=KINDS[kind]())
    check(learn, 2, 2)
    assert not hasattr(learn, 'mix_up') and not hasattr(learn, 'manifold_mix_up')
    learn.fit(1)
    check(learn, 2, 2, mixed=False)

class Hidden(ManifoldMixUp):
    def __init__(self): super().__init__(1., layers='ids')

@pytest.mark.parametrize('cls', [MixUp, Hidden])
def test_class_for_an_instance(cls):
    learn = learner('floats', cls, mix=False)
    learn.fit(1)
    check(learn, 2, 2)
    learn.remove_cb(cls)
    learn.fit(1, cbs=cls)
    check(learn, 2, 2)

@each_kind
def test_removed_for_a_while(kind, real):
    learn = real(kind)
    cb = mixer(learn)
    with learn.removed_cbs(cb): learn.fit(1)
    check(learn, 2, 2, mixed=False)
    learn.fit(1)
    check(learn, 2, 2)
    learn.remove_cb(cb)
    learn.fit(1)
    check(learn, 2, 2, mixed=False)

@each_kind
@pytest.mark.parametrize('used', [False, True])
def test_one_instance_on_two_learners(used, kind):
    cb = KINDS[kind]()
    first = learner(kind, cb, mix=False)
    if used: first.fit(1)
    second = learner(kind, cb, mix=False)
    second.fit(1)
    check(second, 2, 2)
    with pytest.raises(RuntimeError, match='another Learner'): first.fit(1)
    second.fit(1)
    check(second, 2, 2)
    check(first, 2*used)

@each_kind
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_batch', 'after_epoch'])
def test_one_instance_is_not_taken_away_in_mid_training(event, kind):
    first = learner(kind)
    def steal(learn): learner(kind, mixer(first), mix=False).fit(1)
    with pytest.raises(RuntimeError, match='another Learner'): first.fit(2, cbs=At(event, steal, order=1000))
    for page in first.oracle.take(): check_page(page, mixed=page.training)

@pytest.mark.slow
@each_kind
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_epoch'])
@pytest.mark.parametrize('use', [lambda learn: learn.fit(1), lambda learn: learn.validate()], ids=['fit', 'validate'])
def test_its_former_learner_does_no_harm(use, event, kind):
    former = learner(kind)
    learn = learner(kind, mixer(former), mix=False)
    def borrow(learn):
        try: use(former)
        except RuntimeError as e: assert 'another Learner' in str(e)
    learn.fit(2, cbs=At(event, borrow, order=1000))
    check(learn, 4, 4)
    check(former, 0)

@pytest.mark.parametrize('other', [MixUp, ManifoldMixUp, FastaiMixUp, CutMix], ids=lambda o: f'{o.__module__}.{o.__name__}')
@pytest.mark.parametrize('kind', ['floats', 'hidden'])
@pytest.mark.parametrize('first', [False, True])
def test_another_callback_that_mixes_is_refused(first, kind, other):
    cbs = [KINDS[kind](), other()]
    learn = learner('floats', cbs if first else cbs[::-1], mix=False)
    loss_func = learn.loss_func
    with pytest.raises(ValueError, match='cannot share a Learner'): learn.fit(1)
    assert not learn.oracle.pages
    learn.remove_cb(cbs[1])
    learn.fit(1)
    check(learn, 2, 2)
    assert learn.loss_func is loss_func

@each_kind
def test_the_same_instance_twice_is_refused_or_mixes_once(kind):
    learn = learner(kind)
    try: learn.fit(1, cbs=mixer(learn))
    except ValueError: assert not learn.oracle.pages
    else: check(learn, 2, 2)

@each_kind
def test_idiom_of_the_documentation(kind, real):
    learn = real(kind)
    with learn:
        learn.epoch,learn.training = 0,True
        learn.dl = learn.dls.train
        b = learn.dls.one_batch()
        learn._split(b)
        learn('before_train')
        learn('before_batch')
        plan = mixer(learn).plan
    cb = mixer(learn)
    assert torch.equal(cb.y, b[1])
    if kind == 'floats': assert torch.equal(cb.x, plan.mix(b[0])) and not torch.equal(cb.x, b[0])
    if kind in ('hidden', 'output'): assert torch.equal(cb.x, b[0])
    if kind == 'integers': assert torch.equal(learn.model.ids(cb.x), plan.mix(learn.model.ids(b[0])))
    learn.fit(1)
    check(learn, 2, 2)

def test_refused_data_leaves_no_trace():
    learn = learner('floats', data=[(torch.eye(N), tuple('abcdefgh'))])
    with pytest.raises(TypeError, match='Target 0'): learn.fit(1)
    learn.dls = DataLoaders(batches('floats'), batches('floats'), device='cpu')
    learn.fit(1)
    check(learn, 2, 2)

@pytest.mark.slow
@each_kind
def test_nothing_is_kept_alive(kind):
    model = nn.Sequential(nn.Embedding(N, N) if kind == 'integers' else nn.Linear(N, N), nn.Linear(N, 5))
    refs = []
    note = lambda learn: refs.extend(weakref.ref(o) for o in (*learn.xb, *learn.yb, learn.pred))
    def fresh(): yield from ((x.clone(), y.clone()) for x,y in batches(kind))
    class Fresh(list):
        def __iter__(self): return fresh()
    cb = ManifoldMixUp(1., layers='output' if kind == 'output' else '0') if kind in ('hidden', 'output') else MixUp(1.)
    data = Fresh(batches(kind))
    learn = quiet(Learner(DataLoaders(data, data, device='cpu'), model, CrossEntropyLossFlat(),
        cbs=[cb, At('after_loss', note, run_valid=True)]))
    learn.fit(2)
    gc.collect()
    assert len(refs) == 24 and not any(o() is not None for o in refs)

KEPT = 'dl','xb','yb','pred','loss','loss_grad','iter','n_iter','training','epoch','n_epoch','pct_train','opt','train_iter','start_epoch'

def aside(learn, f):
    "`f(learn)`, of which fastai's own state, the model and torch's draws are put back"
    kept,weights,rng = {k: v for k,v in vars(learn).items() if k in KEPT},copy.deepcopy(learn.model.state_dict()),torch.get_rng_state()
    grads = [p.grad for p in learn.model.parameters()]
    learn.opt = None # for `f` to make its own
    for p in learn.model.parameters(): p.grad = None
    f(learn)
    learn.model.load_state_dict(weights)
    for p,g in zip(learn.model.parameters(), grads): p.grad = g
    vars(learn).update(kept)
    torch.set_rng_state(rng)
    learn.model.train()

class Stops(Callback):
    def after_pred(self): raise ZeroDivisionError('stop')

def nested_fit(learn):
    with learn.removed_cbs([learn.oracle, learn.recorder]), learn.no_logging(): learn.fit(2)
def broken_fit(learn):
    with learn.removed_cbs([learn.oracle, learn.recorder]), learn.no_logging(), pytest.raises(ZeroDivisionError): learn.fit(1, cbs=Stops())

MADE = dict(plain=lambda kind: {}, stateful=lambda kind: dict(stateful=True),
    generator=lambda kind: dict(generator=torch.Generator().manual_seed(2)), pairing=lambda kind: dict(pairing=PreviousBatch()),
    rare=lambda kind: dict(pairing=RareClass()),
    second=lambda kind: dict(pairing=FromLoader([(x, y.roll(1)) for x,y in batches(kind)*2][:3])))

@pytest.mark.slow
@each_kind
@pytest.mark.parametrize('f', [nested_fit, broken_fit])
@pytest.mark.parametrize('event,order', [('before_batch', 0), ('before_batch', 9), ('before_step', 0), ('after_batch', 0)])
@pytest.mark.parametrize('made', MADE)
def test_nested_fit_of_the_same_learner(made, event, order, f, kind):
    "The outer batches, and what is drawn and remembered for them, are those without it"
    if made in ('pairing', 'second') and kind in ('hidden', 'output'): return # an error
    def pages(*cbs):
        learn = learner(kind, cbs)
        for name,value in MADE[made](kind).items(): setattr(mixer(learn), name, value)
        learn.fit(2)
        return [page for page in learn.oracle.take() if page.training]
    for page,want in zip(pages(At(event, lambda learn: aside(learn, f), order)), pages(), strict=True):
        torch.testing.assert_close((page.M, page.loss), (want.M, want.loss))

@each_kind
def test_tensors_of_the_loader_are_left_as_they_were(kind):
    "One tensor in two epochs and as two inputs, say; no attribute stays on it"
    data = batches(kind)
    learn = learner(kind, data=data)
    learn.fit(2)
    check(learn, 4, 4)
    for (x,y),(x0,y0) in zip(data, batches(kind)): assert torch.equal(x, x0) and torch.equal(y, y0) and not vars(x) and not vars(y)

class Counted(Learner):
    def one_batch(self, i, b): return super().one_batch(i, b)

@each_kind
def test_one_scope_where_a_subclass_calls_the_base(kind):
    "Whether or not the base has its scope already: one fit, whose draws last"
    first = learner(kind)
    first.fit(1)
    fits = []
    for cls in Learner,Counted:
        learn = learner(kind, At('after_pred', lambda learn: fits.append(mixer(learn).fit)))
        learn.__class__ = cls
        learn.fit(2)
        check(learn, 4, 4)
    assert len({id(o) for o in fits[:4]}) == len({id(o) for o in fits[4:]}) == 1 and len(fits) == 8
