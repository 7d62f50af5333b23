"What happens to a Learner in its life: each time the oracle agrees, or nothing is mixed."
import copy
import gc
import pickle
import weakref

import pytest
import torch
from fastai.callback import fp16
from fastai.callback.all import (ActivationStats, CSVLogger, Callback, ChannelsLast, EarlyStoppingCallback, FetchPredsCallback, GradientAccumulation,
    GradientClip, MixedPrecision, ReduceLROnPlateau, RNNCallback, RNNRegularizer, SaveModelCallback, ShortEpochCallback, TerminateOnNaNCallback)
from fastai.callback.mixup import CutMix
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.rnn import ModelResetter
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

from fastai_mixup.all import ManifoldMixUp, MixUp
from life import (KINDS, N, Net, batches, check, check_page, datasets, each_kind, hooks, learner, mixer, quiet)

@pytest.fixture
def real(tmp_path): return lambda kind, *args, **kwargs: learner(kind, *args, data=datasets(kind), path=tmp_path, **kwargs)

# Ways to train

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
    lambda learn: learn.get_preds(), lambda learn: learn.get_preds(ds_idx=0, with_loss=True), lambda learn: learn.get_preds(with_loss=True, with_input=True),
    lambda learn: learn.validate(), lambda learn: learn.predict(3), lambda learn: learn.predict(3, with_input=True), lambda learn: learn.tta(n=2),
    lambda learn: learn.summary(), interpretation, confusion,
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

# Saving, loading, copying

def interrupt(learn): raise KeyboardInterrupt

@each_kind
@pytest.mark.parametrize('when', ['fit', 'after_epoch', 'after_batch', 'before_batch', 'after_pred', 'after_loss'])
def test_export(when, kind, real):
    learn = real(kind)
    if when == 'fit': learn.fit(1)
    elif when in ('after_epoch', 'after_batch'): learn.fit(1, cbs=At(when, lambda learn: learn.export(), order=1000))
    else:
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At(when, interrupt, order=1000))
    if when not in ('after_epoch', 'after_batch'): learn.export()
    loaded = quiet(load_learner(learn.path/'export.pkl'))
    assert not hooks(loaded.model)
    assert str(loaded.predict(3)) == str(learn.predict(3))
    loaded.dls = learn.dls
    for o in learn, loaded:
        o.remove_cbs([cb for cb in o.cbs if isinstance(cb, At)])
        o.oracle.take()
        o.fine_tune(1)
        check(o, 4, 4)

@each_kind
def test_export_after_every_batch_does_no_harm(kind, real):
    learn = real(kind)
    learn.fit(2, cbs=At('after_batch', lambda learn: learn.export(), order=1000))
    check(learn, 4, 4)

@each_kind
def test_save_and_load(kind, real):
    learn = real(kind)
    learn.fit(1)
    learn.save('here')
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(1)
    learn.load('here')
    torch.testing.assert_close(learn.model.state_dict(), before)
    learn.fit(1)
    check(learn, 6, 6)

@each_kind
@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_batch'])
def test_model_saved_in_mid_batch_is_plain(event, kind, tmp_path):
    learn = learner(kind)
    learn.fit(1, cbs=At(event, lambda learn: torch.save(learn.model, tmp_path/'model.pth'), order=-1000 if event == 'after_batch' else 1000))
    assert not hooks(torch.load(tmp_path/'model.pth', weights_only=False))

def pickled(o): return pickle.loads(pickle.dumps(o))
each_copy = pytest.mark.parametrize('how', [copy.copy, copy.deepcopy, pickled])

class Copying(Callback):
    order,run_valid = 1000,False
    def __init__(self, how, event):
        self.how,self.copies = how,[]
        setattr(self, event, self.take_copy)
    def take_copy(self):
        if not self.copies: self.copies.append(self.how(mixer(self.learn)))

@each_kind
@each_copy
@pytest.mark.parametrize('when', ['unused', 'before_fit', 'before_batch', 'after_epoch', 'used'])
def test_copies(when, how, kind):
    learn = learner(kind)
    copying = Copying(how, 'before_fit' if when in ('unused', 'used') else when)
    learn.fit(2, cbs=copying)
    check(learn, 4, 4)
    cb = how(KINDS[kind]()) if when == 'unused' else how(mixer(learn)) if when == 'used' else copying.copies[0]
    assert cb.plan is None and cb.alpha == 1
    other = learner(kind, cb, mix=False)
    other.fit(1)
    check(other, 2, 2)
    learn.fit(1)
    check(learn, 2, 2)

@each_copy
@pytest.mark.parametrize('make', [MixUp, ManifoldMixUp])
def test_copies_with_a_generator(make, how):
    assert how(make(generator=torch.Generator().manual_seed(1))).generator.initial_seed() == 1

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
def test_company_that_mixes_is_refused(first, kind, other):
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
    cb = mixer(learn)
    assert torch.equal(cb.y, b[1])
    if kind == 'floats': assert torch.equal(cb.x, cb.plan.blend(b[0])) and not torch.equal(cb.x, b[0])
    if kind in ('hidden', 'output'): assert torch.equal(cb.x, b[0])
    if kind == 'integers': assert torch.equal(learn.model.ids(cb.x), cb.plan.blend(learn.model.ids(b[0])))
    learn.fit(1)
    check(learn, 2, 2)

def test_refused_data_leaves_no_trace():
    learn = learner('floats', data=[(torch.eye(N), tuple('abcdefgh'))])
    with pytest.raises(TypeError, match='Target 0'): learn.fit(1)
    learn.dls = DataLoaders(batches('floats'), batches('floats'), device='cpu')
    learn.fit(1)
    check(learn, 2, 2)

# Company

COMPANY = dict(clip=lambda: GradientClip(.1), accumulation=lambda: GradientAccumulation(8), fp16=lambda: MixedPrecision(), bf16=lambda: MixedPrecision('bf16'),
    channels_last=ChannelsLast, activations=lambda: ActivationStats(with_hist=True), csv=CSVLogger, plateau=ReduceLROnPlateau, nan=TerminateOnNaNCallback,
    save=lambda: SaveModelCallback(with_opt=True), save_every=lambda: SaveModelCallback(every_epoch=True), stop=lambda: EarlyStoppingCallback(patience=5))

@each_kind
@pytest.mark.parametrize('name', COMPANY)
def test_company(name, kind, real):
    learn = real(kind)
    learn.fit(2, cbs=COMPANY[name]())
    check(learn, 4, 4)
    learn.fit(1)
    check(learn, 2, 2)
    assert not hooks(learn.model)

@each_kind
@pytest.mark.parametrize('company,n,n_valid', [(lambda: EarlyStoppingCallback(min_delta=1e9), 4, 4), (lambda: ShortEpochCallback(short_valid=False), 6, 6),
    (TerminateOnNaNCallback, 1, 0)], ids=['early stopping', 'short epochs', 'nan'])
def test_company_that_cuts_short(company, n, n_valid, kind, real):
    learn = real(kind)
    cbs = [company()]
    if isinstance(cbs[0], TerminateOnNaNCallback): cbs.append(At('after_loss', lambda learn: setattr(learn, 'loss', learn.loss*torch.nan)))
    learn.fit(3, cbs=cbs)
    check(learn, n, n_valid)
    learn.fit(1)
    check(learn, 2, 2)

def step(learn, n_acc=None):
    "Fit one epoch; where the steps should have led `head`"
    before = learn.model.head.weight.detach().clone()
    learn.fit(1, cbs=GradientAccumulation(n_acc) if n_acc else None)
    return before - .1*sum(o.want_grad*(4/n_acc if n_acc else 1) for o in learn.oracle.pages if o.training)

@each_kind
@pytest.mark.parametrize('n_acc', [None, 8])
def test_weights_follow_the_oracle(n_acc, kind):
    learn = learner(kind)
    torch.testing.assert_close(step(learn, n_acc), learn.model.head.weight.detach())

@each_kind
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_half_precision(mode, kind, monkeypatch):
    monkeypatch.setattr(fp16, 'autocast', lambda device,dtype: torch.autocast('cpu', dtype))
    monkeypatch.setattr(fp16, 'GradScaler', lambda device,**kwargs: torch.amp.GradScaler('cpu', init_scale=8, **kwargs))
    learn = learner(kind, MixedPrecision(mode))
    learn.fit(2)
    check(learn, 4, 4, atol=2e-2)
    assert learn.model.seen.x.dtype == (torch.float32 if kind == 'integers' else torch.bfloat16 if mode == 'bf16' else torch.float16)

class Recurrent(Net):
    "Answers as a language model of fastai does"
    def reset(self): pass
    def forward(self, x):
        out = super().forward(x)
        return out,out*1,out*2

@each_kind
@pytest.mark.parametrize('reverse', [False, True])
def test_rnn_regularizer_comes_on_top(reverse, kind):
    extra = []
    cbs = [ModelResetter(), RNNCallback(), RNNRegularizer(alpha=2., beta=1.),
           At('before_backward', lambda learn: extra.append((learn.loss_grad - learn.loss, 2*learn.rnn.out.pow(2).mean() + learn.rnn.raw_out.diff(dim=1).pow(2).mean())))]
    learn = learner(kind, cbs[::-1] if reverse else cbs, model=Recurrent(kind == 'integers'))
    learn.fit(1)
    check(learn, 2, 2)
    for got,want in extra: torch.testing.assert_close(got, want)

@each_kind
@pytest.mark.parametrize('order', [-1e8, -1000, 0, 8, 1000, 1e9])
@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_backward', 'before_step', 'after_batch'])
def test_targets_are_found(event, order, kind):
    found = []
    learn = learner(kind, At(event, lambda learn: found.append((learn.y, *learn.yb)), order=order))
    learn.fit(1)
    for (y,also),(_,want) in zip(found, batches(kind), strict=True): assert y is also and torch.equal(y, want)

@each_kind
@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step'])
def test_second_forward_pass_has_the_same_loss(event, kind):
    twice = []
    def again(learn): twice.append((mixer(learn).loss(learn.model(*learn.xb)), learn.model.seen.x))
    learn = learner(kind, At(event, again))
    learn.fit(1)
    pages = [o for o in learn.oracle.pages if o.training]
    for (loss,_),page in zip(twice, pages, strict=True): torch.testing.assert_close(loss.detach(), page.want)
    check(learn, 2, 2)

@each_kind
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step'])
def test_other_data_in_mid_batch_is_not_mixed(event, kind):
    x,saw = batches(kind)[0][0].clone(),[]
    def other(learn):
        kept = learn.model.seen.x if hasattr(learn.model.seen, 'x') else None
        learn.model(x)
        saw.append(learn.model.seen.x)
        learn.model.seen.x = kept
    learn = learner(kind, At(event, other, order=1000))
    learn.fit(1)
    for o in saw: assert torch.equal(o, torch.eye(N)[:len(o)])
    check(learn, 2, 2)

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
    learn = quiet(Learner(DataLoaders(data, data, device='cpu'), model, CrossEntropyLossFlat(), cbs=[cb, At('after_loss', note, run_valid=True)]))
    learn.fit(2)
    gc.collect()
    assert len(refs) == 24 and not any(o() is not None for o in refs)
