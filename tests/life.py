"A small Learner whose inputs are the numbers of its items, and an oracle that checks each of its batches."
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, L, Learner, Tensor, nn, noop
from fastai.callback.all import *  # registers the ways to train
from fastai.callback.progress import ProgressCallback
from fastai.data.all import Categorize, Datasets
from fastai.torch_core import set_seed
from fastai.vision.core import TensorImage
from torch.nn.modules.module import _global_forward_hooks

from fastai_mixup.all import ManifoldMixUp, MixUp
from fastai_mixup.callback import MixCallback

N,BS,CLASSES = 8,4,5
KINDS = dict(
    floats=lambda: MixUp(1.),
    integers=lambda: MixUp(1.),
    hidden=lambda: ManifoldMixUp(1., layers='ids', include_input=False),
    output=lambda: ManifoldMixUp(1., layers='output'))
each_kind = pytest.mark.parametrize('kind', KINDS)

class Seen(nn.Module):
    "Keeps what comes by, and counts"
    def __init__(self):
        super().__init__()
        self.register_buffer('n', torch.tensor(0))
    def forward(self, x):
        self.x = x.detach()
        self.n += self.training
        return x

class Net(nn.Module):
    "`ids` gives each item its one-hot row, so that `seen` sees who is mixed with whom"
    def __init__(self, integers=False):
        super().__init__()
        self.ids = nn.Embedding(N, N) if integers else nn.Linear(N, N, bias=False)
        nn.init.eye_(self.ids.weight)
        self.ids.requires_grad_(False)
        self.seen,self.body,self.head = Seen(),nn.Linear(N, N),nn.Linear(N, CLASSES)
        for o in self.body, self.head: nn.init.orthogonal_(o.weight)

    def forward(self, x):
        if isinstance(self.ids, nn.Linear): x = x.flatten(1)
        return self.head(self.body(self.seen(self.ids(x))))

def groups(model): return [list(model.body.parameters()), list(model.head.parameters())]

class At(Callback):
    "Calls `f(learn)` at `event`, unless `f` is why it comes"
    def __init__(self, event, f, order=0, run_valid=False):
        self.f,self.order,self.run_valid,self.busy = f,order,run_valid,False
        setattr(self, event, self.act)
    def act(self):
        if self.busy: return
        self.busy = True
        try: self.f(self.learn)
        finally: self.busy = False

Page = namedtuple('Page', 'training M loss want grad want_grad')

def matrix_loss(M, pred, y):
    "The mean over the items of their losses against all targets, weighted by `M`"
    return -(M * pred.float().log_softmax(1)[:, y.as_subclass(Tensor)]).sum(1).mean()

class Oracle(Callback):
    "Writes down how each batch was mixed, and the loss and gradient that follow from it"
    order = -1e9
    def __init__(self): self.pages = []

    def before_batch(self):
        x = self.learn.xb[0]
        self.numbers,self.targets = (x if x.ndim == 1 else x.flatten(1).argmax(1)).tolist(),self.learn.yb

    def after_pred(self):
        with torch.no_grad(): self.said = self.model.head(self.model.body(self.model.seen.x))

    def after_loss(self):
        if not self.targets: return
        pred,said,loss = self.learn.pred,self.said.double(),self.learn.loss_grad.mean()
        M = self.model.seen.x[:, self.numbers].float()
        if not torch.allclose(pred.double(), said, atol=1e-3): M = (pred.detach().double() @ torch.linalg.pinv(said)).float() @ M
        want = matrix_loss(M, pred, self.targets[0])
        grad = lambda o: torch.autograd.grad(o, self.model.head.weight, retain_graph=True)[0] if self.training else None
        self.pages.append(Page(self.training, M, loss.detach(), want.detach(), grad(loss), grad(want)))

    def take(self):
        "The pages since the last time"
        pages,self.pages = self.pages,[]
        return pages

def check_page(page, mixed, atol=1e-4):
    "Is the batch mixed, or not, and are its loss and gradient those of its matrix?"
    def close(a, b): assert torch.allclose(a.float(), b.float(), atol=atol, rtol=atol), (a, b)
    close(page.M.sum(1), torch.ones(len(page.M)))
    assert (page.M > -atol).all() and ((page.M > atol).sum(1) <= 2).all(), page.M
    assert mixed == bool((page.M - torch.eye(len(page.M))).abs().max() > 10*atol), page.M
    close(page.loss, page.want)
    if page.training: close(page.grad, page.want_grad)

def check(learn, n_train, n_valid=None, mixed=True, atol=1e-4):
    "Does the oracle agree to all batches since the last check, and are there as many as there should be?"
    pages = learn.oracle.take()
    for page in pages: check_page(page, mixed and page.training, atol)
    train = sum(page.training for page in pages)
    assert train == n_train
    assert n_valid is None or len(pages)-train == n_valid

def batches(kind):
    x = torch.arange(N) if kind == 'integers' else torch.eye(N)
    y = torch.arange(N) % CLASSES
    return [(x[:BS], y[:BS]), (x[BS:], y[BS:])]

def picture(i): return TensorImage(F.one_hot(torch.tensor(i), N).float().view(1, 2, -1))
def number(i): return torch.tensor(i)
def label(i): return i % CLASSES

def datasets(kind):
    "The same items as fastai `DataLoaders` that can decode, show and shuffle"
    set_seed(0)
    tfms = [[number if kind == 'integers' else picture], [label, Categorize()]]
    return Datasets(list(range(N)), tfms, splits=(range(N), range(N))).dataloaders(bs=BS, num_workers=0, device=torch.device('cpu'))

def quiet(learn):
    learn.logger = noop
    return learn.remove_cbs(learn._grab_cbs(ProgressCallback))

def learner(kind, cbs=(), model=None, data=None, mix=True, **kwargs):
    "A Learner with the callback called `kind`, over the same two batches for training and validation"
    torch.manual_seed(0)
    data = data or batches(kind)
    dls = data if isinstance(data, DataLoaders) else DataLoaders(data, data, device='cpu')
    kwargs = dict(loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, splitter=groups, **kwargs)
    cbs = [Oracle(), *([KINDS[kind]()] if mix else []), *L(cbs)]
    return quiet(Learner(dls, model or Net(kind == 'integers'), cbs=cbs, **kwargs))

def mixer(learn): return next(cb for cb in learn.cbs if isinstance(cb, MixCallback))

def hooks(model): return [h for d in (_global_forward_hooks, *(m._forward_hooks for m in model.modules())) for h in d.values()]

def check_by_hand(learn, kind):
    "Does the model, and does each of its layers, answer as one that was never trained with a callback of ours?"
    plain = Net(kind == 'integers')
    plain.load_state_dict(learn.model.state_dict())
    last = learn.xb[0] if isinstance(getattr(learn, 'xb', None), tuple) else None
    own = [x for x,_ in learn.dls.train]
    layers = [lambda m,x: m(x), lambda m,x: m.ids(x), lambda m,x: m.head(m.ids(x)), lambda m,x: m.body(m.ids(x))]
    for mode in True, False:
        for model in learn.model, plain: model.train(mode)
        for x in [own[0].clone(), *own, *([last] if isinstance(last, Tensor) else [])]:
            for layer in layers: assert torch.equal(layer(learn.model, x), layer(plain, x))
    assert not hooks(learn.model)
