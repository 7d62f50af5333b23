"More of the kinds that users reported: variants, each with the right value by hand."
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, nn
from test_reports import EYE, C, N, Net, Y, close, pages

from fastai_mixup.all import *

# Targets that another callback adds

@pytest.mark.parametrize('order', [0, 11, 70])
@pytest.mark.parametrize('at', [0, 1, 2])
def test_targets_that_are_added_in_any_place(order, at):
    "What a teacher says of the mixed batch belongs to the mixture, wherever it is put among the targets, at whatever order"
    torch.manual_seed(9)
    teacher,numbers = nn.Linear(N, C),torch.randn(N, C)
    def loss(p, *yb):
        yb = [*yb]
        t = yb.pop(at)
        return F.cross_entropy(p, yb[0]) + F.mse_loss(p, yb[1]) + F.mse_loss(p, 8*t)
    class Distil(Callback):
        run_valid = False
        def after_pred(self):
            said,yb = teacher(self.learn.x).detach(),self.learn.yb
            self.kept,self.learn.yb = yb,(*yb[:at], said, *yb[at:])
        def after_loss(self): self.learn.yb = self.kept
    Distil.order = order
    page, = pages([(EYE, Y, numbers)], loss, Net(), MixUp(1., fold=False, per='batch'), Distil())
    lam,j,t = page.plan.lam[0],page.plan.index,teacher(page.M).detach()
    def want(*own): return loss(page.pred, *own[:at], t, *own[at:])
    close(page.loss, lam*want(Y, numbers) + (1-lam)*want(Y[j], numbers[j]))

# Hidden layers of another layout than the inputs

class At(nn.Linear):
    "Linear in the channels, which are along `dim`"
    dim = -1
    def forward(self, x): return super().forward(x.movedim(self.dim, -1)).movedim(-1, self.dim)

class Pointwise(nn.Module):
    "Sees each position by itself; its inputs have channels along `given`, its hidden layers along `hidden`"
    def __init__(self, features, given, hidden, fixed=None):
        super().__init__()
        torch.manual_seed(0)
        self.a,self.b = (nn.Sequential(At(n, features), nn.Tanh(), At(features, features)) for n in (3, features))
        self.head,self.given,self.hidden,self.fixed = nn.Linear(features, C),given,hidden,fixed
        for m in self.modules():
            if isinstance(m, At): m.dim = hidden
    def forward(self, x):
        x = x.movedim(self.given, self.hidden)
        if self.fixed: assert x[0].numel() == self.fixed, 'one size of inputs only'
        self.out = self.b(self.a(x))
        return self.head(self.out.movedim(self.hidden, -1).flatten(1, -2).mean(1))

def along(x, dim): return x.movedim(1, dim).contiguous()

@pytest.mark.parametrize('features', [3, 16, 12, 8])
@pytest.mark.parametrize('size', [(16,), (16, 16)], ids=str)
@pytest.mark.parametrize('given,hidden', [(1, -1), (-1, 1)])
@pytest.mark.parametrize('fixed', [False, True])
def test_hidden_layers_of_another_layout(features, size, given, hidden, fixed):
    "No mask along the channels: such a layer is not chosen, and an error where the user names it"
    x = along(torch.randn(N, 3, *size), given)
    kwargs = dict(method=CutMix(), spatial_dims=len(size), channels_last=given == -1)
    def net(): return Pointwise(features, given, hidden, x[0].numel() if fixed else None)
    used = {page.plan.layer for page in pages([(x, Y)]*8, CrossEntropyLossFlat(), net(), ManifoldMixUp(**kwargs))}
    assert used == {'input'}
    with pytest.raises(ValueError, match='layers: a gives .* the same layout'):
        pages([(x, Y)], CrossEntropyLossFlat(), net(), ManifoldMixUp(layers='a', **kwargs))
    for make in AlignMixUp,SnapMix:
        if len(size) == 1: continue
        with pytest.raises(ValueError, match='AlignMixUp could align|SnapMix found no layer'):
            pages([(x, Y)], CrossEntropyLossFlat(), net(), make(**{k: kwargs[k] for k in ('spatial_dims', 'channels_last')}))

@pytest.mark.parametrize('features', [16, 12])
@pytest.mark.parametrize('make', [lambda **kw: ManifoldMixUp(method=CutMix(), include_input=False, **kw),
    lambda **kw: AlignMixUp(include_input=False, **kw), SnapMix], ids=['CutMix', 'AlignMixUp', 'SnapMix'])
def test_channels_last_is_the_same_training(make, features):
    "A network whose channels are last has the losses of the one whose channels are first"
    x = torch.randn(N, 3, 16, 16)
    losses = [[page.loss for page in pages([(along(x, dim), Y)]*3, CrossEntropyLossFlat(), Pointwise(features, dim, dim),
        make(channels_last=dim == -1), lr=.1)] for dim in (1, -1)]
    close(*map(torch.stack, losses))
