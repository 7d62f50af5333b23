"Where inputs are one-hot numbers of the items, what reaches the model is the mixing matrix M, and the loss is written out from it."
import math
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import torch
from fastai.basics import SGD, Callback, DataLoaders, L, Learner, Recorder, Tensor, nn, noop
from fastai.callback.progress import ProgressCallback

N,BS,C = 11,4,5

class Head(nn.Linear):
    "From rows of M to predictions of any shape, or a tuple of them"
    def __init__(self, *outs, act=noop, dtype=None):
        super().__init__(N, sum(math.prod(o) for o in outs), dtype=dtype)
        self.outs,self.act = outs,act
        nn.init.normal_(self.weight)

    def forward(self, x):
        parts = super().forward(x).split([math.prod(o) for o in self.outs], 1)
        preds = tuple(self.act(p.reshape(len(x), *o)) for p,o in zip(parts, self.outs))
        return preds if len(preds) > 1 else preds[0]

class Net(nn.Module):
    "`encode` gives each item its one-hot row, so that `head` is given M"
    def __init__(self, head=None, encode=noop):
        super().__init__()
        self.head,self.encode = head or Head((C,)),encode

    def forward(self, *xb):
        self.args,self.M = xb,self.encode(*xb)
        if self.M.requires_grad: self.M.retain_grad()
        return self.head(self.M)

class Witness(Callback):
    "Writes down each training batch from outside"
    order,run_valid = 5,False
    def __init__(self, bs): self.bs = bs
    def before_fit(self): self.pages = []

    def after_loss(self):
        learn,net = self.learn,self.model
        again = learn.mix_up.loss(learn.pred) if hasattr(learn, 'mix_up') else learn.loss
        self.pages.append(SimpleNamespace(ids=own_ids(self.iter, self.bs), M=net.M.detach().clone(), args=net.args, pred=learn.pred,
            loss=learn.loss,
                                          loss_grad=learn.loss_grad, again=again, yb=learn.yb, head=deepcopy(net.head)))

    def after_backward(self):
        self.pages[-1].grads = [p.grad.clone() for p in self.model.head.parameters()]
        self.pages[-1].M_grad = self.model.M.grad

class Reduce(Callback):
    "Backward needs one number where the loss has one per element"
    order,run_valid = 6,False
    def after_loss(self): self.learn.loss_grad = ramp(self.learn.loss_grad)

def own_ids(i, bs=BS): return torch.arange(N).split(bs)[i]
def ramp(loss): return loss if loss.ndim == 0 else loss.flatten() @ torch.linspace(1, 2, loss.numel(), dtype=loss.dtype)
def plain(o): return o.detach().as_subclass(Tensor)
def close(a, b, tol=1e-5): torch.testing.assert_close(plain(a), plain(b), rtol=tol, atol=tol, equal_nan=True)

def rows(o, i):
    "Rows `i` of all tensors in `o`"
    if isinstance(o, Mapping): return type(o)({k: rows(v, i) for k,v in o.items()})
    if isinstance(o, (tuple, list)): return type(o)(rows(v, i) for v in o)
    return o[i] if isinstance(o, Tensor) else o

def batches(xb, yb, bs=BS): return [rows((*xb, *yb), i) for i in torch.arange(N).split(bs)]

def learner(data, loss_func, net, mix=None, cbs=(), n_inp=1, lr=.1, bs=BS):
    dls = DataLoaders(data, [] if isinstance(data, list) else data, device='cpu')
    dls.n_inp = n_inp
    learn = Learner(dls, net, loss_func, SGD, lr=lr, cbs=[Witness(bs), Reduce(), *L(mix), *cbs])
    learn.remove_cbs([ProgressCallback, Recorder])
    return learn

def fit(learn, n=1):
    with learn.no_logging(): learn.fit(n)
    return learn.witness.pages

def check_matrix(M, ids, mixed=True):
    "Rows of sum 1, with at most two entries, within the batch"
    close(M.sum(1), torch.ones_like(M[:,0]))
    assert (M >= 0).all() and ((M > 0).sum(1) <= 2).all(), M
    assert not M[:, [j for j in range(N) if j not in ids]].any(), M
    assert mixed != torch.equal(M, torch.eye(N, dtype=M.dtype)[ids]), M

def check(page, want, mixed=True, tol=1e-5):
    "Are the loss and its gradients those that `want(M, pred, ids)` gives?"
    check_matrix(page.M, page.ids, mixed and len(page.ids) > 1)
    M = page.M.clone().requires_grad_()
    pred = page.head(M)
    loss = want(page.M, pred, page.ids)
    for o in page.loss, page.loss_grad, page.again: close(o.flatten(), loss.flatten(), tol)
    *grads,M_grad = torch.autograd.grad(ramp(loss), [*page.head.parameters(), M])
    for got,grad in zip(page.grads, grads): close(got, grad, tol)
    if page.M_grad is not None: close(page.M_grad, M_grad, tol)

def mixed_losses(items, *ys, norm=None, reduction='mean'):
    "sum_j M_ij items(pred_i, y_j), reduced; `norm(y)` is what a mean divides by"
    def want(M, pred, ids):
        def total(f): return sum(align(M[:,j], l)*l for j in ids.tolist() for l in [f(*(y[[j]*len(M)] for y in ys))])
        losses = total(partial(items, pred))
        if reduction != 'mean': return losses.sum() if reduction == 'sum' else losses
        return losses.mean() if norm is None else losses.sum() / total(norm).sum()
    return want

def mixed_targets(loss, *ys): return lambda M,pred,ids: loss(pred, *(torch.tensordot(M, y.to(M.dtype), 1) for y in ys))

def shared_lam(loss, *ys):
    "lam loss(pred, y) + (1-lam) loss(pred, partner's y)"
    def want(M, pred, ids):
        lam = M[range(len(M)), ids]
        partner = (M - lam[:,None]*torch.eye(N)[ids]).argmax(1)
        close(lam, lam[:1].expand_as(lam))
        return lam[0]*loss(pred, *(y[ids] for y in ys)) + (1-lam[0])*loss(pred, *(y[partner] for y in ys))
    return want

def align(m, l): return m.view(-1, *[1]*(l.ndim-1))
