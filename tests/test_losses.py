"The oracle law for any loss function: the Learner's loss and gradients are the written-out sum over the mixing matrix."
from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fastai.losses import (
    BaseLoss,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from fastai.vision.all import TensorCategory, TensorMask, TensorMultiCategory
from oracle import BS, C, Head, N, Net, batches, check, close, fit, learner, mixed_losses, mixed_targets, noop, shared_lam
from torch import nn

from fastai_mixup.all import *

gen = torch.Generator().manual_seed(1)
def ints(*size, high=C): return torch.randint(high, (N, *size), generator=gen)
def floats(*size): return torch.randn(N, *size, generator=gen)
def ignore(y, *gone): return y.index_fill(0, torch.tensor(gone), -100)
def holes(y): return y.masked_fill(torch.rand(y.shape, generator=gen) < .3, -100)

IDX,SEQ,SEG = ints(),ints(3),ints(3, 4)
SOME,LATE,SOME_SEQ,SOME_SEG = ignore(IDX, 1, 2, 9),ignore(IDX, 4, 5, 9),ignore(holes(SEQ), 2, 9),ignore(holes(SEG), 1, 9)
BITS,REAL,PROBS = ints(C, high=2),floats(2),floats(C).softmax(1)
W = torch.tensor([1., 5., .5, 2., 3.])
REDUCTIONS = 'mean','sum','none'

class Case(NamedTuple):
    loss_func:callable
    ys:tuple
    want:callable
    outs:tuple = ((C,),)
    act:callable = noop
    dtype:torch.dtype = torch.float32
    tol:float = 1e-5

CASES = {}
def case(name, *args, **kwargs):
    assert name not in CASES
    CASES[name] = Case(*args, **kwargs)

def counts(y, weight=None, ignore_index=-100, **_):
    "What each target weighs in the mean"
    valid = y != ignore_index
    return valid.float() if weight is None else valid*weight[y.where(valid, 0)]

def ce(y, axis=1, flip=False, reduction='mean', **kw):
    def items(p, t):
        l = F.cross_entropy(p.movedim(axis, 1), t, reduction='none', **kw)
        return l.transpose(1, -1) if flip else l
    return mixed_losses(items, y, norm=partial(counts, **kw), reduction=reduction)

OPTIONS = dict(plain={}, weight=dict(weight=W), smooth=dict(label_smoothing=.2), zero_weight=dict(weight=W*torch.tensor([0, 1, 1, 1, 1])),
               ignore=dict(ignore_index=2), all=dict(weight=W, label_smoothing=.2, ignore_index=2))
CROSS_ENTROPIES = CrossEntropyLossFlat,nn.CrossEntropyLoss,lambda **kw: partial(F.cross_entropy, **kw)
for (o,kw),red,(f,name) in product(OPTIONS.items(), REDUCTIONS, zip(CROSS_ENTROPIES, ('flat', 'module', 'partial'))):
    case(f'ce-{name}-{o}-{red}', f(reduction=red, **kw), (IDX,), ce(IDX, reduction=red, **kw))
case('ce-function', F.cross_entropy, (IDX,), ce(IDX))
case('ce-some_ignored', nn.CrossEntropyLoss(W), (SOME,), ce(SOME, weight=W))
case('ce-uint8', CrossEntropyLossFlat(), (IDX.int(),), ce(IDX))
case('ce-category', CrossEntropyLossFlat(), (TensorCategory(IDX),), ce(IDX))
case('ce-float64-flat', CrossEntropyLossFlat(), (IDX,), lambda M,p,ids: ce(IDX)(M.float(), p.float(), ids), dtype=torch.float64)

for red in REDUCTIONS:
    double = dict(weight=W.double(), label_smoothing=.1, reduction=red)
    case(f'ce-float64-module-{red}', nn.CrossEntropyLoss(**double), (IDX,), ce(IDX, **double), dtype=torch.float64, tol=1e-12)
    seg = dict(outs=((C, 3, 4),))
    case(f'segmentation-{red}', CrossEntropyLossFlat(axis=1, reduction=red), (TensorMask(SEG),), ce(SEG, flip=True, reduction=red), **seg)
    case(f'segmentation-ignore-{red}', CrossEntropyLossFlat(axis=1, weight=W, reduction=red), (SOME_SEG,),
         ce(SOME_SEG, flip=True, weight=W, reduction=red), **seg)
    case(f'segmentation-module-{red}', nn.CrossEntropyLoss(W, reduction=red), (SOME_SEG,), ce(SOME_SEG, weight=W, reduction=red), **seg)
    case(f'next_token-{red}', CrossEntropyLossFlat(reduction=red), (SOME_SEQ,), ce(SOME_SEQ, axis=2, reduction=red), outs=((3, C),))
    case(f'ours-{red}', LabelSmoothingCE(reduction=red), (IDX,), ce(IDX, label_smoothing=.1, reduction=red))
    case(f'ours-all-{red}', LabelSmoothingCE(.3, W, reduction=red), (SOME,), ce(SOME, weight=W, label_smoothing=.3, reduction=red))
    case(f'ours-axis-{red}', LabelSmoothingCE(.3, W, axis=1, reduction=red), (SOME_SEG,),
        ce(SOME_SEG, weight=W, label_smoothing=.3, reduction=red), **seg)
    case(f'ours-soft-{red}', LabelSmoothingCE(.3, W, reduction=red), (PROBS,),
         mixed_targets(partial(F.cross_entropy, weight=W, label_smoothing=.3, reduction=red), PROBS))

def without_each_other(y, eta, axis=1, weight=None, label_smoothing=0., reduction='mean', ignore_index=-100):
    "The mixed cross-entropy, and that of each of the two classes of a mixture without the other, position by position"
    plain = ce(y, axis, weight=weight, label_smoothing=label_smoothing, reduction=reduction, ignore_index=ignore_index)
    def one(z, a, b):
        if a == b or ignore_index in (a, b): return 0.
        of = [1.]*C if weight is None else weight
        return -sum(of[c]*(z[c] - torch.stack([z[k] for k in range(C) if k != other]).logsumexp(0)) for c,other in ((a, b), (b, a)))
    def want(M, pred, ids):
        rows = pred.movedim(axis, -1).reshape(len(pred), -1, C)
        targets = y.view(len(y), -1)
        terms,total = [],torch.tensor(0.)
        for i,own in enumerate(ids.tolist()):
            mixed = [j for j in range(N) if j != own and 1e-3 < M[i,j] < 1-1e-3]
            terms += [one(z, targets[own,k].item(), targets[j,k].item()) for k,z in enumerate(rows[i]) for j in (mixed or [own])]
            total = total + (M[i][:,None]*counts(targets, weight, ignore_index)).sum()
        terms = torch.stack([torch.as_tensor(o, dtype=pred.dtype) for o in terms])
        terms = terms if reduction == 'none' else terms.sum() if reduction == 'sum' else terms.sum()/total
        loss = plain(M, pred, ids)
        return loss + eta*terms.view(loss.shape)
    return want

for red in REDUCTIONS:
    case(f'decoupled-{red}', LabelSmoothingCE(0., reduction=red, decoupled=.3), (IDX,), without_each_other(IDX, .3, reduction=red))
    case(f'decoupled-all-{red}', LabelSmoothingCE(.2, W, reduction=red, decoupled=2), (SOME,),
        without_each_other(SOME, 2., weight=W, label_smoothing=.2, reduction=red), tol=1e-4)
    case(f'decoupled-axis-{red}', LabelSmoothingCE(.2, W, axis=1, reduction=red, decoupled=.3), (SOME_SEG,),
        without_each_other(SOME_SEG, .3, weight=W, label_smoothing=.2, reduction=red), outs=((C, 3, 4),), tol=1e-4)
    case(f'decoupled-last-{red}', LabelSmoothingCE(0., reduction=red, decoupled=.3), (SEQ,),
        without_each_other(SEQ, .3, axis=2, reduction=red), outs=((3, C),))

def fastai_smoothing(y, weight=None, reduction='mean', eps=.1):
    nll = mixed_losses(lambda p,t: F.nll_loss(p.log_softmax(1), t, weight, reduction='none'), y, norm=partial(counts, weight=weight),
        reduction=reduction)
    def want(M, pred, ids):
        uniform = -pred.log_softmax(1).mean(1)
        return eps*getattr(uniform, reduction, lambda: uniform)() + (1-eps)*nll(M, pred, ids)
    return want

for f,w,red in product((LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat), (None, W), REDUCTIONS):
    case(f"fastai_smoothing-{f.__name__}-{'plain' if w is None else 'weight'}-{red}", f(weight=w, reduction=red), (IDX,),
        fastai_smoothing(IDX, w, red))
case('fastai_smoothing-ignored', LabelSmoothingCrossEntropyFlat(), (SOME,), fastai_smoothing(SOME))

def focal(p, t, gamma=2., weight=None):
    l = F.cross_entropy(p, t, weight, reduction='none')
    return (1 - (-l).exp())**gamma * l

for red in REDUCTIONS:
    case(f'focal-{red}', FocalLossFlat(gamma=1.5, weight=W, reduction=red), (IDX,),
         mixed_losses(partial(focal, gamma=1.5, weight=W), IDX, reduction=red))
    logp = dict(outs=((C, 3, 4),), act=lambda p: p.log_softmax(1))
    nll = mixed_losses(partial(F.nll_loss, weight=W, reduction='none'), SOME_SEG, norm=partial(counts, weight=W), reduction=red)
    case(f'nll-{red}', nn.NLLLoss(W, reduction=red), (SOME_SEG,), nll, **logp)
    case(f'nll-function-{red}', partial(F.nll_loss, weight=W, reduction=red), (SOME_SEG,), nll, **logp)
    case(f'margin-{red}', nn.MultiMarginLoss(p=2, weight=W, reduction=red), (IDX,),
         mixed_losses(lambda p,t: F.multi_margin_loss(p, t, 2, weight=W, reduction='none'), IDX, reduction=red))
    case(f'dice-{red}', DiceLoss(reduction=red), (SEG,), mixed_losses(DiceLoss(reduction='none'), SEG, reduction=red), outs=((C, 3, 4),))

bce = F.binary_cross_entropy_with_logits
def flattened(p, t, f, reduction): return f(p.flatten(), t, reduction=reduction)
for red in REDUCTIONS:
    for name,y in dict(floats=BITS.float(), ints=BITS, bools=BITS.bool(), category=TensorMultiCategory(BITS)).items():
        case(f'bce-flat-{name}-{red}', BCEWithLogitsLossFlat(reduction=red), (y,), mixed_targets(partial(bce, reduction=red), BITS))
    case(f'bce-module-{red}', nn.BCEWithLogitsLoss(W, pos_weight=2*W, reduction=red), (BITS.float(),),
         mixed_targets(partial(bce, weight=W, pos_weight=2*W, reduction=red), BITS))
    case(f'bce-pos_weight-{red}', BCEWithLogitsLossFlat(pos_weight=W, reduction=red), (BITS,),
        mixed_targets(partial(bce, pos_weight=W, reduction=red), BITS))
    for name,flat,module,f in ('mse', MSELossFlat, nn.MSELoss, F.mse_loss), ('l1', L1LossFlat, nn.L1Loss, F.l1_loss):
        one,two = REAL[:,0],REAL
        case(f'{name}-flat-1d-{red}', flat(reduction=red), (one,), mixed_targets(partial(flattened, f=f, reduction=red), one), outs=((1,),))
        case(f'{name}-flat-2d-{red}', flat(reduction=red), (two,), mixed_targets(partial(f, reduction=red), two), outs=((2,),))
        case(f'{name}-module-1d-{red}', module(reduction=red), (one,), mixed_targets(partial(f, reduction=red), one), outs=((),))
        case(f'{name}-module-2d-{red}', module(reduction=red), (two,), mixed_targets(partial(f, reduction=red), two), outs=((2,),))
        case(f'{name}-ints-{red}', flat(reduction=red), (IDX,), mixed_targets(partial(f, reduction=red), IDX), outs=((),))
    soft = dict(weight=W, label_smoothing=.1, reduction=red)
    case(f'soft-{red}', nn.CrossEntropyLoss(**soft), (PROBS,), mixed_targets(partial(F.cross_entropy, **soft), PROBS))
    onehot = F.one_hot(IDX, C).float()
    case(f'onehot-{red}', nn.CrossEntropyLoss(reduction=red), (onehot,), mixed_targets(partial(F.cross_entropy, reduction=red), onehot))
    case(f'huber-{red}', nn.HuberLoss(reduction=red), (REAL,), mixed_targets(partial(F.huber_loss, reduction=red), REAL), outs=((2,),))
SIGNS,CLASSES = 2*(IDX % 2) - 1,torch.stack([IDX, (IDX+1) % C, *[torch.full_like(IDX, -1)]*3], 1)
case('hinge', nn.HingeEmbeddingLoss(), (SIGNS,), mixed_losses(partial(F.hinge_embedding_loss, reduction='none'), SIGNS), outs=((),))
case('multilabel_margin', nn.MultiLabelMarginLoss(), (CLASSES,), mixed_losses(partial(F.multilabel_margin_loss, reduction='none'), CLASSES))
case('mse-large_ints', nn.MSELoss(), (IDX + 2**30,), mixed_targets(F.mse_loss, (IDX + 2**30).double()), outs=((),), dtype=torch.float64,
    tol=1e-12)

def nll_items(p, t): return F.cross_entropy(p, t, reduction='none')
def squared(p, t): return F.cross_entropy(p, t)**2
def scalar(p, t): return F.cross_entropy(p, t)
def with_argument(p, t, reduction='mean'): return F.cross_entropy(p, t, reduction=reduction)/2
def masked(p, t): return nll_items(p, t).sum()/counts(t).sum()
def masked_argument(p, t, reduction='mean'): return nll_items(p, t) if reduction == 'none' else masked(p, t)

class WithAttribute(nn.Module):
    reduction = 'mean'
    def forward(self, p, t): return F.cross_entropy(p, t, reduction=self.reduction)/2

class Ignored(WithAttribute):
    def forward(self, p, t): return squared(p, t)

class Masked(WithAttribute):
    def forward(self, p, t): return masked_argument(p, t, self.reduction)

half = mixed_losses(lambda p,t: nll_items(p, t)/2, IDX)
case('own-scalar', scalar, (IDX,), ce(IDX))
case('own-squared', squared, (IDX,), shared_lam(squared, IDX))
case('own-argument', with_argument, (IDX,), half)
case('own-attribute', WithAttribute(), (IDX,), half)
case('own-ignored_attribute', Ignored(), (IDX,), shared_lam(squared, IDX))
case('own-in_base_loss', BaseLoss(WithAttribute), (IDX,), half)
for name,y in dict(early=SOME, late=LATE).items():
    case(f'own-masked-{name}', masked, (y,), ce(y))
    case(f'own-masked_argument-{name}', masked_argument, (y,), ce(y))
    case(f'own-masked_attribute-{name}', Masked(), (y,), ce(y))

def two_heads(p, a, b, reduction='mean'):
    return F.cross_entropy(p[0], a, reduction=reduction) + 2*F.cross_entropy(p[1], b, reduction=reduction)
def two_heads_scalar(p, a, b): return two_heads(p, a, b)
def class_and_number(p, a, x): return F.cross_entropy(p[:,:C], a) + F.mse_loss(p[:,C], x)
def two_numbers(p, x, y): return F.mse_loss(p[0], x) + F.l1_loss(p[1], y)
for f in two_heads,two_heads_scalar:
    case(f'several-{f.__name__}', f, (IDX, SEQ[:,0]), mixed_losses(partial(two_heads, reduction='none'), IDX, SEQ[:,0]), outs=((C,), (C,)))
case('several-class_and_number', class_and_number, (IDX, REAL[:,0]), outs=((C+1,),),
     want=mixed_losses(lambda p,a,x: nll_items(p[:,:C], a) + F.mse_loss(p[:,C], x, reduction='none'), IDX, REAL[:,0]))
case('several-numbers', two_numbers, (REAL, PROBS), mixed_targets(two_numbers, REAL, PROBS), outs=((2,), (C,)))

for red in REDUCTIONS:
    case(f'binary-{red}', LabelSmoothingBCE(weight=W, pos_weight=2*W, reduction=red), (BITS,),
        mixed_targets(partial(bce, weight=W, pos_weight=2*W, reduction=red), BITS))
    case(f'binary-indices-{red}', LabelSmoothingBCE(reduction=red), (IDX,), mixed_targets(partial(bce, reduction=red), F.one_hot(IDX, C)))

each_case = pytest.mark.parametrize('c', CASES.values(), ids=CASES.keys())

def case_learner(c, mix):
    torch.manual_seed(0)
    return learner(batches((torch.eye(N, dtype=c.dtype),), c.ys), c.loss_func, Net(Head(*c.outs, act=c.act, dtype=c.dtype)), mix)

def state(loss_func):
    return [(k, id(v)) for o in (loss_func, getattr(loss_func, 'func', None)) for k,v in getattr(o, '__dict__', {}).items()]

@each_case
def test_oracle(c):
    for page in fit(case_learner(c, MixUp(1., fold=False)), 2): check(page, c.want, tol=c.tol)

@pytest.mark.slow
@each_case
def test_unmixed(c):
    for page in fit(case_learner(c, MixUp(1e-9))):
        check(page, c.want, mixed=False, tol=c.tol)
        want = c.loss_func(page.pred, *page.yb)
        assert page.loss.shape == want.shape and page.loss.dtype == want.dtype
        close(page.loss, want, c.tol)

@pytest.mark.slow
@each_case
def test_loss_func_is_left_alone(c):
    before = state(c.loss_func)
    learn = case_learner(c, MixUp(1.))
    for page in fit(learn): assert page.loss.untyped_storage().data_ptr() != page.loss_grad.untyped_storage().data_ptr()
    assert learn.loss_func is c.loss_func and state(c.loss_func) == before

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(), nn.CrossEntropyLoss(W), F.cross_entropy, nn.NLLLoss(), LabelSmoothingCE()],
                         ids=['flat', 'module', 'function', 'nll', 'ours'])
def test_batch_without_targets(loss_func):
    def run(*mix):
        torch.manual_seed(0)
        return fit(learner(batches((torch.eye(N),), (ignore(IDX, 0, 1, 2, 3),)), loss_func, Net(), mix))[0]
    mixed,unmixed = run(MixUp(1.)),run()
    for a,b in zip([mixed.loss, *mixed.grads], [unmixed.loss, *unmixed.grads]): close(a, b)

class Dropped(Net):
    def forward(self, x):
        self.dropped = F.dropout(torch.ones(len(x), N), .5)
        return super().forward(x)*self.dropped[:,:C]

@pytest.mark.parametrize('off', [dict(alpha=0), dict(alpha=0.), dict(alpha=1., p=0)], ids=str)
def test_identity(off):
    def run(*mix):
        torch.manual_seed(0)
        dl = torch.utils.data.DataLoader(list(zip(torch.eye(N), IDX)), batch_size=BS, shuffle=True)
        learn = learner(dl, CrossEntropyLossFlat(), Dropped(), mix)
        pages = fit(learn, 3)
        return [[p.loss, p.M, *p.grads] for p in pages], list(learn.model.parameters()), torch.get_rng_state()
    torch.testing.assert_close(run(MixUp(**off)), run(), rtol=0, atol=0)
