"Whatever is raised, wherever: the Learner is left as without the callback, and can be trained again."
import dis
import gc
import sys
import weakref
from functools import cache, wraps

import pytest
import torch.nn.functional as F
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    event,
)
from fastai.learner import Recorder
from fastai.torch_core import set_seed
from fastcore.basics import noop
from life import KINDS, check, check_by_hand, check_page, each_kind, hooks, learner, mixer
from torch import nn

CANCEL = dict(backward=CancelBackwardException, batch=CancelBatchException, epoch=CancelEpochException, fit=CancelFitException,
    step=CancelStepException, train=CancelTrainException, validate=CancelValidException)
ERRORS = RuntimeError,KeyboardInterrupt
EXCEPTIONS = *CANCEL.values(),*ERRORS
EVENTS = [o for o in vars(event) if not o.startswith('_') and o != 'after_create']
CANCELLED_AT = dict(backward='before_backward', batch='after_pred', epoch='after_train', fit='after_epoch', step='before_step',
    train='after_batch', validate='before_validate')

each_event = pytest.mark.parametrize('at', EVENTS)
each_exception = pytest.mark.parametrize('exc', EXCEPTIONS, ids=lambda o: o.__name__)
each_error = pytest.mark.parametrize('exc', [*ERRORS, CancelBatchException, CancelFitException], ids=lambda o: o.__name__)
each_order = pytest.mark.parametrize('order', [-1000, 1000], ids=['early', 'late'])

class Raise(Callback):
    "Raises `exc` at event `at`, once"
    def __init__(self, at, exc, order):
        self.order,self.exc,self.done = order,exc,False
        setattr(self, at, self.fire)
    def fire(self):
        if self.done: return
        self.done = True
        raise self.exc('fault')

def faults(at, exc, order):
    "What raises `exc` at event `at`, and what cancels something first if the event needs that"
    what = at.removeprefix('after_cancel_')
    return [Raise(at, exc, order), *([Raise(CANCELLED_AT[what], CANCEL[what], order)] if what != at else [])]

def outcome(learn):
    "Fit, and tell how it ended"
    try: learn.fit(1)
    except (Exception, KeyboardInterrupt) as e: raised = type(e)
    else: raised = None
    return dict(raised=raised, pages=[o.training for o in learn.oracle.pages], training=learn.training,
                modes=[m.training for m in learn.model.modules()], forwards=int(learn.model.seen.n),
                attributes=set(vars(learn)) - {'mix_up', 'manifold_mix_up'},
                targets=[type(y) for y in getattr(learn, 'yb', ())], layers=[set(vars(m)) for m in learn.model.modules()])

def loss_state(learn): return [{k: repr(v) for k,v in vars(o).items()} for o in (learn.loss_func, learn.loss_func.func)]

@cache
def plain_outcome(at, exc, order, kind): return outcome(learner(kind, faults(at, exc, order), mix=False))

@pytest.mark.slow
@each_kind
@each_order
@each_exception
@each_event
def test_event(at, exc, order, kind):
    learn = learner(kind, faults(at, exc, order))
    loss_func,state = learn.loss_func,loss_state(learn)
    plain = plain_outcome(at, exc, order, 'integers' if kind == 'integers' else 'floats')
    assert outcome(learn) == plain
    assert learn.loss_func is loss_func and loss_state(learn) == state
    check(learn, sum(plain['pages']))
    check_by_hand(learn, kind)
    refit(learn)

def refit(learn):
    learn.fit(1)
    check(learn, 2, 2)

def fit_without(learn):
    learn.remove_cb(mixer(learn))
    learn.fit(1)
    check(learn, 2, 2, mixed=False)

def validate(learn):
    learn.validate()
    check(learn, 0, 2)

def validate_inside(learn):
    learn.remove_cbs(Recorder)
    learn._do_epoch_validate()
    check(learn, 0, 2)

@pytest.mark.slow
@each_kind
@each_order
@each_event
@pytest.mark.parametrize('then', [fit_without, validate, validate_inside])
def test_what_follows_an_interrupt(at, order, kind, then):
    learn = learner(kind, faults(at, KeyboardInterrupt, order))
    outcome(learn)
    learn.oracle.take()
    then(learn)
    refit(learner(kind, model=learn.model))

@each_kind
@each_event
def test_interrupted_guest_leaves_no_trace(at, kind):
    learn = learner(kind, faults(at, KeyboardInterrupt, -1000), mix=False)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=KINDS[kind]())
    learn.oracle.take()
    learn.fit(1)
    check(learn, 2, 2, mixed=False)
    assert not hooks(learn.model)

@pytest.mark.slow
@each_kind
@pytest.mark.parametrize('at', ['before_batch', 'after_loss'])
def test_interrupted_learner_can_be_dropped(at, kind):
    learn = learner(kind, faults(at, KeyboardInterrupt, 1000))
    outcome(learn)
    left = [weakref.ref(o) for o in (learn, mixer(learn), learn.model, learn.model.ids)]
    del learn
    gc.collect()
    assert [o() for o in left] == [None]*4
    assert not hooks(nn.Module())

class Fuse:
    "Makes a function raise `exc` at its `nth` call"
    def __init__(self, exc, nth): self.exc,self.left = exc,nth
    def __call__(self, f):
        @wraps(f)
        def burn(*args, **kwargs):
            self.left -= 1
            if not self.left: raise self.exc('fault')
            return f(*args, **kwargs)
        return burn

def in_first_layer(learn, fuse): learn.model.ids.forward = fuse(learn.model.ids.forward)
def behind_first_layer(learn, fuse): learn.model.seen.forward = fuse(learn.model.seen.forward)
def in_optimizer(learn, fuse):
    learn.create_opt()
    learn.opt.step = fuse(learn.opt.step)
def in_data(learn, fuse):
    fetch = fuse(noop)
    class Data(list):
        def __iter__(self): return map(fetch, super().__iter__())
    learn.dls.loaders[0] = Data(learn.dls.loaders[0])
def in_user_loss(learn, fuse): learn.loss_func = fuse(lambda p,y: F.cross_entropy(p, y))
def in_reducible_loss(learn, fuse): learn.loss_func = fuse(lambda p,y,reduction='mean': F.cross_entropy(p, y, reduction=reduction))

@pytest.mark.slow
@each_kind
@each_error
@pytest.mark.parametrize('nth', [1, 2, 3, 4])
@pytest.mark.parametrize('place', [in_first_layer, behind_first_layer, in_optimizer, in_data, in_user_loss, in_reducible_loss])
def test_inner_fault(place, nth, exc, kind):
    learn = learner(kind)
    place(learn, fuse := Fuse(exc, nth))
    outcome(learn)
    fuse.left = 0
    for page in learn.oracle.take(): check_page(page, mixed=page.training)
    check_by_hand(learn, kind)
    refit(learn)

@cache
def ends_of_with(code):
    "Where `code` has left the body of a `with` and not yet called `__exit__`: Python sees to no signal there"
    ops = list(dis.get_instructions(code))
    def gives_none(o): return (o.opname, o.argval) == ('LOAD_CONST', None)
    return {o[0].offset for o in zip(ops, ops[1:], ops[2:], ops[3:]) if all(map(gives_none, o[:3])) and 'CALL' in o[3].opname}

class InterruptOurs:
    "Ctrl-C at the `nth` line of our own code that runs in this block"
    def __init__(self, nth=None): self.nth,self.n = nth,0
    def __enter__(self):
        self.old = sys.gettrace()
        sys.settrace(self.enter)
        return self
    def __exit__(self, *args):
        sys.settrace(self.old)
    def enter(self, frame, *args): return self.line if (frame.f_globals.get('__package__') or '').startswith('fastai_mixup') else None
    def line(self, frame, what, *args):
        self.n += what == 'line' and frame.f_lasti not in ends_of_with(frame.f_code)
        if self.n == self.nth:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.line

@pytest.mark.slow
@each_kind
def test_interrupt_at_any_line(kind):
    learner(kind).fit(1) # fills what is cached
    def new(): # the same lines in each run
        set_seed(0)
        return learner(kind)
    learn = new()
    with InterruptOurs() as lines: learn.fit(1)
    for nth in range(1, lines.n, 7):
        learn = new()
        with pytest.raises(KeyboardInterrupt), InterruptOurs(nth): learn.fit(1)
        learn.oracle.take()
        check_by_hand(learn, kind)
        refit(learn)
