"What users of mixing libraries reported, each kind with the right values by hand."
import random
import warnings
from functools import partial
from types import SimpleNamespace as NS

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import (
    SGD,
    BCEWithLogitsLossFlat,
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    FocalLossFlat,
    Learner,
    Tensor,
    nn,
    noop,
)
from fastai.callback.progress import ProgressCallback
from fastai.learner import Recorder

from fastai_mixup.all import *

N,C = 8,5
EYE,Y = torch.eye(N),torch.arange(N) % C

class Net(nn.Module):
    "Its input is the mixing matrix"
    def __init__(self, c=C):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(N, c)
    def forward(self, *xb):
        self.M = xb[0]
        return self.head(self.M)

class Keep(nn.Module):
    "Keeps what it is given; predictions have the shape `out`"
    def __init__(self, example, *out):
        super().__init__()
        self.out,self.lin = out,nn.Linear(example[0].numel(), max(torch.tensor(out).prod().int().item(), 1))
    def forward(self, x, *_):
        self.x = x.detach().as_subclass(Tensor).clone()
        return self.lin(x.flatten(1).nan_to_num(posinf=0, neginf=0)*.01).view(len(x), *self.out)

class Spy(Callback):
    order,run_valid = 60,False
    def before_fit(self): self.pages = []
    def after_loss(self):
        plan = next((cb.plan for cb in self.learn.cbs if hasattr(cb, 'plan')), None)
        M = getattr(self.learn.model, 'M', None)
        self.pages.append(NS(M=None if M is None else M.detach().clone(), pred=self.learn.pred, loss=self.learn.loss.detach(), plan=plan))

def learner(batches, loss_func, model, *cbs, n_inp=1, lr=0., valid=(), metrics=None):
    dls = DataLoaders(list(batches), list(valid), device='cpu')
    dls.n_inp = n_inp
    torch.manual_seed(0)
    learn = Learner(dls, model, loss_func, opt_func=SGD, lr=lr, cbs=[*cbs, Spy()], metrics=metrics)
    learn.remove_cbs(learn._grab_cbs(ProgressCallback))
    learn.logger = noop
    return learn

def pages(*args, **kwargs):
    learn = learner(*args, **kwargs)
    learn.fit(1)
    return learn.spy.pages
def close(a, b, tol=1e-4): torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=tol, rtol=tol)
def filled(*size): return torch.arange(N).float().view(N, *[1]*len(size)).expand(N, *size).contiguous()
def own_positions(x, kept): return (x-kept).abs() < 1e-4

# What is a map and what is none

PASTERS = dict(CutMix=CutMix, FMix=FMix, GridMix=GridMix, ResizeMix=ResizeMix, SaliencyMix=SaliencyMix,
    RandomMix=lambda: RandomMix([CutMix(), GridMix()], per='item'))
each_paster = pytest.mark.parametrize('make', PASTERS.values(), ids=PASTERS)

def averaged(make, x, t, loss):
    "The target is averaged as a whole, by the weights of the plan"
    page, = pages([(x, t)], loss, Keep(x, *t.shape[1:]), make())
    lam = page.plan.lam.view(-1, *[1]*(t.ndim-1))
    assert (lam < 1).any()
    close(page.loss, loss(page.pred, lam*t + (1-lam)*t[page.plan.index]))

@each_paster
@pytest.mark.parametrize('shape', [(24, 3, 3), (3, 3), (1, 1), (5,), (2, 7)], ids=str)
def test_what_is_no_map_is_averaged(make, shape): averaged(make, filled(3, 32, 32), torch.randn(N, *shape), nn.MSELoss())

@each_paster
def test_a_label_at_one_position(make):
    "Of a fully convolutional head: predictions (n, classes, 1, 1), labels (n, 1, 1)"
    class FCN(nn.Module):
        def __init__(self): super().__init__(); self.c = nn.Conv2d(3, C, 1)
        def forward(self, x): return self.c(x*.1).mean((2, 3), keepdim=True)
    page, = pages([(filled(3, 32, 32), Y[:,None,None])], nn.CrossEntropyLoss(), FCN(), make())
    lam,y1 = page.plan.lam,Y[page.plan.index]
    def ce(y): return F.cross_entropy(page.pred.flatten(1), y, reduction='none')
    close(page.loss, (lam*ce(Y) + (1-lam)*ce(y1)).mean())

@pytest.mark.parametrize('x,t', [(filled(1, 10), torch.randn(N, 1, 10)), (filled(3, 32, 32), torch.randn(N, 2, 4, 4)),
    (filled(1, 10), torch.randn(N, 4, 10))], ids=['forecast', 'matrix', 'several'])
def test_what_may_be_a_map_is_asked_for(x, t):
    with pytest.raises(ValueError, match="targets='paste'.*targets='average'"):
        pages([(x, t)], nn.MSELoss(), Keep(x, *t.shape[1:]), CutMix())
    averaged(partial(CutMix, targets='average'), x, t, nn.MSELoss())
    page, = pages([(x, t)], nn.MSELoss(), Keep(x, *t.shape[1:]), CutMix(targets='paste'))
    own = page.plan.mask(t.shape[2:])[:,None] > .5
    close(page.loss, F.mse_loss(page.pred, torch.where(own, t, t[page.plan.index])))

def test_ten_labels_beside_ten_time_steps():
    x,t = filled(1, 10),(torch.rand(N, 10) < .4).long()
    page, = pages([(x, t)], BCEWithLogitsLossFlat(), Keep(x, 10), CutMix())
    lam = page.plan.lam[:,None]
    close(page.loss, F.binary_cross_entropy_with_logits(page.pred, lam*t + (1-lam)*t[page.plan.index]))

# Which dimensions are positions

LAYOUTS = dict(video=((4, 3, 12, 12), dict(spatial_dims=2), (2, 3)), series=((50, 4), dict(spatial_dims=1, channels_last=True), (1,)),
    clip=((3, 4, 12, 12), dict(spatial_dims=2), (2, 3)),
               image_last=((12, 13, 3), dict(spatial_dims=2, channels_last=True), (1, 2)), flat=((12, 13), dict(spatial_dims=2), (1, 2)),
               volume=((1, 5, 12, 12), dict(spatial_dims=3), (2, 3, 4)))
POSITIONED = dict(PASTERS, SmoothMix=SmoothMix, PuzzleMix=partial(PuzzleMix, travel=None, levels=2))
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('make', POSITIONED, ids=str)
def test_layouts_that_are_said(make, layout):
    "The mask is the same for all dimensions that are no positions"
    size,kwargs,_ = LAYOUTS[layout]
    x = filled(*size)
    net = Keep(x, C)
    make = POSITIONED[make]
    mix = RandomMix([CutMix(), GridMix()], per='item', **kwargs) if make is PASTERS['RandomMix'] else make(**kwargs)
    page, = pages([(x, Y)], CrossEntropyLossFlat(), net, mix)
    # of the item at each position
    share = ((net.x - filled(*size)[page.plan.index])/(x - filled(*size)[page.plan.index]).where(x != x[page.plan.index], 1))
    if layout in ('series', 'image_last'): share = share.movedim(-1, 1)
    spatial = kwargs['spatial_dims']
    rest = share.flatten(1, -spatial-1) if share.ndim > spatial+1 else share[:,None]
    mixed = page.plan.index != torch.arange(N)
    close(rest[mixed], rest[mixed][:,:1].expand_as(rest[mixed]), 1e-3)
    close(rest[mixed].flatten(1).mean(1), page.plan.lam[mixed], 1e-3)

def test_videos_without_a_word_are_asked_for():
    x = filled(4, 3, 12, 12)
    with pytest.raises(ValueError, match='`spatial_dims=2` or `spatial_dims=3`'):
        pages([(x, Y)], CrossEntropyLossFlat(), Keep(x, C), CutMix())

@pytest.mark.parametrize('layer,kwargs', [('0', dict(spatial_dims=1, channels_last=True)), ('1', dict(spatial_dims=1, channels_last=True))])
def test_hidden_layers_of_series(layer, kwargs):
    "What a layer of a transformer gives, (n, time, features), is cut along time"
    seen = []
    class Out(nn.Module):
        def forward(self, x): seen.append(x.detach().clone()); return x.mean(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.TransformerEncoderLayer(6, 2, 8, 0., batch_first=True), Out(), nn.Linear(6, C))
    x = torch.randn(N, 20, 4)
    for n in range(2):
        seen.clear(); page = pages([(x, Y)], CrossEntropyLossFlat(), model,
            ManifoldMixUp(method=CutMix(), layers=layer, include_input=False, **kwargs))[0]
    assert page.plan.layer == layer
    if layer != '1': return
    with torch.no_grad(): own = model[1](model[0](x))
    moved = ((seen[-1]-own).abs() > 1e-5).any(2)
    same = page.plan.lam < 1
    close(1-moved[same].float().mean(1), page.plan.lam[same])

class Recurrent(nn.Module):
    def __init__(self, cell, by_state):
        super().__init__()
        self.emb,self.rnn,self.head,self.by_state = nn.Linear(4, 6),cell(6, 10, batch_first=True),nn.Linear(10, C),by_state
    def forward(self, x):
        self.out = self.emb(x)
        out,state = self.rnn(self.out)
        if not self.by_state: return self.head(out.mean(1))
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])

@pytest.mark.parametrize('cell', [nn.LSTM, nn.GRU])
@pytest.mark.parametrize('by_state', [False, True])
def test_recurrent_layers_at_defaults(cell, by_state):
    "The input and the layer before are cut along time; a layer that also gives its last state, which has no times, is none to choose"
    x = torch.randn(N, 20, 4)
    model = Recurrent(cell, by_state)
    with torch.no_grad(): own = model.emb(x)
    layers = set()
    cb = ManifoldMixUp(method=CutMix(), spatial_dims=1, channels_last=True)
    for page in pages([(x, Y)]*12, CrossEntropyLossFlat(), model, Outs(), cb):
        layers.add(page.plan.layer)
    assert layers == {'input', 'emb'}
    for layer,out,plan in model.outs:
        if layer != 'emb': continue
        stays = plan.mask((20,))[...,None] > .5
        close(out, torch.where(stays.view(N, 20, 1), own, own[plan.index]))

class Outs(Callback):
    order = 70
    def before_fit(self): self.model.outs = []
    def after_loss(self):
        plan = self.manifold_mix_up.plan
        self.model.outs.append((plan.layer, self.model.out.detach().clone(), plan))

# Marks in targets, infinities

def marked(p, t):
    m = t != -1
    return (F.binary_cross_entropy_with_logits(p, t.clamp_min(0), reduction='none')*m).sum()/m.sum()

@pytest.mark.parametrize('make', [lambda **kw: MixUp(1., fold=False, **kw),
    lambda **kw: ManifoldMixUp(1., layers='head', fold=False, include_input=True, **kw), lambda **kw: RandomMix([MixUp(1.)], **kw)])
def test_marks_in_float_targets(make):
    torch.manual_seed(0)
    t = (torch.rand(N, C) < .5).float().masked_fill(torch.rand(N, C) < .4, -1)
    page, = pages([(EYE, t)], marked, Net(), make(per='batch', targets='losses') if make(per='batch').per == 'batch'
        else make(targets='losses'))
    lam = page.plan.lam
    assert (lam == lam[0]).all() and lam[0] < 1
    close(page.loss, lam[0]*marked(page.pred, t) + (1-lam[0])*marked(page.pred, t[page.plan.index]))

@pytest.mark.parametrize('make', [lambda: CutMix(minmax=(.3, .3)), FMix, GridMix, lambda: PuzzleMix(travel=None, levels=2), ResizeMix,
    SaliencyMix, lambda: RandomMix([CutMix(), GridMix()], per='item'), lambda: CutMix(pairing=PreviousBatch()),
    lambda: CutMix(pairing=DifferentClass())])
@pytest.mark.parametrize('bad', [-torch.inf, torch.nan])
def test_pasting_selects(make, bad):
    "What is no number stays where it is, or comes along with its piece of the image"
    torch.manual_seed(0)
    x = torch.randn(N, 1, 8, 8)
    x[0,0,0,0] = bad
    for page,net in [((pages([(x, Y)]*2, lambda p,y: F.cross_entropy(p.nan_to_num(), y), n := Keep(x, C), make())[-1]), n)]:
        wrong = ~net.x.isfinite() & (torch.ones(N, 1, 8, 8, dtype=torch.bool))
        wrong[:,0,0,0] = False # where the mark of item 0 may come to, unmoved
        assert wrong.sum() <= (9 if isinstance(make, type) and make is ResizeMix else 0)

@pytest.mark.parametrize('pairing', [None, DifferentClass(), PreviousBatch()])
def test_weights_of_exactly_one_copy(pairing):
    x = torch.randn(N, 3)
    x[0] = torch.inf
    class Ones:
        def __call__(self, *a): raise AssertionError
    from dataclasses import dataclass

    from fastai_mixup.batch import Method, Plan
    from fastai_mixup.callback import MixCallback
    @dataclass
    class WholeMethod(Method):
        def plan(self, batch, perm): return Plan((torch.arange(batch.n) % 2).float(), perm)
    class Whole(MixCallback, method=WholeMethod): pass
    net = Keep(x, C)
    page = pages([(x, Y)]*2, CrossEntropyLossFlat(), net, Whole(pairing=pairing))[-1]
    plan = page.plan
    want = torch.where(plan.lam[:,None] == 1, x, x[plan.index] if pairing is None or isinstance(pairing, DifferentClass) else net.x)
    assert torch.equal(net.x, want) and not net.x.isnan().any()

@pytest.mark.parametrize('make', [lambda: CutMix(minmax=(.3, .3)), GridMix, FMix])
def test_unknown_depths(make):
    "A depth map with NaN as 'not known': only what was pasted over changes"
    torch.manual_seed(0)
    x,y,count = filled(1, 8, 8),torch.randn(N, 1, 8, 8),[]
    y[0] = torch.nan
    def loss(p, y): count.append(int(y.isnan().sum())); m = ~y.isnan(); return ((p[m]-y[m])**2).mean()
    net = Keep(x, 1, 8, 8)
    page, = pages([(x, y)], loss, net, make())
    assert count[0] == int(torch.where(own_positions(x, net.x), y, y[page.plan.index]).isnan().sum())

# Labels inside of the model

class Margin(nn.Module):
    def __init__(self, spell): super().__init__(); torch.manual_seed(2); self.w,self.spell = nn.Parameter(torch.randn(C, N)),spell
    def forward(self, x, label):
        cos = F.linear(F.normalize(x), F.normalize(self.w))
        return 8*(cos - .5*self.spell(cos, label))
def _scatter(cos, label): return torch.zeros_like(cos).scatter_(1, label.view(-1, 1), 1.)
def _index_put(cos, label):
    o = torch.zeros_like(cos)
    o[torch.arange(len(cos)),label] = 1.
    return o
SPELLINGS = dict(one_hot=lambda cos,y: F.one_hot(y, C), one_hot_float=lambda cos,y: F.one_hot(y, C).float(), compare=lambda cos,
    y: (y[:,None] == torch.arange(C)).float(), scatter=_scatter, index=_index_put, eye=lambda cos,y: torch.eye(C)[y])
@pytest.mark.parametrize('spell', SPELLINGS)
def test_margins_in_the_model(spell):
    "An error that says what to do, and does not advise `inputs=`, with which the model would train on own margins"
    with pytest.raises((ValueError, RuntimeError)) as e:
        pages([(EYE, Y, Y)], CrossEntropyLossFlat(), Margin(SPELLINGS[spell]), MixUp(1., per='batch'), n_inp=2)
    assert 'inputs=' not in str(e.value) and 'loss function' in str(e.value)

# Partners from elsewhere

def test_views_of_one_tensor_keep_apart():
    batches,seen = [torch.randn(4, 1, 3, 3) for _ in range(2)],[]
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(9, 3)
        def forward(self, a, b): seen.append((a.clone(), b.clone())); return self.l(a.flatten(1))
    pages([(o, o.mT, torch.arange(4) % 3) for o in batches], nn.CrossEntropyLoss(), Two(), MixUp(1., pairing=PreviousBatch()), n_inp=2)
    close(seen[1][0].mT, seen[1][1])
    assert not torch.equal(seen[1][0], batches[1])

def test_memory_that_a_loader_fills_anew():
    buffer = torch.zeros(4, 3)
    class Loader:
        def __len__(self): return 3
        def __iter__(self):
            for k in range(3):
                buffer.copy_(torch.eye(3)[k].expand(4, 3))
                yield buffer,torch.full((4,), k)
    rows = []
    class Look(Callback):
        order,run_valid = 25,False
        def after_loss(self): rows.append((self.learn.xb[0].clone(), self.learn.mix_up.plan))
    learn = Learner(DataLoaders(Loader(), [], device='cpu'), nn.Linear(3, 3), nn.CrossEntropyLoss(), opt_func=SGD, lr=0.,
        cbs=[MixUp(1., pairing=PreviousBatch()), Look()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    x,plan = rows[-1]
    close(x, torch.stack([torch.zeros(4), 1-plan.lam, plan.lam], 1))

@pytest.mark.parametrize('y', [[0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 0, 1, 2, 2], [1, 1, 1, 1, 0, 2, 3]], ids=str)
def test_every_two_classes_meet(y):
    y = torch.tensor(y)
    n,met = len(y),set()
    for page in pages([(torch.eye(n), y)]*150, nn.CrossEntropyLoss(), nn.Linear(n, 4), MixUp(1., pairing=DifferentClass())):
        assert ((y != y[page.plan.index]) | (page.plan.index == torch.arange(n))).all()
        met |= {(a, b) for a,b in zip(y.tolist(), y[page.plan.index].tolist()) if a != b}
    classes = set(y.tolist())
    assert met == {(a, b) for a in classes for b in classes if a != b}

# Integers that hold no values

@pytest.mark.parametrize('make', [torch.ones_like, torch.zeros_like, lambda x: x.new_ones(x.shape), lambda x: torch.full_like(x, 1),
    lambda x: torch.ones(x.shape), lambda x: x.new_full(x.shape, 2), lambda x: torch.arange(x.shape[1]).expand(x.shape)])
def test_tensors_of_the_shape_of_words(make):
    class Text(nn.Module):
        def __init__(self): super().__init__(); self.e,self.h = nn.Embedding(9, 4),nn.Linear(4, 3)
        def forward(self, x):
            m = make(x).float()
            return self.h((self.e(x)*m[...,None]).sum(1)/m.sum(1, keepdim=True).clamp_min(1))
    page, = pages([(torch.randint(9, (4, 5)), torch.arange(4) % 3)], nn.CrossEntropyLoss(), Text(), MixUp(1.))
    assert page.plan is not None

# Types and layouts

@pytest.mark.parametrize('make', [lambda **kw: MixUp(1., **kw), lambda **kw: CutMix(**kw),
    lambda **kw: RandomMix([MixUp(1.), CutMix()], per='item', **kw)])
@pytest.mark.parametrize('pairing', [None, DifferentClass(), PreviousBatch()])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_memory_format_is_kept(make, pairing, dtype):
    x,kept = torch.randn(6, 4, 8, 8).contiguous(memory_format=torch.channels_last).to(dtype),[]
    class Look(Callback):
        order,run_valid = 25,False
        def after_pred(self): kept.append((self.learn.x.is_contiguous(memory_format=torch.channels_last), self.learn.x.dtype))
    learn = learner([(x, torch.arange(6) % 3)]*2, lambda p,y: F.cross_entropy(p.float(), y),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).to(dtype), make(pairing=pairing), Look())
    learn.remove_cbs(learn._grab_cbs(Recorder))
    learn.fit(1)
    assert kept == [(True, dtype)]*2

def _boxes():
    from torchvision.tv_tensors import BoundingBoxes
    return BoundingBoxes(torch.rand(4, 4), format='XYXY', canvas_size=(8, 8))
def _points():
    from torchvision import tv_tensors
    if not hasattr(tv_tensors, 'KeyPoints'): pytest.skip('this torchvision has none')
    return tv_tensors.KeyPoints(torch.rand(4, 4, 2), canvas_size=(8, 8))
@pytest.mark.parametrize('target', [_boxes, _points])
@pytest.mark.parametrize('make', [MixUp, CutMix, ManifoldMixUp, RegMixUp])
def test_boxes_and_points_of_torchvision(target, make):
    x = torch.randn(4, 1, 8, 8)
    y = target()
    with pytest.raises(TypeError, match='points and boxes cannot be averaged'): pages([(x, y)], nn.MSELoss(), Keep(x, *y.shape[1:]), make())

@pytest.mark.parametrize('reduction', ['batchmean', 'mean', 'sum'])
def test_logarithms_of_distributions(reduction):
    p = torch.eye(3)[[0, 1, 2, 0]]*.98 + .01
    p = p/p.sum(1, keepdim=True)
    loss = nn.KLDivLoss(reduction=reduction, log_target=True)
    page, = pages([(torch.eye(4), p.log())], loss, nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), MixUp(1.))
    lam = page.plan.lam[:,None]
    close(page.loss, loss(page.pred, (lam*p + (1-lam)*p[page.plan.index]).log()))

# Accuracy

@pytest.mark.parametrize('y,loss_func', [(torch.tensor([0, 1, 1, 0, 1, 1, 1, 1]), BCEWithLogitsLossFlat()),
    (torch.tensor([[0.], [1], [1], [0], [1], [1], [1], [1]]), BCEWithLogitsLossFlat()),
                                         (torch.tensor([[0.], [1], [1], [0], [1], [1], [1], [1]]), nn.BCEWithLogitsLoss())])
def test_accuracy_of_one_logit(y, loss_func):
    "A model that always says 1, where 6 of 8 labels are 1"
    net = Net(c=1)
    nn.init.zeros_(net.head.weight); nn.init.constant_(net.head.bias, 5.)
    learn = learner([(EYE, y)], loss_func, net, MixUp(1.), metrics=[MixedAccuracy()], valid=[(EYE, y)])
    learn.recorder.train_metrics = True
    learn.fit(1)
    plan,ones = learn.spy.pages[0].plan,y.flatten().float()
    close(learn.recorder.values[-1][-1], .75)
    close(learn.recorder.values[-1][1], (plan.lam*ones + (1-plan.lam)*ones[plan.index]).mean())

def test_accuracy_of_several_labels():
    torch.manual_seed(3)
    y,net = (torch.rand(N, C) < .5).float(),Net()
    learn = learner([(EYE, y)], nn.BCEWithLogitsLoss(), net, MixUp(1.), metrics=[MixedAccuracy(thresh=.4)], valid=[(EYE, y)])
    learn.recorder.train_metrics = True
    learn.fit(1)
    page, = learn.spy.pages
    said,lam = page.pred.sigmoid() >= .4,page.plan.lam[:,None]
    close(learn.recorder.values[-1][1], (lam*(said == y) + (1-lam)*(said == y[page.plan.index])).mean())

def test_numbers_have_no_accuracy():
    with pytest.raises(TypeError, match='or a binary cross-entropy'):
        learner([(EYE, torch.randn(N, 1))], nn.MSELoss(), Net(c=1), MixUp(1.), metrics=[MixedAccuracy()],
            valid=[(EYE, torch.randn(N, 1))]).fit(1)

# Methods that run the model

class Own(nn.Module):
    "Counts its passes in every way"
    def __init__(self):
        super().__init__()
        self.c,self.h,self.n,self.log,self.rng = nn.Conv2d(1, 4, 3, padding=1),nn.Linear(4,
            3),torch.zeros(1),{'k': []},torch.Generator().manual_seed(0)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    def forward(self, x):
        if self.training: self.n += 1; self.log['k'].append(1); self.scale.data += 1; torch.rand(1, generator=self.rng)
        return self.h(self.c(x).mean((2, 3)))
@pytest.mark.parametrize('make', [lambda: ManifoldMixUp(1.), PuzzleMix, SnapMix, lambda: AlignMixUp(),
    lambda: RandomMix([PuzzleMix(), SnapMix()], per='item'), lambda: RegMixUp(method=PuzzleMix())])
def test_passes_that_leave_no_trace(make):
    model,plain = Own(),Own()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pages([(torch.randn(6, 1, 8, 8), torch.arange(6) % 3)]*3, nn.CrossEntropyLoss(), model, make())
    pages([(torch.randn(6, 1, 8, 8), torch.arange(6) % 3)]*3, nn.CrossEntropyLoss(), plain)
    assert (model.n.item(), len(model.log['k']), model.scale.item()) == (3, 3, 4) and torch.equal(model.rng.get_state(),
        plain.rng.get_state())

SHOWN = dict(mixup=lambda: MixUp(1.), random=lambda: RandomMix([CutMix(), MixUp(1.)]), reg=lambda: RegMixUp(method=CutMix()),
    hidden=lambda: ManifoldMixUp(method=CutMix(), layers=['0']), found=lambda: ManifoldMixUp(1.),
             generator=lambda: MixUp(1., generator=torch.Generator().manual_seed(5)), previous=lambda: MixUp(1., pairing=PreviousBatch()),
             remix=lambda: MixUp(1., labels=ReMix()), puzzle=PuzzleMix)
@pytest.mark.parametrize('name', SHOWN)
def test_looking_changes_nothing(name):
    data = [(torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(6) % 3) for i in range(3)]
    class Show(Callback):
        order,run_valid = 60,False
        def after_batch(self): self.learn.show_mixed_batch(max_n=1); plt.close('all')
    weights = []
    for cbs in (),(Show(),):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
        learner(data, nn.CrossEntropyLoss(), model, SHOWN[name](), *cbs, lr=.1).fit(2)
        weights.append(model[2].weight.detach().clone())
    assert torch.equal(*weights)

# Random architecture

class Block(nn.Module):
    def __init__(self): super().__init__(); self.f = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    def forward(self, x): return x + self.f(x)
class Dropped(nn.Module):
    "Skips blocks at random in training"
    def __init__(self, chance, rate):
        super().__init__(); self.b,self.h,self.chance,self.rate = nn.ModuleList([Block() for _ in range(6)]),nn.Linear(8, 3),chance,rate
    def forward(self, x):
        for b in self.b:
            if not self.training or self.chance() > self.rate: x = b(x)
        return self.h(x)
def _python(): return random.random()
def _numpy(): return np.random.rand()
def _bernoulli(): return torch.bernoulli(torch.tensor(.5)).item()
CHANCES = dict(torch=lambda: torch.rand(()), item=lambda: torch.rand([]).item(), one=lambda: torch.rand(1),
    uniform=lambda: torch.empty(1).uniform_(), bernoulli=_bernoulli, python=_python, numpy=_numpy,
    whole=lambda: torch.randint(0, 100, (1,)).item()/100, high=lambda: torch.randint(high=100, size=(1,)).item()/100,
    python_whole=lambda: random.randint(0, 99)/100, python_range=lambda: random.randrange(100)/100,
    python_between=lambda: random.uniform(-5., 5.)/10+.5, numpy_between=lambda: np.random.uniform(0, 10)/10,
    python_choice=lambda: random.choice([0, 1]),
    numpy_whole=lambda: np.random.randint(100)/100, numpy_choice=lambda: np.random.choice([0, 1]))
@pytest.mark.parametrize('rate', [.05, .5])
@pytest.mark.parametrize('chance', CHANCES)
def test_layers_that_are_skipped_at_random(chance, rate):
    def fit(**kwargs):
        torch.manual_seed(0)
        learner([(torch.randn(6, 8), torch.arange(6) % 3)]*20, nn.CrossEntropyLoss(), Dropped(CHANCES[chance], rate),
            ManifoldMixUp(1., **kwargs), lr=.1).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit()
    with pytest.raises(ValueError, match="'b.2' is not called in every forward pass"): fit(layers='b.2')

# Fits in which nothing is mixed

@pytest.mark.parametrize('cb,warns', [(lambda: MixUp(start=5), True), (lambda: MixUp(p=0), True), (lambda: MixUp(0), True),
    (lambda: MixUp(stop=0), True), (lambda: RandomMix([MixUp(start=3), CutMix(p=0)]), True), (lambda: MixUp(start=1), False),
                                      (lambda: MixUp(lambda pct: 0. if pct < .7 else 1.), False), (lambda: MixUp(p=.01), False),
                                      (lambda: MixUp(start=.99), True), (lambda: MixUp(start=.8), False),
                                      (lambda: RandomMix([MixUp(start=3), MixUp()]), False)])
def test_a_fit_that_mixes_nothing_warns(cb, warns):
    learn = learner([(EYE, Y)]*3, nn.CrossEntropyLoss(), Net(), cb())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(2)
    assert any('mixes no batch of this training run of 2 epoch(s)' in str(w.message) for w in said) == warns

@pytest.mark.parametrize('pairing,warns', [(None, True), (PreviousBatch(), False)])
def test_batches_of_one_item_warn(pairing, warns):
    from fastai.data.load import DataLoader
    dls = DataLoaders(DataLoader([*zip(EYE, Y)], bs=1, num_workers=0), [])
    learn = Learner(dls, Net(), nn.CrossEntropyLoss(), cbs=MixUp(1., pairing=pairing))
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(1)
    assert any('mixes no batch' in str(w.message) for w in said) == warns

# Losses

@pytest.mark.parametrize('loss_func', [nn.NLLLoss(), nn.MultiMarginLoss(), FocalLossFlat(), nn.CrossEntropyLoss(), LabelSmoothingCE(),
    CrossEntropyLossFlat()], ids=lambda o: type(o).__name__)
def test_one_class(loss_func):
    page, = pages([(EYE, torch.zeros(N).long())], loss_func, Net(c=1), MixUp(1.))
    close(page.loss, loss_func(page.pred, torch.zeros(N).long()))

@pytest.mark.parametrize('kwargs,reduce', [(dict(size_average=False), 'sum'), (dict(size_average=True), 'mean'),
    (dict(reduction='sum'), 'sum')])
def test_former_names_of_the_reduction(kwargs, reduce):
    page, = pages([(EYE, Y)], partial(F.cross_entropy, **kwargs), Net(), MixUp(1.))
    lam = page.plan.lam
    def ce(y): return F.cross_entropy(page.pred, y, reduction='none')
    close(page.loss, getattr(lam*ce(Y) + (1-lam)*ce(Y[page.plan.index]), reduce)())

class Remembers(nn.Module):
    "A loss with a running mean, which it subtracts"
    def __init__(self): super().__init__(); self.seen,self.mean = [],0.
    def forward(self, p, y):
        loss = F.cross_entropy(p, y)
        self.seen.append(y.clone())
        self.mean = .9*self.mean + .1*loss.item()
        return loss
class Noisy(nn.Module):
    "A loss that draws random numbers, for both targets the same ones"
    def __init__(self): super().__init__(); self.drawn = []
    def forward(self, p, y):
        self.drawn.append(torch.rand(3))
        return F.cross_entropy(p + .1*self.drawn[-1].sum(), y) + self.drawn[-1].sum()

def test_a_loss_with_a_memory_sees_item_and_partner():
    loss = Remembers()
    page, = pages([(EYE, Y)], loss, Net(), MixUp(1.))
    assert len(loss.seen) == 2 and torch.equal(loss.seen[0], Y) and torch.equal(loss.seen[1], Y[page.plan.index])

def test_a_loss_that_draws_random_numbers():
    loss,state = Noisy(),[]
    class State(Callback):
        order = 55
        def after_loss(self): state.append(torch.get_rng_state())
    pages([(EYE, Y)]*2, loss, Net(), MixUp(1.), State())
    once = Noisy()
    pages([(EYE, Y)]*2, once, Net(), State())
    assert len(loss.drawn) == 4 and all(torch.equal(a, b) for a,b in zip(loss.drawn[::2], loss.drawn[1::2]))
    assert all(torch.equal(a, b) for a,b in zip(loss.drawn[::2], once.drawn)) and all(torch.equal(a, b) for a,
        b in zip(state[:2], state[2:]))

def test_rows_that_are_no_distributions_warn():
    loss = LabelSmoothingCE()
    for y,warns in (torch.eye(3)[[0, 1]], False), (torch.tensor([[1., 1, 0], [0, 0, 1]]), True):
        loss.checked = False
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            loss(torch.randn(2, 3), y), loss(torch.randn(2, 3), y)
        assert len([w for w in said if 'BCEWithLogitsLossFlat' in str(w.message)]) == warns

def test_a_learner_that_takes_its_loss_by_itself():
    class Alone(Learner):
        def _do_one_batch(self):
            self.pred = self.model(*self.xb)
            self('after_pred')
            self.loss_grad = F.cross_entropy(self.pred, Y)
            self.loss = self.loss_grad.clone()
            self('after_loss')
    learn = Alone(DataLoaders([(EYE, Y)], []), Net(), nn.CrossEntropyLoss(), cbs=MixUp())
    with learn.no_bar(), learn.no_logging(), pytest.raises(RuntimeError, match=r'its loss was not taken by `learn.loss_func'): learn.fit(1)

# Messages

@pytest.mark.parametrize('make,said', [
    (lambda: MixUp(prob=.5), "MixUp has no parameter 'prob': did you mean 'p'"),
    (lambda: CutMix(beta=1.), "CutMix has no parameter 'beta': did you mean 'alpha'"),
    (lambda: RandomMix([MixUp(), CutMix()], p=[.3, .7]), 'p must be a number from 0 to 1 .*weights'),
    (lambda: MixUp(1e12), r'a positive number \(1e-9 to 1e9\)')])
def test_messages_name_the_remedy(make, said):
    with pytest.raises((TypeError, ValueError), match=said): make()

def test_a_dict_of_settings():
    learn = learner([(EYE, Y)], nn.CrossEntropyLoss(), Net(), valid=[(EYE, Y)])
    with pytest.raises(TypeError, match='such as the values of the dict'): learn.mix_find({'a': .1})

def test_two_that_mix_are_named():
    import fastai.callback.mixup as stock
    with pytest.raises(ValueError, match="fastai's MixUp and fastai_mixup's CutMix cannot share a Learner.*Keep one"):
        learner([(EYE, Y)], CrossEntropyLossFlat(), Net(), stock.MixUp(), CutMix()).fit(1)

def test_imported_in_the_other_order():
    import fastai.callback.mixup as stock
    learn = learner([(EYE, Y)], CrossEntropyLossFlat(), Net(), stock.MixUp())
    with pytest.raises(ValueError, match="This one has fastai's MixUp: import fastai_mixup after fastai"): learn.show_mixed_batch()

# Images of any number of channels

@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5, 12])
def test_channels_are_chosen(channels):
    x = torch.rand(4, channels, 16, 16)
    learn = learner([(x, torch.arange(4))], CrossEntropyLossFlat(), nn.Sequential(nn.Flatten(), nn.Linear(channels*256, 4)), MixUp(1.))
    axs = learn.show_mixed_batch()
    image = axs[0].images[0].get_array()
    assert image.shape[:2] == (16, 16) and image.ndim == (3 if channels > 2 else 2) or image.shape[2] == 1
    assert axs._ipython_display_() is None
    plt.close('all')

def test_which_method_was_drawn_and_when_it_mixes():
    x = torch.rand(4, 3, 16, 16)
    def title(cb):
        learn = learner([(x, torch.arange(4))], CrossEntropyLossFlat(), nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), cb)
        said = learn.show_mixed_batch()[0].figure._suptitle.get_text().replace('\n', ' ')
        plt.close('all')
        return said
    assert 'by CutMix' in title(RandomMix([CutMix()])) and 'not mixed; try at=' in title(MixUp(start=.5))

def test_default_layers_far_off_warn():
    class Deep(nn.Module):
        "Only its last hidden layer is crossed by every path"
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c,self.d = (nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]) for _ in range(4))
            self.last,self.head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),nn.Linear(8, C)
        def forward(self, x): return self.head(self.last(self.a(x)+self.b(x)+self.c(x)+self.d(x)+x))
    learn = learner([(torch.randn(N, 8), Y)], CrossEntropyLossFlat(), Deep(), ManifoldMixUp(1.))
    with pytest.warns(UserWarning, match='no layer near a quarter or a half of its depth'): learn.fit(1)

# PuzzleMix does something at its defaults

@pytest.mark.parametrize('fold', [False, True])
def test_puzzles_keep_the_share_that_was_drawn(fold):
    from sklearn.datasets import load_sample_images
    torch.manual_seed(0)
    photos = [torch.tensor(o).permute(2, 0, 1).float()/255 for o in load_sample_images().images]
    def crop(i):
        o = photos[i % 2]
        a,b = torch.randint(o.shape[1]-200, ()),torch.randint(o.shape[2]-200, ())
        return F.interpolate(o[None,:,a:a+200,b:b+200], (64, 64), mode='area')[0]
    x = torch.stack([crop(i) for i in range(16)])
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 2))
    lam = torch.cat([p.plan.lam for p in pages([(x, torch.arange(16) % 2)]*12, nn.CrossEntropyLoss(), model, PuzzleMix(fold=fold), lr=.05)])
    assert ((lam < .02) | (lam > .98)).float().mean() < .2
    close((lam*128).round()/128, lam) # of 64 blocks and half blocks
    if fold: assert (lam > .49).all()

# What the option `targets` says

def test_targets_are_told_one_by_one():
    "A list says of each target how it is mixed: here a table that may be a map, and a mask"
    x,table,mask = filled(1, 10),torch.randn(N, 4, 10),torch.randint(C, (N, 10))
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Conv1d(1, 4, 1),nn.Conv1d(1, C, 1)
        def forward(self, x): self.x = x.clone(); return self.a(x*.1),self.b(x*.1)
    def loss(pred, t, y): return F.mse_loss(pred[0], t) + F.cross_entropy(pred[1], y)
    learn = learner([(x, table, mask)], loss, Two(), CutMix(targets=['average', 'paste']))
    learn.fit(1)
    page, = learn.spy.pages
    lam,index,own = page.plan.lam.view(-1, 1, 1),page.plan.index,own_positions(x, learn.model.x)
    close(page.loss, F.mse_loss(page.pred[0], lam*table + (1-lam)*table[index])
        + F.cross_entropy(page.pred[1], torch.where(own[:,0], mask, mask[index])))

def test_an_option_for_each_target():
    x = filled(1, 10)
    with pytest.raises(ValueError, match='targets must hold an option for each target'):
        pages([(x, torch.randn(N, 3), torch.randn(N, 3))], lambda p,t,u: F.mse_loss(p, t) + F.mse_loss(p, u), Keep(x, 3),
            CutMix(targets=['average']))

def test_indices_have_no_average():
    "`targets='average'` of class indices is the average of their losses"
    page, = pages([(EYE, Y)], CrossEntropyLossFlat(), Net(), MixUp(1., fold=False, targets='average'))
    lam,y1 = page.plan.lam,Y[page.plan.index]
    def ce(y): return F.cross_entropy(page.pred, y, reduction='none')
    close(page.loss, (lam*ce(Y) + (1-lam)*ce(y1)).mean())

@pytest.mark.parametrize('make', [MixUp, lambda **kw: ManifoldMixUp(**kw), lambda **kw: RegMixUp(**kw)])
def test_pasting_needs_a_mask(make):
    with pytest.raises(ValueError, match="targets='paste' needs a method with a mask"): make(targets='paste')

def test_integers_of_unknown_meaning_are_asked_for():
    "(n, T) integers beside T steps and a loss of one's own: labels of the steps, or several labels of an item"
    x,t = filled(1, 10),(torch.rand(N, 10) < .4).long()
    def own(p, y): return F.binary_cross_entropy_with_logits(p, y.float())
    with pytest.raises(ValueError, match="targets='paste'.*targets='average'"): pages([(x, t)], own, Keep(x, 10), CutMix())
    page, = pages([(x, t)], own, Keep(x, 10), CutMix(targets='paste'))
    steps = page.plan.mask((10,)) > .5
    close(page.loss, own(page.pred, torch.where(steps, t, t[page.plan.index])))

@pytest.mark.parametrize('kwargs', [dict(channels_last=True), dict(stateful=True), dict(targets='average'), dict(spatial_dims=2)], ids=str)
def test_what_belongs_to_the_callback_around(kwargs):
    with pytest.raises(ValueError, match='must leave.*to the callback around'): RandomMix([CutMix(**kwargs), MixUp()])

# Labels as inputs, known by their values

@pytest.mark.parametrize('as_input', [lambda y: y.clone(), lambda y: y[:,None],
    lambda y: F.one_hot(y, C), lambda y: F.one_hot(y, C).float()],
    ids=['index', 'column', 'one-hot', 'float one-hot'])
def test_labels_among_the_inputs(as_input):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(N, C)
        def forward(self, x, label): return self.l(x)
    batch = [(EYE, as_input(Y), Y)]
    with pytest.raises(ValueError, match='margin'): pages(batch, CrossEntropyLossFlat(), Two(), MixUp(1.), n_inp=2)
    pages([(EYE, torch.arange(N).float(), Y)], CrossEntropyLossFlat(), Two(), MixUp(1.), n_inp=2) # other numbers are no labels

# Losses that are taken elsewhere, or mean something else

def test_no_loss_is_asked_for():
    "A Learner that takes its loss without `after_loss` and without `yb`"
    class Own(Learner):
        def _do_one_batch(self):
            self.pred = self.model(*self.xb)
            self.loss_grad = F.cross_entropy(self.pred, Y)
            self.loss = self.loss_grad.clone()
            self.loss_grad.backward()
    learn = Own(DataLoaders([(EYE, Y)], [], device='cpu'), Net(), CrossEntropyLossFlat(), cbs=MixUp(1.))
    learn.remove_cbs([*learn._grab_cbs(ProgressCallback), *learn._grab_cbs(Recorder)])
    with pytest.raises(RuntimeError, match='its loss was not taken'): learn.fit(1)
    assert type(learn.loss_func) is CrossEntropyLossFlat

SIGNED = dict(hinge=(F.hinge_embedding_loss, nn.HingeEmbeddingLoss()), soft=(F.soft_margin_loss, nn.SoftMarginLoss()))
@pytest.mark.parametrize('loss_func', [o for pair in SIGNED.values() for o in pair], ids=lambda o: getattr(o, '__name__', str(o)))
def test_functional_losses_of_signs(loss_func):
    "A target of 1 or -1 is a label, not a number: the losses are averaged"
    t = torch.where(torch.arange(N) % 2 == 0, 1., -1.)
    each = partial(next(f for pair in SIGNED.values() for f in pair[:1] if loss_func in pair), reduction='none')
    class One(Net):
        def __init__(self): super().__init__(1)
        def forward(self, x): return super().forward(x)[:,0]
    page, = pages([(EYE, t)], loss_func, One(), MixUp(1.))
    lam,t1 = page.plan.lam,t[page.plan.index]
    close(page.loss, (lam*each(page.pred, t) + (1-lam)*each(page.pred, t1)).mean())

@pytest.mark.parametrize('reduction', ['batchmean', 'sum', 'mean'])
@pytest.mark.parametrize('make', [lambda: MixUp(1.), lambda: CutMix(1.)])
def test_distributions_keep_their_reduction(make, reduction):
    "KL divergence of probabilities and of their logarithms: distributions are averaged, and pasted where they are maps"
    x,t = filled(1, 6, 6),torch.rand(N, C, 6, 6).softmax(1)
    def loss(p, y, log_target): return F.kl_div(p.log_softmax(1), y, reduction=reduction, log_target=log_target)
    class Maps(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(3); self.c = nn.Conv2d(1, C, 1)
        def forward(self, x): self.x = x.detach().clone(); return self.c(x*.1).log_softmax(1)
    for log in False, True:
        net = Maps()
        page, = pages([(x, t.log() if log else t)], nn.KLDivLoss(reduction=reduction, log_target=log), net, make())
        other,lam = t[page.plan.index],page.plan.lam.view(-1, 1, 1, 1)
        want = torch.where(own_positions(x, net.x), t, other) if isinstance(make(), CutMix) else lam*t + (1-lam)*other
        close(page.loss, loss(page.pred, want, False))

class Summed(Callback):
    "Some losses are one for each item"
    order = 20
    def after_loss(self): self.learn.loss_grad,self.learn.loss = self.loss_grad.sum(),self.loss.sum()

@pytest.mark.parametrize('kwargs,reduction', [(dict(size_average=False), 'sum'), (dict(reduce=False), 'none'),
    (dict(size_average=True, reduction='sum'), 'mean')], ids=str)
def test_old_spellings_of_the_reduction(kwargs, reduction):
    page, = pages([(EYE, Y)], partial(F.cross_entropy, **kwargs), Net(), MixUp(1.), Summed())
    lam,y1 = page.plan.lam,Y[page.plan.index]
    def ce(y): return F.cross_entropy(page.pred, y, reduction='none')
    each = lam*ce(Y) + (1-lam)*ce(y1)
    close(page.loss, each.mean() if reduction == 'mean' else each.sum())

# More of pairings, copies, points

def test_marked_targets_are_near_nothing():
    "NaN in a target of `NearTarget` leaves the distances of the others as they are"
    t = torch.arange(8.).view(8, 1)
    marked = torch.cat([t, torch.full((1, 1), torch.nan)])
    x = torch.eye(9)
    page, = pages([(x, marked)], lambda p,y: (p - y.nan_to_num()).square().mean(), Keep(x, 1), MixUp(1., pairing=NearTarget(.05)))
    near = (page.plan.index[:8] - torch.arange(8)).abs()
    assert (near <= 2).all()

def test_a_counter_in_a_model_is_put_back():
    from collections import Counter
    class Counts(Net):
        def __init__(self): super().__init__(); self.seen,self.l1 = Counter(a=1),nn.Linear(N, N)
        def forward(self, x): self.seen['n'] += 1; return super().forward(self.l1(x))
    net = Counts()
    pages([(EYE, Y)], CrossEntropyLossFlat(), net, ManifoldMixUp(1.))
    assert net.seen == Counter(a=1, n=1)

@pytest.mark.parametrize('name', ['BoundingBoxes', 'KeyPoints', 'TensorPoint'])
def test_points_are_refused_wherever_they_are(name):
    "Also those of a subclass, and among the inputs"
    cls = type('Own', (type(name, (Tensor,), {}),), {})
    points = torch.rand(N, 4).as_subclass(cls)
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(N, 4)
        def forward(self, x, p=None): return self.l(x)
    for batch,n_inp in ((EYE, points), 1),((EYE, points, torch.rand(N, 4)), 2):
        with pytest.raises((TypeError, ValueError), match='points|boxes|is a Own, which cannot be mixed'):
            pages([batch], lambda p,y: (p-y.as_subclass(Tensor)).abs().mean(), Two(), MixUp(1.), n_inp=n_inp)

# Accuracy that goes with the loss

def test_accuracy_of_one_output_needs_a_meaning():
    def own(p, y): return (p[:,0] - y).square().mean()
    with pytest.raises(TypeError, match='cannot know what one output for each label means'):
        learner([(EYE, Y % 2)], own, Net(1), MixUp(1.), metrics=[MixedAccuracy()], valid=[(EYE, Y % 2)]).fit(1)

@pytest.mark.parametrize('given,message', [(lambda: MixUp(mix_prob=.5), "'p'|`p`"), (lambda: RandomMix([MixUp(), CutMix()], probs=[.5, .5]),
    'weights')])
def test_names_of_other_libraries(given, message):
    with pytest.raises(TypeError, match=message): given()
