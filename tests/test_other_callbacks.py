"Other callbacks beside ours: they find what they expect, and the oracle still agrees."
import pytest
import torch
from fastai.callback import fp16
from fastai.callback.all import (
    ActivationStats,
    ChannelsLast,
    CSVLogger,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    MixedPrecision,
    ReduceLROnPlateau,
    RNNCallback,
    RNNRegularizer,
    SaveModelCallback,
    ShortEpochCallback,
    TerminateOnNaNCallback,
)
from fastai.callback.core import Callback
from fastai.callback.rnn import ModelResetter
from life import BS, At, N, Net, batches, check, each_kind, hooks, learner, mixer

COMPANY = dict(clip=lambda: GradientClip(.1), accumulation=lambda: GradientAccumulation(8), fp16=lambda: MixedPrecision(),
    bf16=lambda: MixedPrecision('bf16'),
    channels_last=ChannelsLast, activations=lambda: ActivationStats(with_hist=True), csv=CSVLogger, plateau=ReduceLROnPlateau,
    nan=TerminateOnNaNCallback,
    save=lambda: SaveModelCallback(with_opt=True), save_every=lambda: SaveModelCallback(every_epoch=True),
    stop=lambda: EarlyStoppingCallback(patience=5))

@each_kind
@pytest.mark.parametrize('name', COMPANY)
def test_with_other_callbacks(name, kind, real):
    learn = real(kind)
    learn.fit(2, cbs=COMPANY[name]())
    check(learn, 4, 4)
    learn.fit(1)
    check(learn, 2, 2)
    assert not hooks(learn.model)

@each_kind
@pytest.mark.parametrize('other,n,n_valid', [(lambda: EarlyStoppingCallback(min_delta=1e9), 4, 4),
    (lambda: ShortEpochCallback(short_valid=False), 6, 6),
    (TerminateOnNaNCallback, 1, 0)], ids=['early stopping', 'short epochs', 'nan'])
def test_callbacks_that_cut_short(other, n, n_valid, kind, real):
    learn = real(kind)
    cbs = [other()]
    if isinstance(cbs[0], TerminateOnNaNCallback): cbs.append(At('after_loss', lambda learn: setattr(learn, 'loss', learn.loss*torch.nan)))
    learn.fit(3, cbs=cbs)
    check(learn, n, n_valid)
    learn.fit(1)
    check(learn, 2, 2)

def step(learn, n_acc=None):
    "Fit one epoch; where the steps should have led `head`"
    before = learn.model.head.weight.detach().clone()
    learn.fit(1, cbs=GradientAccumulation(n_acc) if n_acc else None)
    return before - .1*sum(o.want_grad*(BS/n_acc if n_acc else 1) for o in learn.oracle.pages if o.training)

@each_kind
@pytest.mark.parametrize('n_acc', [None, 8])
def test_weights_follow_the_oracle(n_acc, kind):
    learn = learner(kind)
    torch.testing.assert_close(step(learn, n_acc), learn.model.head.weight.detach())

@each_kind
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_half_precision(mode, kind, monkeypatch):
    monkeypatch.setattr(fp16, 'autocast', lambda *device,dtype: torch.autocast('cpu', dtype))
    monkeypatch.setattr(fp16, 'GradScaler', lambda *device,**kwargs: torch.amp.GradScaler('cpu', init_scale=8, **kwargs))
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
           At('before_backward', lambda learn: extra.append((learn.loss_grad - learn.loss,
           2*learn.rnn.out.pow(2).mean() + learn.rnn.raw_out.diff(dim=1).pow(2).mean())))]
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
    def again(learn): twice.append(mixer(learn).loss(learn.model(*learn.xb)).detach())
    learn = learner(kind, At(event, again))
    learn.fit(1)
    torch.testing.assert_close(twice, [o.want for o in learn.oracle.pages if o.training])
    check(learn, 2, 2)

@each_kind
def test_loss_of_the_running_batch(kind):
    losses = []
    learn = learner(kind, At('after_loss', lambda learn: losses.append((mixer(learn).loss(learn.pred), learn.loss)), run_valid=True))
    learn.fit(1)
    assert len(losses) == 4
    for again,loss in losses: torch.testing.assert_close(again, loss)

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
def test_what_is_kept_of_a_batch_stays_as_it_was(kind):
    kept = []
    def keep(learn):
        x = learn.model.seen.x if kind == 'integers' else learn.x
        kept.extend((view, torch.as_tensor(view).clone()) for view in (x.as_subclass(torch.Tensor).detach(), x[1:], x.numpy()))
    learn = learner(kind, At('after_pred', keep))
    learn.fit(2)
    for view,was in kept: assert torch.equal(torch.as_tensor(view), was)

class Wrapping(Callback):
    "Calls the loss function that it finds by one of its own, for the batch"
    run_valid = False
    def __init__(self, order): self.order = order
    def before_batch(self):
        found = self.old = self.learn.loss_func
        self.learn.loss_func = lambda pred,*yb: found(pred, *yb)*1.
    def after_batch(self): self.learn.loss_func = self.old

@each_kind
@pytest.mark.parametrize('order', [9, 20, 60])
def test_loss_functions_that_call_the_mixed_one(order, kind):
    learn = learner(kind, Wrapping(order))
    learn.fit(1)
    check(learn, 2, 2)
    assert type(learn.loss_func).__name__ == 'CrossEntropyLossFlat'

@each_kind
def test_the_mixed_loss_of_a_batch_is_not_kept(kind):
    "Whoever puts it in place later has put the user's loss function there"
    found = []
    learn = learner(kind, At('after_pred', lambda learn: found.append(learn.loss_func)))
    learn.add_cb(At('after_epoch', lambda learn: setattr(learn, 'loss_func', found[-1])))
    own = learn.loss_func
    learn.fit(1)
    assert learn.loss_func is own and found[-1] is not own

POSTS = dict(plain=lambda m,x: m(x), scaled=lambda m,x: m(x)/1., copied=lambda m,x: m(x).clone(), cut=lambda m,x: m(x)[:,:],
    cast=lambda m,x: m(x).double().float(), direct=lambda m,x: m.forward(x))
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_backward'])
@pytest.mark.parametrize('post', POSTS)
def test_loss_of_what_was_not_mixed(post, event):
    "Where hidden layers are mixed, an error, whatever has been done to the prediction; the batch's own may be changed"
    x,y = batches('hidden')[0]
    def other(learn): learn.loss_func(POSTS[post](learn.model, x.clone().requires_grad_()), y)
    learn = learner('hidden', At(event, other, order=20))
    with pytest.raises(RuntimeError, match='answered to other tensors'): learn.fit(1)
    def own(learn):
        learn.model(x.clone())
        again = learn.loss_func(learn.model(*learn.xb).double().float()*1., *learn.yb)
        torch.testing.assert_close(again, learn.loss_func(learn.pred, *learn.yb))
    learn = learner('hidden', At('after_pred', own))
    learn.fit(1)
