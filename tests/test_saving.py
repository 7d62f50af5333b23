"Learners, models and callbacks that are saved, loaded and copied, at any time."
import copy
import pickle

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import load_learner
from life import KINDS, At, Net, check, each_kind, learner, mixer, quiet

from fastai_mixup.all import ManifoldMixUp, MixUp

def interrupt(learn): raise KeyboardInterrupt

@pytest.mark.slow
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

def pickled(o): return pickle.loads(pickle.dumps(o))
each_copy = pytest.mark.parametrize('how', [copy.copy, copy.deepcopy, pickled])
deep_copies = pytest.mark.parametrize('how', [copy.deepcopy, pickled])

@each_kind
@deep_copies
@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_batch'])
def test_copy_of_the_model_in_mid_batch_does_not_mix(event, how, kind):
    def take_copy(learn):
        plain = Net(kind == 'integers')
        plain.load_state_dict(learn.model.state_dict())
        assert torch.equal(how(learn.model)(*learn.xb), plain(*learn.xb))
    learn = learner(kind, At(event, take_copy, order=-1000 if event == 'after_batch' else 1000))
    learn.fit(1)
    check(learn, 2, 2)

@each_kind
@pytest.mark.parametrize('event', ['before_batch', 'after_loss'])
def test_model_saved_after_an_interrupt_does_not_need_us(event, kind):
    learn = learner(kind, At(event, interrupt, order=1000))
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert b'fastai_mixup' not in pickle.dumps(learn.model)

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
