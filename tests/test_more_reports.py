"More of the kinds that users reported: variants, each with the right value by hand."
import random
import re
import warnings
from functools import partial
from types import SimpleNamespace as NS

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, MSELossFlat, Tensor, nn
from test_reports import EYE, Block, C, Keep, N, Net, Y, close, filled, learner, pages

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

# What is a map and what is none

def step_shares(page): return page.plan.mask((20,))

@pytest.mark.parametrize('loss', [nn.MSELoss(), lambda p,y: F.l1_loss(p, y), MSELossFlat()], ids=['torch', 'own', 'fastai'])
def test_numbers_beside_as_many_steps_are_asked_for(loss):
    "One number for each time step, or 20 numbers of an item: the shape does not tell"
    x,t = filled(3, 20),torch.randn(N, 20)
    with pytest.raises(ValueError, match="targets='paste'.*targets='average'"): pages([(x, t)], loss, Keep(x, 20), CutMix())
    for targets in 'paste','average':
        page, = pages([(x, t)], loss, Keep(x, 20), CutMix(targets=targets))
        own = step_shares(page) if targets == 'paste' else page.plan.lam[:,None]
        close(page.loss, loss(page.pred, own*t + (1-own)*t[page.plan.index]))

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), LabelSmoothingCE(), BCEWithLogitsLossFlat(),
    nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss()], ids=lambda o: type(o).__name__)
def test_rows_of_classes_beside_as_many_steps(loss):
    "Soft labels and several labels of an item are no maps, even where there are as many classes as time steps"
    x,t = filled(3, 20),torch.rand(N, 20).softmax(1)
    page, = pages([(x, t)], loss, Keep(x, 20), CutMix())
    lam = page.plan.lam[:,None]
    close(page.loss, loss(page.pred, lam*t + (1-lam)*t[page.plan.index]))

@pytest.mark.parametrize('size', [(8, 8), (2, 2), (16, 16), (4, 4)], ids=str)
@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(axis=1)], ids=['torch', 'fastai'])
def test_tables_of_classes_are_asked_for(size, loss):
    "A board of 8 x 8 fields, or a coarse segmentation"
    x,y = filled(3, 32, 32),torch.randint(C, (N, *size))
    with pytest.raises(ValueError, match="targets='paste'.*targets='average'"): pages([(x, y)], loss, Keep(x, C, *size), CutMix())
    for targets in 'paste','average','losses':
        page, = pages([(x, y)], loss, Keep(x, C, *size), CutMix(targets=targets))
        own = (page.plan.mask(size) >= .5).float() if targets == 'paste' else page.plan.lam.view(N, 1, 1)
        def ce(y): return F.cross_entropy(page.pred, y, reduction='none')
        close(page.loss, (own*ce(y) + (1-own)*ce(y[page.plan.index])).mean())

@pytest.mark.parametrize('dtype', [torch.long, torch.bool])
def test_adjacency_matrices_are_asked_for(dtype):
    x,y = filled(3, 32, 32),(torch.rand(N, 8, 8) < .3).to(dtype)
    def own(p, y): return F.binary_cross_entropy_with_logits(p, y.float())
    with pytest.raises(ValueError, match="targets='paste'.*targets='average'"): pages([(x, y)], own, Keep(x, 8, 8), CutMix())

@pytest.mark.parametrize('size', [(16, 16), (8, 8)], ids=str)
def test_coarse_numbers_without_channels_are_asked_for(size):
    "A depth or density map of half the size, or a matrix of pairs"
    x,t = filled(3, 32, 32),torch.randn(N, *size)
    with pytest.raises(ValueError, match="targets='paste'.*targets='average'"): pages([(x, t)], nn.MSELoss(), Keep(x, *size), CutMix())
    for targets in 'paste','average':
        page, = pages([(x, t)], nn.MSELoss(), Keep(x, *size), CutMix(targets=targets))
        own = page.plan.mask(size) if targets == 'paste' else page.plan.lam.view(N, 1, 1)
        close(page.loss, F.mse_loss(page.pred, own*t + (1-own)*t[page.plan.index]))

@pytest.mark.parametrize('size', [(2, 3), (3, 3), (4, 4)], ids=str)
def test_matrices_of_transformations_are_averaged(size):
    x,t = filled(3, 32, 32),torch.randn(N, *size)
    page, = pages([(x, t)], nn.MSELoss(), Keep(x, *size), CutMix())
    lam = page.plan.lam.view(N, 1, 1)
    close(page.loss, F.mse_loss(page.pred, lam*t + (1-lam)*t[page.plan.index]))

@pytest.mark.parametrize('dim', [1, -1])
def test_logarithms_of_distributions_in_a_loss_of_ones_own(dim):
    t = torch.randn(N, 3, C).mul(3).log_softmax(dim)
    def loss(p, t): return F.kl_div(p.view(N, 3, C).log_softmax(dim), t, reduction='batchmean', log_target=True)
    page, = pages([(EYE, t)], loss, Net(c=3*C), MixUp(1.))
    lam = page.plan.lam.view(N, 1, 1)
    close(page.loss, loss(page.pred, (lam*t.exp() + (1-lam)*t[page.plan.index].exp()).log()))

@pytest.mark.parametrize('cast', [lambda y: y.float(), lambda y: y.double()[:,None], lambda y: y.int()])
def test_labels_inside_of_the_model_as_numbers(cast):
    class Margin(Net):
        def forward(self, x, label): return super().forward(x) - .5*F.one_hot(label.long().flatten(), N)[:,:C]
    with pytest.raises(ValueError, match='These are the targets'):
        pages([(EYE, cast(Y), Y)], CrossEntropyLossFlat(), Margin(), MixUp(1.), n_inp=2)

# Marks in the targets of an accuracy

def accuracy_of(loss_func, x, y, metric, net, mix):
    learn = learner([(x, y)], loss_func, net, mix, metrics=[metric], valid=[(x, y)])
    learn.fit(1)
    with torch.no_grad(): return learn.recorder.values[-1][-1],learn.model(x)

@pytest.mark.parametrize('mark', [-1, 255, -100])
@pytest.mark.parametrize('make', [CrossEntropyLossFlat, nn.CrossEntropyLoss, LabelSmoothingCE, partial(partial, F.cross_entropy)],
    ids=['fastai', 'torch', 'smoothing', 'function'])
def test_what_the_loss_ignores_does_not_count(make, mark):
    y = torch.where(torch.arange(N) % 3 == 0, mark, Y)
    found,pred = accuracy_of(make(ignore_index=mark), EYE, y, MixedAccuracy(), Net(), MixUp(1.))
    close(found, (pred.argmax(1) == y)[y != mark].float().mean())

def test_an_ignored_class_of_masks():
    x,y = filled(3, 8, 8),torch.randint(C, (N, 8, 8))
    y[:,:4] = 255
    found,pred = accuracy_of(CrossEntropyLossFlat(axis=1, ignore_index=255), x, y, MixedAccuracy(axis=1), Keep(x, C, 8, 8), CutMix())
    close(found, (pred.argmax(1) == y)[y != 255].float().mean())

@pytest.mark.parametrize('mark,metric', [(-1., MixedAccuracy(ignore_index=-1)), (torch.nan, MixedAccuracy())])
def test_marks_in_several_labels(mark, metric):
    y = (torch.rand(N, C) < .5).float().masked_fill(torch.rand(N, C) < .4, mark)
    found,pred = accuracy_of(BCEWithLogitsLossFlat(), EYE, y, metric, Net(), MixUp(1., targets='losses'))
    known = (y == 0) | (y == 1)
    close(found, ((pred > 0) == (y > .5))[known].float().mean())

# Infinities in an average

def blended(x, w, other):
    "0 parts of an infinity are none, and infinities of both signs are no number"
    return torch.where(w == 1, x, torch.where(w == 0, other, x*w + other*(1-w)))

def test_infinities_that_fade():
    x = torch.randn(N, 1, 20).masked_fill(torch.rand(N, 1, 20) < .2, -torch.inf)
    net = Keep(x, C)
    page, = pages([(x, Y)], lambda p,y: F.cross_entropy(p.nan_to_num(), y), net, SmoothMix())
    close(net.x.nan_to_num(neginf=-9.), blended(x, page.plan.mask((20,))[:,None], x[page.plan.index]).nan_to_num(neginf=-9.))

@pytest.mark.parametrize('make', [lambda: MixUp(1., fold=False), lambda: MixUp(1., pairing=DifferentClass()),
    lambda: MixUp(1., per='batch')])
@pytest.mark.parametrize('size', [20, 20000])
def test_infinities_averaged_by_items(make, size):
    x = torch.randn(N, size).masked_fill(torch.rand(N, size) < .2, -torch.inf)
    class Sees(nn.Linear):
        def forward(self, x):
            self.x = x
            return super().forward(x[:,:20].clamp_min(-9))
    page, = pages([(x, Y)], CrossEntropyLossFlat(), net := Sees(20, C), make())
    close(net.x.clamp_min(-9), blended(x, page.plan.lam[:,None], x[page.plan.index]).clamp_min(-9))

@pytest.mark.parametrize('gradients', [False, True])
def test_infinities_are_not_salient(gradients):
    x = torch.rand(N, 1, 16, 16)
    x[0,0,0,0] = -torch.inf
    net = nn.Sequential(nn.Hardtanh(), nn.Flatten(), nn.Linear(256, C))
    net.register_forward_pre_hook(lambda _,xb: seen.append(xb[0]))
    seen = []
    pages([(x, Y)], CrossEntropyLossFlat(), net, GuidedMixup(gradients=gradients))
    assert not seen[-1].isnan().any() and 1 <= seen[-1].isinf().sum() <= 2

def test_an_infinite_loss_stays_one():
    def loss(p, y): return torch.where(y == 0, torch.inf, 1.).sum() + 0*p.sum()
    for page in pages([(EYE, torch.arange(N) % 2)]*5, loss, Net(), MixUp(1., per='batch')): assert page.loss == torch.inf

# Layers that are skipped by vectors of draws, and by generators of a model's own

class DroppedAtOnce(nn.Module):
    "Draws once for all of its blocks, in training"
    def __init__(self, draw):
        super().__init__()
        self.b,self.h,self.draw = nn.ModuleList([Block() for _ in range(6)]),nn.Linear(8, 3),draw
        self.rng,self.kept = np.random.default_rng(0),NS(state=np.random.RandomState(0), python=random.Random(0))
    def forward(self, x):
        for b,o in zip(self.b, self.draw(self) if self.training else [1.]*6):
            if o > .1: x = b(x)
        return self.h(x)
DRAWS = dict(torch=lambda m: torch.rand(6), like=lambda m: torch.rand_like(torch.ones(6)), uniform=lambda m: torch.empty(6).uniform_(),
    bernoulli=lambda m: torch.bernoulli(torch.full((6,), .9)), whole=lambda m: torch.randint(0, 10, (6,))/10,
    numpy=lambda m: np.random.rand(6), numpy_uniform=lambda m: np.random.uniform(size=6),
    numpy_whole=lambda m: np.random.randint(0, 10, 6)/10,
    generator=lambda m: m.rng.random(6), generator_singly=lambda m: [m.rng.random() for _ in range(6)],
    state=lambda m: m.kept.state.rand(6), python=lambda m: [m.kept.python.random() for _ in range(6)])
@pytest.mark.parametrize('draw', DRAWS)
def test_layers_skipped_by_vectors_of_draws(draw):
    def fit(**kwargs):
        torch.manual_seed(0)
        pages([(torch.randn(6, 8), torch.arange(6) % 3)]*40, nn.CrossEntropyLoss(), DroppedAtOnce(DRAWS[draw]), ManifoldMixUp(1., **kwargs),
            lr=.1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit()
    with pytest.raises(ValueError, match="'b.2' is not called in every forward pass"): fit(layers='b.2')

# Passes that leave no trace in objects of a model's own

class Normaliser:
    "Not a module"
    def __init__(self): self.norm,self.n,self.log,self.rng = nn.BatchNorm2d(4),torch.zeros(1),[],np.random.default_rng(3)
    def __call__(self, x):
        self.n,_ = self.n+1,self.rng.random()
        self.log.append(1)
        return self.norm(x)
    def state(self): return float(self.n),len(self.log),int(self.norm.num_batches_tracked),self.norm.running_mean,self.rng.random()

class Holds(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.c,self.h = nn.Conv2d(1, 4, 3, padding=1),nn.Linear(4, 3)
        self.held,self.get = how(Normaliser())
    def forward(self, x): return self.h(self.get(self.held)(self.c(x)).mean((2, 3)))
HOLDS = dict(attribute=lambda o: (o, lambda o: o), list=lambda o: ([o], lambda o: o[0]), dict=lambda o: (dict(a=o), lambda o: o['a']),
    namespace=lambda o: (NS(a=NS(b=o)), lambda o: o.a.b))
@pytest.mark.parametrize('make', [lambda: ManifoldMixUp(1., include_input=True), PuzzleMix, SnapMix],
    ids=["ManifoldMixUp", "PuzzleMix", "SnapMix"])
@pytest.mark.parametrize('how', HOLDS)
def test_passes_leave_no_trace_in_objects(how, make):
    data,states = [(torch.randn(6, 1, 8, 8), torch.arange(6) % 3)]*3,[]
    for cbs in [],[make()]:
        model = Holds(HOLDS[how])
        pages(data, nn.CrossEntropyLoss(), model, *cbs)
        states.append(model.get(model.held).state())
    a,b = states
    assert a[:3] == b[:3] == (3., 3, 3) and a[4] == b[4]

# Masks made of integers hold no values of theirs

def _written(x):
    m = torch.ones_like(x)
    m[x == 0] = 0
    return m
MASKS = dict(where=lambda x: torch.where(x == 0, 0, 1), filled=lambda x: torch.ones_like(x).masked_fill(x == 0, 0),
    filled_new=lambda x: x.new_ones(x.shape).masked_fill(x == 0, 0), filled_in_place=lambda x: torch.ones_like(x).masked_fill_(x == 0, 0),
    written=_written, chosen=lambda x: torch.where(x != 0, torch.ones_like(x), torch.zeros_like(x)),
    product=lambda x: torch.ones_like(x)*(x != 0), sign=lambda x: x.sign(), compared=lambda x: (x != 0).long())
class Pooled(nn.Module):
    def __init__(self, mask, embed_mask=False):
        super().__init__()
        torch.manual_seed(0)
        self.e,self.h,self.mask,self.kinds = nn.Embedding(9, 4),nn.Linear(4, 3),mask,nn.Embedding(2, 4) if embed_mask else None
    def forward(self, x):
        m = self.mask(x)
        e = self.e(x) if self.kinds is None else self.e(x)+self.kinds(m)
        self.m = m.float()
        return self.h((e*self.m[...,None]).sum(1)/self.m.sum(1, keepdim=True))
WORDS = torch.randint(1, 9, (6, 5), generator=torch.Generator().manual_seed(0)).masked_fill(torch.eye(6, 5).bool(), 0)
@pytest.mark.parametrize('make', [lambda: MixUp(1.), lambda: ManifoldMixUp(1., layers='e', include_input=False)], ids=['MixUp', 'hidden'])
@pytest.mark.parametrize('mask', MASKS)
def test_masks_made_of_words(mask, make):
    "The mask stays the item's own"
    model = Pooled(MASKS[mask])
    page, = pages([(WORDS, torch.arange(6) % 3)], nn.CrossEntropyLoss(), model, make())
    assert page.plan is not None and torch.equal(Tensor(model.m).as_subclass(Tensor), (WORDS != 0).float())

def test_values_of_words_are_still_refused():
    for f in (lambda x: torch.ones_like(x)*x), lambda x: torch.where(x == 0, torch.zeros_like(x), x):
        with pytest.raises(ValueError, match='holds integers, and reaches `float`'):
            pages([(WORDS, torch.arange(6) % 3)], nn.CrossEntropyLoss(), Pooled(f), MixUp(1.))

# Fits that mix nothing, and messages

@pytest.mark.parametrize('make,warns', [(lambda: CutMix(minmax=(0, 0)), True), (lambda: CutMix(minmax=(0, .1)), False),
    (lambda: RandomMix([CutMix(minmax=(0, 0))]), True), (lambda: RandomMix([CutMix(minmax=(0, 0)), MixUp()]), False),
    (lambda: ResizeMix(side=(0, 0)), True), (lambda: ResizeMix(), False), (lambda: RegMixUp(method=CutMix(p=0)), True),
    (lambda: ManifoldMixUp(method=MixUp(p=0)), True), (lambda: RandomMix([MixUp(p=0), CutMix(p=lambda pct: 0.)]), True),
    (lambda: RegMixUp(method=CutMix(p=.5)), False), (lambda: RegMixUp(method=CutMix(p=lambda pct: float(pct > .5))), False)])
def test_more_fits_that_mix_nothing_warn(make, warns):
    x = torch.randn(N, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(128, C))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        pages([(x, Y)]*4, CrossEntropyLossFlat(), model, make())
    assert any('mixes no batch of this training run' in str(w.message) for w in said) == warns

@pytest.mark.parametrize('make,said', [(lambda: ManifoldMixUp(CutMix()), r'give a callback as `method=CutMix\(\.\.\.\)`'),
    (lambda: RegMixUp(MixUp(.2)), r'give a callback as `method=MixUp\(\.\.\.\)`'), (lambda: AlignMixUp(CutMix()), 'alpha must be a number'),
    (lambda: AlignMixUp(method=CutMix()), r"no parameter 'method'.*ManifoldMixUp\(method="),
    (lambda: ManifoldMixUp(layer='0'), "ManifoldMixUp has no parameter 'layer': did you mean 'layers'"),
    (lambda: MixUp(start=-1), r'start must be a share of the training .*number of epochs from 0 \(an int\), got -1'),
    (lambda: MixUp(start=1.5), 'start must be a share of the training .*got 1.5'),
    (lambda: MixUp(stop='late'), "stop must be a share of the training .*got 'late'")])
def test_more_messages_name_the_remedy(make, said):
    with pytest.raises((TypeError, ValueError), match=said): make()

@pytest.mark.parametrize('n_epoch,start', [(None, 5), (10, 5), (10, .5), (None, .25)])
def test_show_says_when_batches_are_mixed(n_epoch, start):
    "Before the first fit, and after one"
    learn = learner([(torch.rand(N, 3, 8, 8), Y)]*4, CrossEntropyLossFlat(), Keep(torch.rand(N, 3, 8, 8), C), MixUp(start=start))
    if n_epoch: learn.fit(n_epoch)
    def title(**kwargs):
        fig = learn.show_mixed_batch(**kwargs)[0].figure
        plt.close(fig)
        return fig.get_suptitle()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert (found := re.search(r'not mixed; try at=(\S+)', title()))
        assert 'items keep' in title(at=float(found[1]))
