"Methods at hidden layers, aligned features, and the mixture beside the clean batch: shares, losses and what is left behind."
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from apps import layer_of
from fastai.basics import (
    SGD,
    Callback,
    CancelBatchException,
    CancelFitException,
    CrossEntropyLossFlat,
    DataLoaders,
    L,
    Learner,
    MSELossFlat,
    Tensor,
    accuracy,
    nn,
    set_seed,
)
from fastai.callback.rnn import ModelResetter, rnn_cbs
from fastai.callback.training import GradientAccumulation
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
from fastai.vision.all import DynamicUnet, create_body
from fastai.vision.core import TensorImage, TensorMask
from torch.nn.modules.module import _global_forward_hooks

from fastai_mixup.all import *
from fastai_mixup.callback import MixCallback

N,C = 6,4
Y = torch.tensor([0, 1, 2, 3, 1, 2])
W = torch.tensor([1., 3., .5, 2.])
METHODS = dict(
    CutMix=CutMix, folded=partial(CutMix, fold=True), minmax=partial(CutMix, minmax=(.3, .9)), FMix=FMix, soft=partial(FMix, soft=.4),
    GridMix=GridMix, SmoothMix=SmoothMix, ResizeMix=ResizeMix, SaliencyMix=SaliencyMix, MixUp=partial(MixUp, 1.),
    by_batch=lambda: RandomMix([CutMix(), FMix(), ResizeMix(), MixUp(1.)]),
    by_item=lambda: RandomMix([CutMix(), FMix(), ResizeMix(), MixUp(1.)], per='item'))
MASKS = sorted(set(METHODS) - {'MixUp'})
def close(a, b, tol=1e-4):
    torch.testing.assert_close(a.detach().as_subclass(Tensor).double(), b.detach().as_subclass(Tensor).double(), atol=tol, rtol=tol)
def ids(size, n=N): return torch.eye(n).view(n, n, *[1]*len(size)).expand(n, n, *size).contiguous()

class Notes(Callback):
    order,run_valid = 60,False
    def before_fit(self): self.pages = []
    def after_loss(self):
        cb = next(cb for cb in self.learn.cbs if isinstance(cb, MixCallback))
        self.pages.append(dict(plan=cb.plan, lam=cb.plan and cb.plan.lam, layer=cb.plan and cb.plan.layer, M=getattr(self.model, 'M', None),
            pred=self.learn.pred, loss=self.learn.loss.detach(), xb=self.learn.xb, yb=self.learn.yb, x=getattr(self.model, 'x', None),
            said=getattr(self.model, 'said', None)))

def fitted(cb, model, batches, loss_func=None, n_inp=1, cbs=(), lr=0., epochs=1, valid=(), metrics=None, seed=0):
    set_seed(seed)
    dls = DataLoaders(batches, list(valid))
    dls.n_inp = n_inp
    learn = Learner(dls, model, loss_func or CrossEntropyLossFlat(), SGD, lr=lr, cbs=[*L(cb), Notes(), *cbs], metrics=metrics)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn
def pages(*args, **kwargs): return fitted(*args, **kwargs).notes.pages

def CE(pred, y, **kwargs): return F.cross_entropy(pred, y, reduction='none', **kwargs)
def total(items, M, pred, y): return sum(M[:,j]*items(pred, y[[j]*len(M)]) for j in range(len(y)))
def own(pred, y): return F.cross_entropy(pred, y)**2
def own_by_hand(M, pred, y):
    lam = M.diagonal()
    close(lam, lam[:1].expand(len(M)), 1e-4)
    rest = M.clone().fill_diagonal_(0)
    return lam[0]*own(pred, y) + (1-lam[0])*own(pred, y[torch.where(rest.amax(1) > 0, rest.argmax(1), torch.arange(len(M)))])
LOSSES = dict(
    CE=(CrossEntropyLossFlat(), Y, lambda M,p,y: total(CE, M, p, y).mean()),
    smoothed=(LabelSmoothingCE(.1), Y, lambda M,p,y: total(partial(CE, label_smoothing=.1), M, p, y).mean()),
    weighted=(nn.CrossEntropyLoss(W), Y, lambda M,p,y: total(partial(CE, weight=W), M, p, y).sum()/(M@W[y]).sum()),
    own=(own, Y, own_by_hand),
    numbers=(MSELossFlat(), torch.randn(N, C, generator=torch.Generator().manual_seed(0)), lambda M,p,y: F.mse_loss(p, M@y)))

class Through(nn.Module):
    "Each position keeps what it holds; the sizes shrink"
    def __init__(self, dims, act=nn.ReLU):
        super().__init__()
        conv,pool = [(nn.Conv1d, nn.AvgPool1d), (nn.Conv2d, nn.AvgPool2d), (nn.Conv3d, nn.AvgPool3d)][dims-1]
        def block():
            layer = conv(N, N, 3, padding=1, bias=False)
            nn.init.dirac_(layer.weight)
            return nn.Sequential(layer, act())
        self.first,self.shrink,self.last,self.head = block(),pool(2),block(),nn.Linear(N, C)
    def forward(self, x):
        self.x = x.detach().as_subclass(Tensor)
        h = self.last(self.shrink(self.first(x)))
        self.h = h.detach()
        M = h.flatten(2).mean(2)
        self.M = M.detach()
        return self.head(M)

SIZES = dict(signal=(14,), picture=(8, 10), odd=(7, 13), volume=(4, 6, 4))
PLACES = dict(first=dict(layers='first', include_input=False), last=dict(layers='last', include_input=False),
    any=dict(layers=['first', 'last'], include_input=True), input=dict(layers=[], include_input=True))

def check_shares(M):
    close(M.sum(1), torch.ones(len(M)))
    assert (M >= 0).all() and ((M > 1e-6).sum(1) <= 2).all()

@pytest.mark.slow
@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', METHODS)
def test_shares_at_hidden_layers(name, size, loss):
    loss_func,y,by_hand = LOSSES[loss]
    size,mixed,seen = SIZES[size],0,set()
    for where in PLACES if loss == 'CE' else ['last']:
        if where in ('first', 'input', 'any') and any(s % 2 for s in size): continue # the pooling leaves out the last positions
        for page in pages(ManifoldMixUp(method=METHODS[name](), **PLACES[where]), Through(len(size)), [(ids(size), y)]*4, loss_func):
            if page['plan'] is None: continue
            M = page['M']
            check_shares(M)
            mixed += not torch.equal(M, torch.eye(N))
            close(M.diagonal(), torch.where((M > 1e-7).sum(1) > 1, page['lam'], M.diagonal()))
            close(page['loss'], by_hand(M, page['pred'], y))
            seen.add(page['layer'])
            if page['layer'] != 'input': assert torch.equal(page['x'], ids(size))
    assert mixed and (loss != 'CE' or any(s % 2 for s in size) or seen == {'first', 'last', 'input'})

@pytest.mark.parametrize('name', MASKS)
def test_hidden_positions_are_covered_by_the_mask(name):
    "Each position of the hidden layer is what its own mask says, of the item and of its partner"
    model = Through(2)
    for page in pages(ManifoldMixUp(method=METHODS[name](), layers='last', include_input=False), model, [(ids((8, 10)), Y)]):
        plan = page['plan']
        if plan is None or not hasattr(plan, 'mask'): continue
        mask = plan.mask((4, 5))
        assert list(plan.masks)[0] == (4, 5)
        close(plan.lam, mask.flatten(1).mean(1)) if name != 'by_item' else None
        close(model.h[range(N),range(N)], torch.where(plan.index.eq(torch.arange(N))[:,None,None], 1., mask))
        close(model.h[range(N),plan.index], torch.where(plan.index.eq(torch.arange(N))[:,None,None], 1., 1-mask))

def own_layers(model, xb, layers):
    "What the layers give for the unmixed inputs"
    got = {}
    handles = [layer.register_forward_hook(lambda m,i,o: got.setdefault(m, o.detach())) for layer in layers]
    with torch.no_grad(): model(*xb)
    for h in handles: h.remove()
    return got

@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_resnet(name):
    "Batch norm in evaluation mode: what a layer gives for an item depends on that alone"
    set_seed(0)
    model = tv.resnet18(num_classes=C)
    class Frozen(Callback):
        order = -20
        def before_batch(self): self.model.eval()
    x = torch.randn(N, 3, 48, 64)
    cb = ManifoldMixUp(method=METHODS[name](), include_input=False)
    class Look(Callback):
        order = 9
        def before_batch(self):
            cb = self.learn.manifold_mix_up
            layer = cb.plan and layer_of(cb)
            self.handle = layer.register_forward_hook(lambda m,i,o: setattr(self, 'mixed', o.detach())) if layer else None
            self.got = own_layers(model, [o.clone() for o in self.learn.xb], [layer]) if layer else None
        def after_pred(self):
            if self.handle: self.handle.remove()
        def after_loss(self):
            cb = self.learn.manifold_mix_up
            if cb.plan is None: return
            clean,plan = self.got[layer_of(cb)],cb.plan
            other = plan.partners(clean)
            if not hasattr(plan, 'mask'): weight = plan.lam.view(-1, 1, 1, 1)
            else:
                assert set(plan.masks) == {tuple(clean.shape[2:])}
                weight = plan.mask(clean.shape[2:]).unsqueeze(1)
            if name in ('by_item', 'by_batch', 'ResizeMix'): # the partner comes in another shape
                own_positions = (weight == 1).expand_as(clean)
                close(self.mixed[own_positions], clean[own_positions])
            else: close(self.mixed, weight*clean + (1-weight)*other)
            close(plan.lam, weight.flatten(1).mean(1)) if hasattr(plan, 'mask') else None
            loss = plan.lam*CE(self.learn.pred, Y) + (1-plan.lam)*CE(self.learn.pred, Y[plan.index])
            close(self.learn.loss, loss.mean())
            seen.append(cb.plan.layer)
    seen = []
    fitted([cb, Frozen(), Look()], model, [(x, Y)]*3)
    assert seen and all(s.startswith(('layer', 'maxpool', 'bn1', 'relu')) for s in seen)

class Segments(nn.Module):
    "Predicts for each position from what it holds, which it brings back to the first size"
    def __init__(self, shrink=1):
        super().__init__()
        self.body,self.shrink,self.head = nn.Conv2d(N, N, 1, bias=False),shrink,nn.Conv2d(N, C, 1)
        nn.init.dirac_(self.body.weight)
    def forward(self, x):
        h = self.body(F.avg_pool2d(x, self.shrink))
        self.M = h.detach()
        return self.head(F.interpolate(h, scale_factor=self.shrink) if self.shrink > 1 else h)

@pytest.mark.parametrize('name', sorted(set(MASKS) - {'by_batch', 'by_item'}))
@pytest.mark.parametrize('shrink', [1, 2, 4])
def test_masks_of_classes_are_pasted_as_the_layer(name, shrink):
    "Where most of a position is one item's, the target is that item's"
    size = 16,24
    y = Y.view(N, 1, 1).expand(N, *size) if name == 'ResizeMix' or shrink > 1 else torch.randint(C, (N, *size),
        generator=torch.Generator().manual_seed(0))
    for page in pages(ManifoldMixUp(method=METHODS[name](), layers='body', include_input=False), Segments(shrink),
        [(ids(size), TensorMask(y))]*3, CrossEntropyLossFlat(axis=1)):
        plan = page['plan']
        M = F.interpolate(page['M'], scale_factor=shrink)
        winner = M[range(N),range(N)] >= .5
        pasted = torch.where(winner, y, y[plan.index])
        off = (pasted != plan.paste(y)).float().flatten(1).mean(1) # edges are rounded at each size anew
        assert off.max() <= (0 if shrink == 1 else .7*shrink*2*(1/16+1/24) if 'FMix' not in name else .35)
        close(page['loss'], F.cross_entropy(page['pred'], plan.paste(y)))

def test_segmentation_by_a_unet():
    set_seed(0)
    model = DynamicUnet(create_body(tv.resnet18(), pretrained=False), C, (32, 32))
    y = torch.randint(C, (2, 32, 32))
    cb = ManifoldMixUp(method=CutMix())
    learn = fitted(cb, model, [(TensorImage(torch.randn(2, 3, 32, 32)), TensorMask(y))]*2, CrossEntropyLossFlat(axis=1))
    for page in learn.notes.pages:
        mask = page['plan'].mask((32, 32)) > .5
        close(page['loss'], F.cross_entropy(page['pred'].as_subclass(Tensor), torch.where(mask, y, y.roll(-1, 0))))

# what has no spatial dimensions

def vit(): return tv.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=C)
@pytest.mark.parametrize('name', ['CutMix', 'FMix', 'by_batch', 'by_item'])
def test_tokens_and_flat_layers_are_refused_or_passed_over(name):
    data = [(torch.randn(N, 3, 32, 32), Y)]*2
    for net,layer in (vit, 'encoder.layers.*'), (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 8), nn.Linear(8, C)), '3'):
        with pytest.raises(ValueError, match='layers: .* gives bs x .*needs spatial dimensions'):
            fitted(ManifoldMixUp(method=METHODS[name](), layers=layer), net(), data)
    cb = ManifoldMixUp(method=METHODS[name]())
    fitted(cb, vit(), data)
    assert all(len(o.cut.shape) == 4 for o in cb.found().layers if o.name != 'input')
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 8), nn.ReLU(), nn.Linear(8, C))
    with pytest.warns(UserWarning, match='mixes at its input only'): fitted(ManifoldMixUp(method=METHODS[name]()), flat, data)
    with pytest.raises(ValueError, match='no hidden layer'): fitted(ManifoldMixUp(method=METHODS[name](), include_input=False), flat, data)

def test_signals_are_mixed_at_layers_that_are_named():
    with pytest.warns(UserWarning, match='input only'): pages(ManifoldMixUp(method=CutMix()), Through(1), [(ids((14,)), Y)])

class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.norm,self.again,self.head = nn.Conv2d(N, N, 1, bias=False),nn.LayerNorm(N, elementwise_affine=False),nn.Linear(N, N,
            bias=False),nn.Linear(N, C)
        nn.init.dirac_(self.body.weight)
        nn.init.eye_(self.again.weight)
    def forward(self, x):
        h = self.again(self.body(x).permute(0, 2, 3, 1))
        self.h = h.detach()
        self.M = h.flatten(1, 2).mean(1).detach()
        return self.head(h.flatten(1, 2).mean(1))

@pytest.mark.parametrize('make', [lambda: ManifoldMixUp(method=CutMix(), layers='again', include_input=False),
    lambda: AlignMixUp(layers='again', include_input=False)], ids=['CutMix', 'AlignMixUp'])
def test_channels_last(make):
    "Refused, or mixed by positions"
    try: got = pages(make(), ChannelsLast(), [(ids((8, 10)), Y)]*3)
    except ValueError: return
    for page in got:
        check_shares(page['M'])
        close(page['M'].diagonal(), page['lam'])

@pytest.mark.parametrize('make', [lambda: ManifoldMixUp(method='cutmix'), lambda: ManifoldMixUp(method=CutMix),
    lambda: ManifoldMixUp(method=ManifoldMixUp()), lambda: ManifoldMixUp(.3, method=CutMix()),
    lambda: ManifoldMixUp(method=CutMix(), fold=True), lambda: ManifoldMixUp(method=CutMix(inputs=0)),
    lambda: RegMixUp(method=CutMix(generator=torch.Generator())), lambda: RegMixUp(method=RegMixUp()),
    lambda: RegMixUp(method=CutMix(labels=ReMix())), lambda: RegMixUp(eta=-1), lambda: AlignMixUp(epsilon=0)])
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises((TypeError, ValueError), match='method|alpha|fold|eta|epsilon|inputs|generator|labels'): make()

# parameters of the method

class Share(Callback):
    order,run_valid = 61,False
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append(0. if (M := self.model.M)[-N:].equal(torch.eye(N)) else 1-M[-N:].diagonal().mean().item())
def given(cb, epochs=4, n=10):
    return torch.tensor(fitted([cb, Share()], Through(2), [(ids((8, 10)), Y)]*n, epochs=epochs).share.seen)
AROUND = dict(manifold=partial(ManifoldMixUp, layers='last', include_input=False), reg=RegMixUp, input=partial(ManifoldMixUp, layers=[]))
@pytest.mark.slow
@pytest.mark.parametrize('name', AROUND)
def test_parameters_of_the_method(name):
    around = AROUND[name]
    alone = FMix
    on = given(around(method=alone())) > 0
    assert on.float().mean() > .9
    assert not given(around(method=alone(0))).any() and not given(around(method=alone(p=0))).any() and not given(
        around(method=alone(stop=0))).any() and not given(around(method=alone(), p=0)).any()
    half = given(around(method=alone(p=.5)), 10) > 0
    assert .35 < half.float().mean() < .65
    quarter = given(around(method=alone(p=.5), p=.5), 10) > 0
    assert .12 < quarter.float().mean() < .38
    late = given(around(method=alone(10., start=.5))) > 0
    assert torch.equal(late, torch.arange(40) >= 20)
    epochs = given(around(method=alone(10., start=1, stop=3))) > 0
    assert torch.equal(epochs, (torch.arange(40) >= 10) & (torch.arange(40) < 30))
    outer = given(around(method=alone(10.), start=1, stop=3)) > 0
    assert torch.equal(outer, (torch.arange(40) >= 10) & (torch.arange(40) < 30))
    fading = given(around(method=alone(lambda pct: 20*(1-pct))))
    assert fading[:10].mean() > .35
    few = given(around(method=alone(lambda pct: 1e-6 if pct > .5 else 20)))
    assert few[:20].min() > .2 and set((few[21:]*N).round(decimals=3).frac().tolist()) == {0.}

def test_parameters_of_methods_of_a_choice():
    seen = given(ManifoldMixUp(method=RandomMix([FMix(10., stop=.5), MixUp(10., start=.5)], [.5, .5]), layers='last', include_input=False),
        8)
    assert .3 < (seen > 0).float().mean() < .7
    close(seen[seen > 0].mean(), torch.tensor(.5), .1)

@pytest.mark.parametrize('name', ['manifold', 'reg'])
@pytest.mark.parametrize('method', ['FMix', 'by_batch', 'by_item'])
def test_same_seed_same_training(name, method, request):
    cb = AROUND[name](method=METHODS[method]())
    def run():
        learn = fitted(cb, Through(2), [(ids((8, 10)), Y)]*6, cbs=[share := Share()])
        learn.remove_cb(cb)
        cb.learn = None
        return share.seen
    assert run() == run()

@pytest.mark.parametrize('make', [lambda: ManifoldMixUp(method=CutMix(), layers='last'), lambda: AlignMixUp(layers='last'),
    lambda: RegMixUp(method=FMix()), lambda: RegMixUp(), lambda: ManifoldMixUp(method=RandomMix([CutMix(), FMix()], per='item'),
    layers='last')])
def test_torchs_stream_is_left_alone(make):
    def run(cb):
        fitted(cb, Through(2), [(ids((8, 10)), Y)]*3) if cb else [set_seed(0)]
        return torch.get_rng_state()
    off = ManifoldMixUp(0., layers='last')
    assert torch.equal(run(make()), run(off))

@pytest.mark.parametrize('make', [lambda: RandomMix([SaliencyMix(minmax=(.3, .3))], inputs=1),
    lambda: RegMixUp(method=SaliencyMix(minmax=(.3, .3)), inputs=1),
    lambda: ManifoldMixUp(method=SaliencyMix(minmax=(.3, .3)), inputs=1, layers=[])], ids=['choice', 'reg', 'manifold'])
def test_salience_of_the_inputs_that_the_outer_callback_mixes(make):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, C)
        def forward(self, a, b):
            self.b = b.detach()
            return self.head(b.mean((2, 3)))
    dull,dot = torch.zeros(N, 1, 20, 20),torch.zeros(N, 1, 20, 20)
    dull[:,:,2,2] = 1.
    dot[:,:,15:18,15:18] = torch.arange(1., N+1).view(N, 1, 1, 1)
    fitted(make(), model := Two(), [(dull, dot, Y)], n_inp=2)
    assert (model.b[-N:,0,16,16] != dot[:,0,16,16]).all()

# AlignMixUp

def sinkhorn(a, b, epsilon, steps=30):
    "Rows receive, columns give; in numpy, of one pair"
    a,b = (o/np.linalg.norm(o, axis=0, keepdims=True) for o in (a, b))
    K = np.exp(-(1-a.T@b)/epsilon)
    u = np.ones(len(K))
    for _ in range(steps):
        v = 1/(K.T@u)
        u = 1/(K@v)
    return u[:,None]*K*v

@pytest.mark.parametrize('epsilon', [.05, .1, 1.])
def test_alignmixup_by_hand(epsilon):
    set_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, C))
    x = torch.randn(N, 3, 16, 12)
    cb = AlignMixUp(layers='2', include_input=False, epsilon=epsilon)
    for page in pages(cb, model, [(x, Y)]*3):
        clean = model[:3](x).detach().double()
        mixed = []
        for i,j in enumerate(page['plan'].index):
            a,b = clean[i].flatten(1).numpy(),clean[j].flatten(1).numpy()
            mixed.append(page['lam'][i].item()*a + (1-page['lam'][i].item())*(b @ sinkhorn(a, b, epsilon).T))
        pred = model[3:](torch.tensor(np.stack(mixed)).view(clean.shape).float())
        close(page['pred'], pred, 1e-3)
        lam = page['lam']
        close(page['loss'], (lam*CE(page['pred'], Y) + (1-lam)*CE(page['pred'], Y[page['plan'].index])).mean())

@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('size', ['picture', 'volume', 'signal'])
def test_alignmixup_shares(size, loss):
    loss_func,y,by_hand = LOSSES[loss]
    seen = set()
    for page in pages(AlignMixUp(layers='last'), Through(len(SIZES[size])), [(ids(SIZES[size]), y)]*6, loss_func):
        check_shares(page['M'])
        close(page['M'].diagonal(), page['lam'])
        close(page['loss'], by_hand(page['M'], page['pred'], y))
        seen.add(page['layer'])
    assert seen == {'input', 'last'}

def test_alignmixup_takes_the_deepest_layer_with_positions():
    for net,x,name in (lambda: tv.resnet18(num_classes=C), torch.randn(N, 3, 64, 64), 'layer4'),(partial(Through, 2), ids((8, 10)), 'last'):
        cb = AlignMixUp()
        fitted(cb, net(), [(x, Y)])
        assert [o.name for o in cb.found().layers if o.name != 'input'][0].startswith(name)

def test_alignmixup_in_lower_precision():
    model = Through(2).bfloat16()
    class Plain(Callback):
        order = 59
        def after_loss(self): self.learn.loss = self.learn.loss.float()
    for page in pages(AlignMixUp(layers='last'), model, [(ids((8, 10)).bfloat16(), Y)]*3, cbs=[Plain()]):
        close(page['M'].float().diagonal(), page['lam'], 2e-2)

# RegMixUp

class Keeps(nn.Module):
    "Keeps what it was given"
    def __init__(self, encode=lambda *xb: xb[0], outs=1):
        super().__init__()
        self.encode,self.head,self.outs = encode,nn.Linear(N, C*outs),outs
    def forward(self, *xb):
        M = self.encode(*xb)
        M = M.flatten(2).mean(2) if M.ndim > 2 else M
        self.M,self.xs = M.detach(),xb
        self.said = self.head(M)
        return self.said if self.outs == 1 else self.said.split(C, 1)

EYE = torch.eye(N)
class Words(Keeps):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding.from_pretrained(EYE)
        self.encode = lambda x: self.emb(x).mean(1)
INPUTS = dict(
    float=(EYE, Keeps, 1), pictures=(ids((5, 6)), Keeps, 1), words=(torch.arange(N)[:,None].expand(N, 3).contiguous(), Words, 1),
    dict=(dict(a=EYE, deep=[EYE*2, 'name'], n=3), lambda: Keeps(lambda d: (d['a']+d['deep'][0])/3), 1),
    two=((EYE, EYE*3), lambda: Keeps(lambda a,b: (a+b)/4), 2),
    with_mask=((EYE, torch.ones(N, N, dtype=torch.bool)), lambda: Keeps(lambda a,m: a*m), 2),
    shared=((EYE, torch.ones(1, N)), lambda: Keeps(lambda a,s: a*s), 2),
    complex=(torch.complex(EYE, EYE), lambda: Keeps(lambda x: (x.real+x.imag)/2), 1))

@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('kind', INPUTS)
def test_regmixup(kind, loss, request):
    loss_func,y,by_hand = LOSSES[loss]
    x,net,n_inp = INPUTS[kind]
    if kind == 'dict': x = {'a': EYE, 'deep': [EYE*2], 'n': 3}
    kwargs = dict(inputs=0) if kind == 'shared' else {}
    for page in pages(RegMixUp(2., eta=.7, **kwargs), net(), [(*(x if isinstance(x, tuple) else (x,)), y)]*4, loss_func, n_inp=n_inp):
        M,said = page['M'],page['said']
        close(M[:N], EYE)
        check_shares(M[N:])
        assert not torch.equal(M[N:], EYE) and len(page['pred']) == N
        close(page['pred'], said[:N])
        close(page['loss'], loss_func(said[:N], y) + .7*by_hand(M[N:], said[N:], y))
        for a,b in zip(page['xb'], x if isinstance(x, tuple) else (x,)): assert a is b or not isinstance(b, Tensor) or torch.equal(a, b)

@pytest.mark.parametrize('name', METHODS)
def test_regmixup_by_each_method(name):
    for page in pages(RegMixUp(method=METHODS[name](), eta=2.), Keeps(), [(ids((5, 6)), Y)]*4):
        if page['plan'] is None: continue
        close(page['M'][:N], EYE)
        check_shares(page['M'][N:])
        close(page['loss'], CE(page['said'][:N], Y).mean() + 2*total(CE, page['M'][N:], page['said'][N:], Y).mean())

def test_regmixup_of_several_predictions():
    z = torch.randn(N, C)
    def loss_func(pred, y, z): return F.cross_entropy(pred[0], y) + F.mse_loss(pred[1], z)
    for page in pages(RegMixUp(2.), Keeps(outs=2), [(EYE, Y, z)]*3, loss_func):
        assert [len(p) for p in page['pred']] == [N, N]
        M = page['M'][N:]
        clean,mixed = zip(*(o.split(N) for o in page['said'].split(C, 1)))
        met = M.clone().fill_diagonal_(0).argmax(1)
        lam = M[0,0]
        close(M.diagonal(), lam.expand(N))
        close(page['loss'], loss_func(clean, Y, z) + lam*loss_func(mixed, Y, z) + (1-lam)*loss_func(mixed, Y[met], z[met]))

def test_regmixup_refuses_predictions_without_rows():
    class Sums(Keeps):
        def forward(self, x): return super().forward(x).mean(0, keepdim=True)
    with pytest.raises(RuntimeError, match='no prediction has 12 rows'): fitted(RegMixUp(), Sums(), [(EYE, Y)])

def text_model():
    set_seed(0)
    # fastai's own dropout of weights does not bear 0
    return get_text_classifier(AWD_LSTM, 40, C, seq_len=8, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2},
        drop_mult=1e-9)

@pytest.mark.parametrize('length', [7, 20])
def test_regmixup_of_texts(length):
    """Without dropout and regularisation: the clean half is what the model says of the texts, the other is what it says of averaged
    embeddings"""
    model = text_model()
    x = torch.randint(2, 40, (N, length))
    if length > 8: x[1,:8] = x[3,:8] = 1
    said = []
    class Tap(Callback):
        order,run_valid = 59,False
        def before_batch(self): self.handle = self.model[1].register_forward_hook(lambda m,i,o: said.append(o[0].detach()))
        def after_pred(self): self.handle.remove()
    learn = fitted(RegMixUp(2., eta=.7), model, [(x, Y)]*3, cbs=[Tap(), ModelResetter(), *rnn_cbs(alpha=0., beta=0.)], valid=[(x, Y)])
    assert len(said) == 3 and all(len(o) == 2*N for o in said)
    for page,o in zip(learn.notes.pages, said):
        assert len(page['pred']) == N
        lam,y1 = page['lam'],Y[page['plan'].index]
        close(page['loss'], F.cross_entropy(o[:N], Y) + .7*(lam*CE(o[N:], Y) + (1-lam)*CE(o[N:], y1)).mean(), 1e-3)

def test_regmixup_with_regularised_texts():
    model = text_model()
    fitted(RegMixUp(), model, [(torch.randint(2, 40, (N, 12)), Y)]*3, cbs=rnn_cbs(), lr=.1, valid=[(torch.randint(2, 40, (N, 12)), Y)],
        metrics=accuracy)

def test_recorder_and_metrics():
    x = ids((5, 6))
    for cb in RegMixUp(), RegMixUp(method=CutMix()), AlignMixUp(layers='last'), ManifoldMixUp(method=CutMix(), layers='last'):
        learn = fitted(cb, Through(2), [(x, Y)]*5, valid=[(x, Y)]*2, metrics=[accuracy, lambda p,y: float(len(p) == len(y) == N)], epochs=3,
            lr=.1)
        rec = learn.recorder
        assert len(rec.losses) == 15 and len(rec.values) == 3 and all(len(v) == 4 and v[-1] == 1. for v in rec.values)
        pred,y = learn.get_preds(dl=[(x, Y)]*2, with_input=False)[:2]
        assert len(pred) == len(y) == 2*N
        loss = learn.validate()[0]
        close(torch.tensor(loss), F.cross_entropy(learn.model(x), Y))

def test_train_metrics_see_the_clean_half():
    learn = Learner(DataLoaders([(EYE, Y)]*3, [(EYE, Y)]), Keeps(), CrossEntropyLossFlat(), SGD, metrics=accuracy, cbs=RegMixUp(2.))
    learn.recorder.train_metrics = True
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert len(learn.recorder.values[-1]) == 4

def test_gradients_accumulate():
    for cb in RegMixUp(2., eta=.7), ManifoldMixUp(method=FMix(), layers='last', include_input=False), AlignMixUp(layers='last'):
        model,grads = Through(2),[]
        class Grab(Callback):
            order = 70
            def before_step(self): grads.append(self.model.head.weight.grad.clone())
        x = ids((8, 10))
        learn = fitted(cb, model, [(x[:3], Y[:3]), (x[3:], Y[3:])]*2, cbs=[GradientAccumulation(6), Grab()], epochs=1)
        weight = model.head.weight.detach().clone().requires_grad_()
        loss = 0.
        for page,at in zip(learn.notes.pages[:2], (slice(0, 3), slice(3, 6))):
            M,y = page['M'],Y[at]
            pred = F.linear(M, weight, model.head.bias.detach())
            clean,mixed = (pred[:3], pred[3:]) if len(M) == 6 else (None, pred)
            part = total(CE, M[-3:,at], mixed, y).mean()
            loss = loss + (part if clean is None else F.cross_entropy(clean, y) + .7*part)*3/6
        assert len(grads) == 2
        close(grads[0], torch.autograd.grad(loss, weight)[0])

def test_mixed_precision():
    "Under automatic casting the losses are those of what was said"
    class Casts(Callback):
        order = 10
        def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
        def after_pred(self): self.learn.pred = self.learn.pred.float()
        def after_loss(self): self.cast.__exit__(None, None, None)
    for cb in RegMixUp(2., eta=.7), ManifoldMixUp(method=FMix(), layers='last', include_input=False):
        for page in pages(cb, Through(2), [(ids((8, 10)), Y)]*3, cbs=[Casts()]):
            M = page['M'][-N:].float()
            if isinstance(cb, RegMixUp):
                close(page['loss'], CE(page['pred'], Y).mean() + .7*total(CE, M, F.linear(M, *_head(page, cb)), Y).mean(), 3e-2)
            else: close(page['loss'], total(CE, M, page['pred'], Y).mean(), 3e-2)
def _head(page, cb): return cb.learn.model.head.weight.detach(),cb.learn.model.head.bias.detach()

class Stops(Callback):
    run_valid = False
    def __init__(self, at, exc, order):
        self.order,self.exc,self.done = order,exc,False
        setattr(self, at, self.stop)
    def stop(self):
        if self.done or self.iter < 1: return
        self.done = True
        raise self.exc('stop')

class Clean(Callback):
    "After a cancelled batch the Learner holds the clean inputs"
    order,run_valid = float('inf'),False
    def __init__(self, x): self.x,self.seen = x,[]
    def after_cancel_batch(self):
        self.seen.append((len(self.learn.xb[0]) == N and torch.equal(self.learn.xb[0], self.x), len(self.learn.yb)))

@pytest.mark.parametrize('order', [-50, 70])
@pytest.mark.parametrize('at', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step'])
@pytest.mark.parametrize('make', [RegMixUp, lambda: RegMixUp(method=CutMix()), lambda: RegMixUp(pairing=PreviousBatch())],
    ids=['plain', 'CutMix', 'previous'])
def test_cancelled_batch_leaves_the_inputs(make, at, order, request):
    x = ids((5, 6))
    learn = fitted(make(), Keeps(), [(x, Y)]*3, cbs=[Stops(at, CancelBatchException, order), clean := Clean(x)])
    assert clean.seen == [(True, 1)]
    assert len(learn.notes.pages) >= 2 and all(len(p['pred']) == N for p in learn.notes.pages)
    if not torch.equal(learn.notes.pages[-1]['M'], EYE): close(learn.notes.pages[-1]['M'][:N], EYE)

@pytest.mark.parametrize('exc', [KeyboardInterrupt, ValueError, CancelFitException])
@pytest.mark.parametrize('at', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'after_batch'])
@pytest.mark.parametrize('make', [RegMixUp, lambda: ManifoldMixUp(method=CutMix(), layers='last'), lambda: AlignMixUp(layers='last')],
    ids=['reg', 'manifold', 'align'])
def test_exceptions_leave_nothing_behind(make, at, exc):
    x = ids((8, 10))
    stop = Stops(at, exc, 70)
    set_seed(0)
    cb = make()
    learn = Learner(DataLoaders([(x, Y)]*2, [(x, Y)]), Through(2), CrossEntropyLossFlat(), SGD, cbs=[cb, Notes(), stop])
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1, 0.)
        except exc: pass
        close(torch.tensor(learn.validate()[0]), F.cross_entropy(learn.model(x), Y))
        learn.fit(1, 0.)
        for page in learn.notes.pages:
            close(page['loss'], (CE(page['pred'], Y).mean() if len(page['M']) > N else 0.)
                + total(CE, page['M'][-N:], F.linear(page['M'][-N:], learn.model.head.weight, learn.model.head.bias).detach(), Y).mean())
        learn.remove_cb(cb)
        learn.add_cb(RegMixUp(0.))
        learn.fit(1)
    assert torch.equal(learn.model.x, x) and not _global_forward_hooks

def test_public_loss_beside_the_clean_batch():
    class Again(Callback):
        order = 61
        def after_loss(self): close(self.learn.reg_mix_up.loss(self.learn.pred), self.learn.loss)
    fitted(RegMixUp(2., eta=.3), Keeps(), [(EYE, Y)]*2, cbs=[Again()])

def test_off_is_without():
    x = torch.randn(N, 3, 16, 16)
    def run(cb):
        set_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.3), nn.Flatten(), nn.Linear(4*14*14, C))
        plain_fit(model, [(x, Y)]*3) if cb is None else fitted(cb, model, [(x, Y)]*3, lr=.1)
        return [p.detach().clone() for p in model.state_dict().values()]
    for off in RegMixUp(0.), AlignMixUp(0.), ManifoldMixUp(method=CutMix(0)), ManifoldMixUp(method=CutMix(p=0)), RegMixUp(
        method=MixUp(0.)), ManifoldMixUp(method=RandomMix([CutMix(0), MixUp(0)])):
        assert all(map(torch.equal, run(off), run(None)))

def plain_fit(model, batches):
    set_seed(0)
    learn = Learner(DataLoaders(batches, []), model, CrossEntropyLossFlat(), SGD, lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

@pytest.mark.parametrize('make', [RegMixUp, lambda: RegMixUp(method=CutMix()), lambda: AlignMixUp(layers='last'),
    lambda: ManifoldMixUp(method=FMix(), layers='last')])
def test_batches_of_other_sizes(make):
    x = ids((8, 10))
    for page,n in zip(pages(make(), Through(2), [(x, Y), (x[:1], Y[:1]), (x[:3], Y[:3]), (x[:2], Y[:2])]), (6, 1, 3, 2)):
        assert len(page['pred']) == n
        M = page['M'][-n:,:n]
        pred = page['pred'] if len(page['M']) == n else None
        if pred is not None: close(page['loss'], total(CE, M, pred, Y[:n]).mean())

# a spectrogram inside of the model

class Spectrogram(nn.Module):
    def forward(self, x):
        power = torch.stft(x.flatten(1), 32, 16, window=torch.hann_window(32), return_complex=True).abs()
        self.said = power.unsqueeze(1).detach()
        return power.unsqueeze(1)
class OnWaveforms(nn.Module):
    def __init__(self):
        super().__init__()
        self.spec,self.body,self.head = Spectrogram(),nn.Conv2d(1, 4, 3),nn.Linear(4, C)
        self.body.register_forward_pre_hook(lambda m,args: setattr(self, 'x', args[0].detach()))
    def forward(self, x): return self.head(self.body(self.spec(x)).relu().mean((2, 3)))

@pytest.mark.parametrize('name', ['SpecMix', 'CutMix', 'soft', 'by_batch', 'by_item'])
@pytest.mark.parametrize('shape', [(N, 1, 400), (N, 400)], ids=['channels', 'none'])
def test_spectrograms_inside_of_the_model(name, shape):
    "Whether the waveforms have a dimension of channels or not; also of another length in each batch"
    wave,model = torch.randn(shape, generator=torch.Generator().manual_seed(0)),OnWaveforms()
    batches = [(wave[...,:length], Y) for length in (400, 330, 400, 120)]
    cb = ManifoldMixUp(layers='spec', include_input=False, method=SpecMix() if name == 'SpecMix' else METHODS[name]())
    kept = []
    class Look(Callback):
        order = 65
        def after_loss(self): kept.append((model.spec.said, model.x))
    for page,(own,mixed) in zip(pages(cb, model, batches, cbs=[Look()]), kept):
        plan = page['plan']
        mask = plan.mask(own.shape[2:])[:,None] if hasattr(plan, 'mask') else plan.lam.view(-1, 1, 1, 1)
        if getattr(plan, 'views', None) is None: close(mixed, mask*own + (1-mask)*own[plan.index])
        close(page['lam'], mask.expand_as(own).mean((1, 2, 3)))
        losses = [F.cross_entropy(page['pred'], y, reduction='none') for y in (Y, Y[plan.index])]
        close(page['loss'], (page['lam']*losses[0] + (1-page['lam'])*losses[1]).mean())

@pytest.mark.parametrize('make', [SaliencyMix, PuzzleMix, lambda: RandomMix([CutMix(), SaliencyMix()])])
def test_methods_that_look_at_the_inputs_mix_no_other_positions(make):
    data = [(torch.randn(N, 1, 400), Y)]
    with pytest.raises(ValueError, match='the inputs, at which it looks'):
        fitted(ManifoldMixUp(layers='spec', method=make()), OnWaveforms(), data)
