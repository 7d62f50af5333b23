"Callbacks that take a loss of their own, written as their public versions are: each loss is that of what the model saw."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, noop
from fastai.callback.progress import ProgressCallback
from torch.nn.modules import module as modules

from fastai_mixup.all import ManifoldMixUp, MixUp, PreviousBatch, RandomMix, RegMixUp

N,C = 6,4
EYE,Y = torch.eye(N),torch.tensor([0, 1, 2, 3, 1, 0])

class Net(nn.Module):
    "What comes to `head` is the mixing matrix; each pass is written down"
    def __init__(self, drop=0.):
        super().__init__()
        torch.manual_seed(1)
        self.stem,self.drop,self.head,self.passes = nn.Identity(),nn.Dropout(drop),nn.Linear(N, C),[]
        nn.init.normal_(self.head.weight)
    def forward(self, x):
        M = self.stem(x)
        pred = self.head(self.drop(M))
        self.passes.append((M.detach().clone(), pred.detach().clone()))
        return pred

def of_matrix(M, pred, y=Y, smooth=0.):
    target = F.one_hot(y, C).float()*(1-smooth) + smooth/C
    return -((M @ target)*pred.log_softmax(1)).sum(1).mean()

MIXES = dict(none=list, mixup=lambda: MixUp(1.), batch=lambda: MixUp(1., per='batch'),
    hidden=lambda: ManifoldMixUp(1., layers='stem', include_input=False), random=lambda: RandomMix([MixUp(1.), MixUp(.2)], per='item'))
each_mix = pytest.mark.parametrize('mix', MIXES)

def trained(*cbs, mix, model=None, loss_func=None, lr=.1, batches=3, **kwargs):
    torch.manual_seed(0)
    dls = DataLoaders([(EYE, Y)]*batches, [], device='cpu')
    learn = Learner(dls, model or Net(**kwargs), loss_func or CrossEntropyLossFlat(), SGD, lr=lr,
        cbs=[*cbs, *([m] if isinstance(m := MIXES[mix](), Callback) else [])])
    learn.remove_cbs(learn._grab_cbs(ProgressCallback))
    learn.logger = noop
    before = learn.loss_func,dict(vars(learn))
    learn.fit(1)
    assert learn.loss_func is before[0] and not set(vars(learn)) - set(before[1]) - {'n_epoch', 'epoch', 'train_iter', 'iter',
        'pct_train'} - set(KNOWN)
    assert not modules._global_forward_hooks and not modules._global_forward_pre_hooks and not any(m._forward_hooks or m._forward_pre_hooks
        for m in learn.model.modules())
    return learn
KNOWN = 'dl xb yb pred loss loss_grad n_iter training epoch smooth_loss final_record _opt opt _log'.split()

class SAM(Callback):
    "Sharpness-aware minimisation (Foret et al. 2021): the step is taken by the gradient at the worst point nearby"
    order,run_valid = 20,False
    def __init__(self, rho=.05): self.rho,self.losses = rho,[]
    def before_step(self):
        params = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        with torch.no_grad():
            away = [p.grad*self.rho/(norm+1e-12) for p in params]
            for p,a in zip(params, away): p.add_(a)
        self.model.zero_grad()
        loss = self.learn.loss_func(self.model(*self.xb), *self.yb)
        loss.backward()
        self.losses.append(loss.detach())
        with torch.no_grad():
            for p,a in zip(params, away): p.sub_(a)

@each_mix
def test_sharpness_aware(mix):
    learn = trained(SAM(), mix=mix)
    assert len(learn.model.passes) == 6
    for (M,_),(again,pred),loss in zip(learn.model.passes[::2], learn.model.passes[1::2], learn.sam.losses):
        assert torch.equal(M, again)
        torch.testing.assert_close(loss, of_matrix(M, pred))

class AWP(Callback):
    "Adversarial weight perturbation (Wu et al. 2020): a second loss is added at perturbed weights, in after_backward"
    order,run_valid = 25,False
    def __init__(self, eps=.1): self.eps,self.losses = eps,[]
    def after_backward(self):
        kept = {p: p.detach().clone() for p in self.model.parameters()}
        with torch.no_grad():
            for p in kept: p.add_(self.eps*p.grad/(p.grad.norm()+1e-12)*p.norm())
        loss = self.learn.loss_func(self.model(*self.xb), *self.yb)
        loss.backward()
        self.losses.append(loss.detach())
        with torch.no_grad():
            for p,old in kept.items(): p.copy_(old)

@each_mix
def test_weights_perturbed(mix):
    learn = trained(AWP(), mix=mix)
    for (M,pred),loss in zip(learn.model.passes[1::2], learn.awp.losses, strict=True): torch.testing.assert_close(loss, of_matrix(M, pred))

class FGM(Callback):
    "Fast gradient method (Miyato et al. 2017) on the inputs: the model is trained on what raises the loss most"
    order,run_valid = 30,False
    def __init__(self, eps=.1): self.eps,self.losses,self.inputs = eps,[],[]
    def after_backward(self):
        x = self.learn.x.detach().clone().requires_grad_()
        self.learn.xb = x,
        loss = self.learn.loss_func(self.model(x), *self.yb)
        g, = torch.autograd.grad(loss, x)
        self.learn.xb = (x.detach() + self.eps*g.sign()),
        self.inputs.append(self.learn.x.clone())
        loss = self.learn.loss_func(self.model(*self.xb), *self.yb)
        loss.backward()
        self.losses.append(loss.detach())

@pytest.mark.parametrize('mix', ['none', 'mixup', 'batch', 'random'])
def test_inputs_perturbed(mix):
    learn = trained(FGM(), mix=mix)
    for (M,_),(_,pred),loss in zip(learn.model.passes[::3], learn.model.passes[2::3], learn.fgm.losses, strict=True):
        torch.testing.assert_close(loss, of_matrix(M, pred))

class RDrop(Callback):
    "R-Drop (Liang et al. 2021): a second pass with other dropout, and the divergence of both predictions"
    order,run_valid = 35,False
    def __init__(self, weight=1.): self.weight,self.losses = weight,[]
    def after_loss(self):
        again = self.model(*self.xb)
        loss = (self.loss_grad + self.learn.loss_func(again, *self.yb))/2
        a,b = self.pred.log_softmax(1),again.log_softmax(1)
        self.learn.loss_grad = loss + self.weight*(F.kl_div(a, b, log_target=True, reduction='batchmean')
            + F.kl_div(b, a, log_target=True, reduction='batchmean'))/2
        self.losses.append(loss.detach())

@each_mix
def test_two_passes_with_dropout(mix):
    learn = trained(RDrop(), mix=mix, drop=.3)
    for (M,first),(again,second),loss in zip(learn.model.passes[::2], learn.model.passes[1::2], learn.r_drop.losses, strict=True):
        assert torch.equal(M, again)
        torch.testing.assert_close(loss, (of_matrix(M, first)+of_matrix(M, second))/2)

class Distils(Callback):
    "Knowledge distillation with a consistent teacher (Beyer et al. 2022): the teacher sees what the student sees"
    order,run_valid = 40,False
    def __init__(self, teacher, weight=.5): self.teacher,self.weight,self.losses = teacher,weight,[]
    def after_loss(self):
        with torch.no_grad(): said = self.teacher(*self.xb).softmax(1)
        self.losses.append(self.learn.loss_func(self.pred, *self.yb).detach())
        self.learn.loss_grad = self.loss_grad*(1-self.weight) + self.weight*F.kl_div(self.pred.log_softmax(1), said, reduction='batchmean')

@each_mix
def test_distillation(mix):
    learn = trained(Distils(Net()), mix=mix)
    for (M,pred),loss in zip(learn.model.passes, learn.distils.losses, strict=True): torch.testing.assert_close(loss, of_matrix(M, pred))

class AppendsTeacher(Callback):
    "The teacher's answer to the mixed inputs as a second target: it belongs to the mixture, and is not mixed again"
    order,run_valid = 11,False
    def __init__(self, teacher): self.teacher = teacher
    def after_pred(self): self.learn.yb = *self.learn.yb,self.teacher(self.learn.x).detach()
    def after_loss(self): self.learn.yb = self.learn.yb[:1]

@pytest.mark.parametrize('mix', ['none', 'batch'])
def test_targets_that_are_appended(mix):
    teacher = nn.Linear(N, C)
    def both(pred, y, said): return F.cross_entropy(pred, y) + F.mse_loss(pred, said)
    losses = []
    class Look(Callback):
        order = 50
        def after_loss(self): losses.append(self.learn.loss.detach())
    learn = trained(AppendsTeacher(teacher), Look(), mix=mix, loss_func=both)
    for (M,pred),loss in zip(learn.model.passes, losses, strict=True):
        torch.testing.assert_close(loss, of_matrix(M, pred) + F.mse_loss(pred, teacher(M)).detach())

class OneHot(Callback):
    "Other targets in place of those of the data, before the model is called: they are mixed as they are then"
    run_valid = False
    def __init__(self, order): self.order = order
    def before_batch(self): self.learn.yb = F.one_hot(self.learn.y, C).float()*.9 + .1/C,

@pytest.mark.parametrize('order', [2, 60])
@each_mix
def test_targets_that_are_replaced(mix, order):
    losses = []
    class Look(Callback):
        order = 70
        def after_loss(self): losses.append(self.learn.loss.detach())
    learn = trained(OneHot(order), Look(), mix=mix, loss_func=nn.CrossEntropyLoss())
    for (M,pred),loss in zip(learn.model.passes, losses, strict=True): torch.testing.assert_close(loss, of_matrix(M, pred, smooth=.1))

class Meddles(Callback):
    "Validates, or fits another Learner, in the middle of a batch"
    run_valid = False
    def __init__(self, event, what, order):
        self.order,self.done = order,0
        def meddle():
            if self.learn.iter != 1: return
            self.done += 1
            what(self.learn)
        setattr(self, event, meddle)

def _validate(learn):
    kept = {k: vars(learn)[k] for k in 'dl xb yb pred loss loss_grad iter n_iter training epoch n_epoch'.split() if k in vars(learn)}
    learn.validate(dl=[(EYE, Y)])
    vars(learn).update(kept)
    learn.model.train()
def _fit_another(learn):
    other = Learner(learn.dls, Net(), CrossEntropyLossFlat(), SGD, lr=.1, cbs=MixUp(1.))
    with other.no_bar(), other.no_logging(): other.fit(1)

@pytest.mark.parametrize('what', [_validate, _fit_another])
@pytest.mark.parametrize('event,order', [('before_batch', 0), ('before_batch', 60), ('after_pred', 60), ('after_loss', 60),
    ('after_backward', 60), ('after_batch', 60)])
@pytest.mark.parametrize('mix', [lambda: MixUp(1.), lambda: MixUp(1., pairing=PreviousBatch()),
    lambda: ManifoldMixUp(1., layers='stem', include_input=False), lambda: RegMixUp(1.), lambda: RandomMix([MixUp(1.), MixUp(.3)])],
    ids=['mixup', 'previous', 'hidden', 'reg', 'random'])
def test_nested_runs_leave_the_batch_alone(mix, event, order, what):
    "All batches after it, and the weights at the end, are those of the fit without"
    def run(*cbs):
        torch.manual_seed(0)
        learn = Learner(DataLoaders([(EYE, Y)]*4, [], device='cpu'), Net(), CrossEntropyLossFlat(), SGD, lr=.1, cbs=[mix(), *cbs])
        learn.remove_cbs(learn._grab_cbs(ProgressCallback))
        learn.logger = noop
        learn.fit(1)
        return learn.model.head.weight.detach().clone()
    meddles = Meddles(event, what, order)
    torch.testing.assert_close(run(meddles), run(), rtol=0, atol=0)
    assert meddles.done == 1

@pytest.mark.parametrize('mix', [RegMixUp, partial(RegMixUp, method=MixUp(1.))])
def test_a_second_loss_of_new_predictions_under_regmixup(mix):
    torch.manual_seed(0)
    model = Net()
    learn = Learner(DataLoaders([(EYE, Y)]*2, [], device='cpu'), model, CrossEntropyLossFlat(), SGD, lr=.1, cbs=[mix(), second := SAM()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for (M,pred),loss in zip(model.passes[1::2], second.losses, strict=True):
        assert torch.equal(M[:N], EYE)
        torch.testing.assert_close(loss, F.cross_entropy(pred[:N], Y) + of_matrix(M[N:], pred[N:]))
