"How the loss weights labels: ReMix, SnapMix and TransMix against what is computed by hand, on models as they are."
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from fastai.basics import (
    SGD,
    Callback,
    CancelBatchException,
    CrossEntropyLossFlat,
    DataLoaders,
    FocalLossFlat,
    L,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    MSELossFlat,
    Tensor,
    nn,
    set_seed,
)
from torch.nn.modules import module as modules

from fastai_mixup.all import *
from fastai_mixup.batch import Plan
from fastai_mixup.callback import MixCallback
from fastai_mixup.labels import remix_lam
from fastai_mixup.losses.mixed import mixed_loss
from fastai_mixup.losses.spec import loss_spec
from fastai_mixup.methods.snapmix import activation_maps, share_in_box
from fastai_mixup.methods.transmix import patch_grid

N,C = 6,5
Y = torch.tensor([0, 1, 2, 3, 1, 4])
W = torch.tensor([1., 3., .5, 2., .2])

class Notes(Callback):
    "The plan of each batch, its label weights, what was said and the loss"
    order = 60
    def before_fit(self): self.pages = []
    def after_loss(self):
        plan = next((cb.plan for cb in self.learn.cbs if isinstance(cb, MixCallback)), None)
        self.pages.append(dict(plan=plan, lam=plan and plan.lam, weights=plan and plan.label_weights, pred=self.learn.pred.detach(),
            loss=self.learn.loss.detach(), y=self.learn.yb[0], xb=self.learn.xb))

def close(a, b, tol=1e-4): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)
def fitted(cb, model, batches, loss_func=None, n_inp=1, cbs=(), lr=0., seed=0, notes=True):
    set_seed(seed)
    dls = DataLoaders(batches, [])
    dls.n_inp = n_inp
    learn = Learner(dls, model, loss_func or CrossEntropyLossFlat(), SGD, lr=lr, cbs=[*L(cb), *[Notes()]*notes, *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn
def pages(*args, **kwargs): return fitted(*args, **kwargs).notes.pages
def weighed(items, page, norm=None, reduction='mean'):
    "The loss by its definition, for the label weights of a page; a mean is over what is mixed of the items"
    own,partner = page['weights']
    y,y1 = page['y'],page['y'][page['plan'].index]
    losses = own*items(page['pred'], y) + partner*items(page['pred'], y1)
    if reduction != 'mean': return losses.sum() if reduction == 'sum' else losses
    if norm is None: return losses.mean()
    lam = page['lam'] if page['plan'].scale is not None else own
    return losses.sum() / (lam*norm(y) + (1-lam)*norm(y1)).sum()

class Small(nn.Module):
    "A convolutional network with dropout and batch norm"
    def __init__(self, c=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.pool,self.drop,self.head = nn.AdaptiveAvgPool2d(1),nn.Dropout(.5),nn.Linear(12, C)
    def forward(self, x): return self.head(self.drop(self.pool(self.body(x)).flatten(1)))

def vit(**kwargs): return tv.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=C, **kwargs)
def pictures(n=N, size=(32, 32), seed=0): return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))

# ReMix

def remix_by_hand(lam, ni, nj, kappa, tau):
    if ni/nj >= kappa and lam < tau: return 0.
    return 1. if ni/nj <= 1/kappa and 1-lam < tau else lam

@pytest.mark.parametrize('kappa,tau', [(3., .5), (1., .5), (2., 0.), (1.5, 1.), (10., .3), (3., .9)])
def test_remix_by_the_formula(kappa, tau):
    g = torch.Generator().manual_seed(0)
    ni,nj = torch.randint(1, 100, (2, 5000), generator=g).float()
    lam = torch.rand(5000, generator=g).mul(20).round()/20
    exact = (ni/nj - kappa).abs().minimum((nj/ni - kappa).abs()) > 1e-5
    want = torch.tensor([remix_by_hand(l.item(), a.item(), b.item(), kappa, torch.tensor(tau).item()) for l,a,b in zip(lam, ni, nj)])
    if kappa == 1: exact &= ni != nj # a class is not rarer than itself
    edge = ((lam-tau).abs() < 1e-6) | ((1-lam-tau).abs() < 1e-6)
    close(remix_lam(lam, ni, nj, kappa, tau)[exact & ~edge], want[exact & ~edge])

COUNTS = torch.tensor([100., 30, 10, 3, 1])
REMIXED = dict(
    MixUp=lambda **kw: MixUp(1., fold=False, **kw), CutMix=CutMix, FMix=FMix,
    ManifoldMixUp=lambda **kw: ManifoldMixUp(1., layers='body.2', fold=False, **kw),
    method=lambda **kw: ManifoldMixUp(method=CutMix(), layers='body.2', **kw),
    AlignMixUp=lambda **kw: AlignMixUp(layers='body.2', **kw), RegMixUp=lambda **kw: RegMixUp(1., fold=False, **kw),
    by_batch=lambda **kw: RandomMix([MixUp(1., fold=False), CutMix()], **kw),
    by_item=lambda **kw: RandomMix([MixUp(1., fold=False), CutMix()], per='item', **kw),
    previous=lambda **kw: MixUp(1., fold=False, pairing=DifferentClass(), **kw))
@pytest.mark.slow
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('name', REMIXED)
def test_remix_in_each_method(name, reduction):
    class Scalar(Callback):
        order = 61
        def after_loss(self): self.learn.loss_grad = self.learn.loss = self.learn.loss_grad.mean()
    loss_func = nn.CrossEntropyLoss(W, reduction=reduction)
    data,changed = [(pictures(seed=i), Y.roll(i)) for i in range(6)],0
    for page in pages(REMIXED[name](labels=ReMix(counts=COUNTS)), Small(), data, loss_func, cbs=[Scalar()]):
        y,y1 = page['y'],page['y'][page['plan'].index]
        want = torch.tensor([remix_by_hand(l.item(), a.item(), b.item(), 3., .5) for l,a,b in zip(page['lam'], COUNTS[y], COUNTS[y1])])
        close(page['weights'][0], want)
        close(page['weights'][1], 1-want)
        changed += (want != page['lam']).any().item()
        if name == 'RegMixUp': continue
        close(page['loss'], weighed(partial(F.cross_entropy, weight=W, reduction='none'), page, W.__getitem__, reduction))
    assert changed

def test_remix_counts_what_it_has_seen():
    set_seed(0)
    data = [(torch.randn(8, 4), torch.tensor([0]*5 + [1, 1, 2])), (torch.randn(8, 4), torch.tensor([1]*8)),
        (torch.randn(8, 4), torch.tensor([4]*7 + [2]))]
    seen = torch.zeros(C)
    for page in pages(MixUp(1., fold=False, labels=ReMix()), nn.Linear(4, C), data*3):
        y,y1 = page['y'],page['y'][page['plan'].index]
        seen += y.bincount(minlength=C)
        close(page['weights'][0], torch.tensor([remix_by_hand(l.item(), a.item(), b.item(), 3., .5) for l,a,
            b in zip(page['lam'], seen[y], seen[y1])]))

def test_remix_counts_anew_in_each_fit():
    cb = MixUp(1., fold=False, labels=(remix := ReMix()))
    learn = fitted(cb, nn.Linear(4, C), [(torch.randn(N, 4), Y)])
    assert cb.fit is None
    class Look(Callback):
        order = 60
        def after_loss(self): self.counts = self.learn.mix_up.fit.memory[remix].clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[look := Look()])
    close(look.counts, Y.bincount(minlength=C).float())

@pytest.mark.parametrize('ignore_index', [-100, -1, 255])
def test_remix_does_not_count_ignored_items(ignore_index):
    class Look(Callback):
        order = 60
        def after_loss(self): self.counts, = (c.clone() for c in self.learn.mix_up.fit.memory.values())
    y = torch.tensor([0, 1, ignore_index, 1, ignore_index, 2])
    fitted(MixUp(1., labels=ReMix()), nn.Linear(4, C), [(torch.randn(N, 4), y)], nn.CrossEntropyLoss(ignore_index=ignore_index),
        cbs=[look := Look()])
    close(look.counts, torch.tensor([1., 2, 1, 0, 0]))

def test_remix_leaves_lam_to_ignored_items():
    y = torch.tensor([-100, 1, -100, 1, -100, 2])
    for page in pages(MixUp(1., fold=False, labels=ReMix(counts=[1000, 1, 1, 1, 1])), nn.Linear(4, C), [(torch.randn(N, 4), y)]*10):
        ignored = (y < 0) | (y[page['plan'].index] < 0)
        close(page['weights'][0][ignored], page['lam'][ignored])

@pytest.mark.parametrize('ignore_index', [-100, 2])
@pytest.mark.parametrize('make', [lambda i: nn.CrossEntropyLoss(W, ignore_index=i), lambda i: LabelSmoothingCE(.1, W, ignore_index=i)],
    ids=['torch', 'smoothed'])
def test_remix_and_ignore_index(make, ignore_index):
    y = torch.tensor([0, 1, ignore_index, 3, 1, ignore_index])
    eps = .1 if isinstance(make(0), LabelSmoothingCE) else 0.
    for page in pages(MixUp(1., fold=False, labels=ReMix(counts=COUNTS)), nn.Linear(4, C), [(torch.randn(N, 4), y)]*4, make(ignore_index)):
        close(page['loss'], weighed(partial(F.cross_entropy, weight=W, reduction='none', ignore_index=ignore_index, label_smoothing=eps),
            page, lambda y: (y != ignore_index)*W[y.clamp_min(0)]))

@pytest.mark.parametrize('make', [lambda: ReMix(kappa=.5), lambda: ReMix(tau=2), lambda: ReMix(counts=[[1.]]), lambda: ReMix(counts=[-1.]),
    lambda: MixUp(labels=ReMix), lambda: MixUp(labels='remix'), lambda: RandomMix([MixUp(labels=ReMix())]),
                                  lambda: RegMixUp(method=MixUp(labels=ReMix()))])
def test_bad_remix_is_refused(make):
    with pytest.raises((TypeError, ValueError), match='kappa|tau|counts|labels'): make()

SNAPS = [lambda: MixUp(labels=ReMix()), lambda: CutMix(labels=ReMix(counts=COUNTS)), SnapMix, TransMix,
    lambda: RandomMix([MixUp(), SnapMix()], [0., 1.]), lambda: RandomMix([MixUp(), SnapMix()], [1e-9, 1.], per='item')]
@pytest.mark.parametrize('y,loss_func', [(torch.rand(N, C), CrossEntropyLossFlat()),
    (torch.randint(2, (N, C)), nn.MultiLabelSoftMarginLoss()), (torch.randn(N, 1), MSELossFlat()),
    (torch.randint(C, (N, 32, 32)), CrossEntropyLossFlat(axis=1)), (Y, lambda p,y: F.cross_entropy(p, y))],
    ids=['soft', 'tags', 'numbers', 'masks', 'own'])
@pytest.mark.parametrize('make', SNAPS)
def test_labels_without_classes_are_refused(make, y, loss_func):
    model = vit() if make is TransMix else Small()
    with pytest.raises(ValueError, match='needs (one target that holds a class index|a loss function)'):
        fitted(make(), model, [(pictures(), y)], loss_func)

# SnapMix

def maps_by_hand(model, layer, x, y):
    "Class activation maps, one item after the other; by the gradient of the logit that the mean over the places has"
    model.eval()
    res = []
    for xi,yi in zip(x, y):
        kept = []
        handle = layer.register_forward_hook(lambda m,i,o: kept.append(o))
        logit = model(xi[None])[0,yi]
        handle.remove()
        slope, = torch.autograd.grad(logit, kept[-1])
        f = kept[-1][0].detach()
        cam = sum(f[c]*slope[0,c].mean() for c in range(len(f)))
        cam = cam - cam.min()
        res.append((cam/cam.sum()).double())
    return res

def share(cam, box, size):
    "Sum of `cam`, as constant on each of its cells, over a box of pixels"
    total = 0.
    for i in range(cam.shape[0]):
        for j in range(cam.shape[1]):
            sides = [max(0, min(hi, (k+1)*s/n) - max(lo, k*s/n))/(s/n) for (lo,hi),k,s,n in zip(box, (i, j), size, cam.shape)]
            total += cam[i,j].item()*sides[0]*sides[1]
    return total

def hidden_box(mask):
    "The box where the mask is 0, as pixels"
    at = (mask == 0).nonzero()
    return [(0, 0), (0, 0)] if not len(at) else [(at[:,d].min().item(), at[:,d].max().item()+1) for d in (0, 1)]

def source_box(plan, i, size):
    centre,side = plan.source
    box = []
    for d,n in enumerate(size):
        width = (side[i,0]*n).round().item()
        low = (centre[i,d]*n - width/2).round().clamp(0, n).item()
        box.append((low, min(low+width, n)))
    return box

def timm_convnext():
    return pytest.importorskip('timm').create_model('convnext_atto', num_classes=C, depths=(1, 1, 2, 1), dims=(8, 12, 16, 20))
CNNS = dict(resnet18=(lambda: tv.resnet18(num_classes=C), 'layer4', (64, 48)),
    wide=(lambda: tv.resnet18(num_classes=C), 'layer4', (64, 100)), convnext=(timm_convnext, 'stages', (64, 96)),
            one_place_wide=(timm_convnext, 'stages.3.downsample.0', (64, 48)), small=(Small, 'body', (64, 48)),
            odd=(Small, 'body', (31, 45)))

@pytest.mark.parametrize('name', CNNS)
def test_snapmix_by_hand(name):
    set_seed(0)
    net,layer,size = CNNS[name]
    model,x = net(),pictures(size=size)
    layer = model.get_submodule(layer)
    maps = maps_by_hand(model, layer, x, Y)
    page, = pages(SnapMix(1.), model, [(x, Y)])
    plan,(own,shown) = page['plan'],page['weights']
    mask = plan.mask(size)
    for i,j in enumerate(plan.index):
        box = hidden_box(mask[i])
        close(own[i], torch.tensor(1 - share(maps[i], box, size)), 1e-4)
        want = share(maps[j], source_box(plan, i, size), size) if (mask[i] == 0).any() else 0.
        close(shown[i], torch.tensor(want), 1e-4)
    close(page['loss'], weighed(partial(F.cross_entropy, reduction='none'), page))

def test_snapmix_shows_the_box_of_the_partner():
    "A ramp shows which places of the partner came where"
    size = 40,30
    ramp = torch.stack(torch.meshgrid(torch.arange(40.)+.5, torch.arange(30.)+.5, indexing='ij'))
    x = torch.cat([ramp.expand(N, 2, *size), torch.arange(float(N)).view(N, 1, 1, 1).expand(N, 1, *size)], 1).contiguous()
    seen = []
    model = Small()
    model.register_forward_pre_hook(lambda m,args: seen.append(args[0].clone()) if torch.is_grad_enabled() and m.training else None)
    page, = pages(SnapMix(1.), model, [(x, Y)])
    plan,mixed = page['plan'],seen[-1]
    mask = plan.mask(size)
    for i,j in enumerate(plan.index):
        inside = mask[i] == 0
        close(mixed[i,2], torch.where(inside, float(j), float(i)))
        assert torch.equal(mixed[i,:,~inside], x[i,:,~inside])
        if not inside.any(): continue
        for d,((lo,hi),(first,end)) in enumerate(zip(hidden_box(mask[i]), source_box(plan, i, size))):
            at = (torch.arange(lo, hi)+.5-lo)/(hi-lo)*(end-first) + first
            at = at.clamp(.5, size[d]-.5)
            rows = mixed[i,d][lo:hi] if d == 0 else mixed[i,d][:,lo:hi]
            got = rows[:,hidden_box(mask[i])[1][0]] if d == 0 else rows[hidden_box(mask[i])[0][0]]
            close(got, at, 1e-3)

class FunctionalReLU(Small):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 12, 3, stride=4)
    def forward(self, x): return self.head(self.pool(F.relu(self.body(x), inplace=True)).flatten(1))
@pytest.mark.parametrize('net', [FunctionalReLU, lambda: tv.DenseNet(8, (1, 1), 8, num_classes=C)], ids=['functional', 'densenet'])
def test_snapmix_of_models_that_write_into_the_last_features(net): fitted(SnapMix(), net(), [(pictures(), Y)])

def test_snapmix_of_channels_last():
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.norm,self.head = nn.Conv2d(3, 12, 4, stride=4),nn.LayerNorm(12),nn.Linear(12, C)
        def forward(self, x): return self.head(self.norm(self.body(x).permute(0, 2, 3, 1)).mean((1, 2)))
    set_seed(0)
    model,x,size = ChannelsLast(),pictures(),(32, 32)
    page, = pages(SnapMix(1.), model, [(x, Y)])
    plan = page['plan']
    maps = activation_maps(model, model.body, (x,), Y) # whose channels come first
    for i in range(N): close(page['weights'][0][i], torch.tensor(1-share(maps[i], hidden_box(plan.mask(size)[i]), size)), 1e-4)

@pytest.mark.parametrize('ignore_index', [-100, 255])
@pytest.mark.parametrize('make', [lambda i: nn.CrossEntropyLoss(W, ignore_index=i), lambda i: LabelSmoothingCE(.1, W, ignore_index=i)],
    ids=['torch', 'smoothed'])
def test_snapmix_and_ignore_index(make, ignore_index):
    y = torch.tensor([0, 1, ignore_index, 3, 1, ignore_index])
    eps = .1 if isinstance(make(0), LabelSmoothingCE) else 0.
    page, = pages(SnapMix(1.), Small(), [(pictures(), y)], make(ignore_index))
    close(page['loss'], weighed(partial(F.cross_entropy, weight=W, reduction='none', ignore_index=ignore_index, label_smoothing=eps), page,
        lambda y: (y != ignore_index)*W[y.clamp(0, C-1)]))

REDUCED = dict(
    mean=(nn.CrossEntropyLoss, {}), weighted=(nn.CrossEntropyLoss, dict(weight=W)), flat=(CrossEntropyLossFlat, dict(weight=W)),
    smoothing=(nn.CrossEntropyLoss, dict(weight=W, label_smoothing=.2)))
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('loss', REDUCED)
@pytest.mark.parametrize('name', ['SnapMix', 'TransMix', 'by_item'])
def test_losses_and_reductions(name, loss, reduction):
    class Scalar(Callback):
        order = 61
        def after_loss(self): self.learn.loss_grad = self.learn.loss = self.learn.loss_grad.mean()
    cls,kwargs = REDUCED[loss]
    cb,model = dict(SnapMix=(SnapMix(1.), Small()), TransMix=(TransMix(), vit()),
        by_item=(RandomMix([SnapMix(1.), CutMix(), MixUp()], per='item'), Small()))[name]
    weight = kwargs.get('weight')
    page, = pages(cb, model, [(pictures(), Y)], cls(reduction=reduction, **kwargs), cbs=[Scalar()])
    items = partial(F.cross_entropy, reduction='none', weight=weight, label_smoothing=kwargs.get('label_smoothing', 0.))
    close(page['loss'], weighed(items, page, None if weight is None else weight.__getitem__, reduction))

PLAIN = [nn.CrossEntropyLoss(W), CrossEntropyLossFlat(weight=W), LabelSmoothingCE(.1, W), FocalLossFlat(), LabelSmoothingCrossEntropyFlat(),
    nn.CrossEntropyLoss(W, ignore_index=1, label_smoothing=.1), nn.CrossEntropyLoss(W, reduction='sum'),
         LabelSmoothingCrossEntropyFlat(weight=W)]
@pytest.mark.parametrize('loss_func', PLAIN, ids=lambda o: type(o).__name__)
def test_weights_of_one_are_the_plain_loss(loss_func):
    pred,plan = torch.randn(N, C, generator=torch.Generator().manual_seed(0)),Plan(torch.ones(N), 1)
    for scale in None, torch.ones(N):
        plan.set_labels(torch.ones(N), scale)
        close(mixed_loss(loss_spec(loss_func), pred, (Y,), plan), loss_func(pred, Y))

def test_share_in_box_is_exact_area():
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(4, 3, 5, generator=g, dtype=torch.float64)
    edges = [tuple(torch.rand(2, 4, generator=g, dtype=torch.float64).sort(0)[0]) for _ in range(2)]
    want = torch.tensor([share(maps[i], [(edges[d][0][i].item()*s, edges[d][1][i].item()*s) for d,s in ((0, 300), (1, 500))], (300, 500))
        for i in range(4)], dtype=torch.float64)
    close(share_in_box(maps, edges), want, 1e-9)

# TransMix

def share_of_mask(attention, mask, grid):
    "Attention to what the mask leaves, patch by patch"
    h,w = mask.shape[1]//grid[0],mask.shape[2]//grid[1]
    cells = torch.stack([torch.stack([mask[:,i*h:(i+1)*h,j*w:(j+1)*w].float().mean((1, 2)) for j in range(grid[1])], 1)
        for i in range(grid[0])], 1).flatten(1)
    return (attention*cells).sum(1)/attention.sum(1)

def grab(model, layer, seen):
    return layer.register_forward_pre_hook(lambda m,args,kwargs: seen.append([o for o in (*args, *kwargs.values())
        if isinstance(o, Tensor)][0].detach()) if torch.is_grad_enabled() else None, with_kwargs=True)

def timm_attention(layer, x, prefix):
    n,t,c = x.shape
    q,k,_ = layer.qkv(x).view(n, t, 3, layer.num_heads, c//layer.num_heads).permute(2, 0, 3, 1, 4)
    a = (q @ k.transpose(-2, -1) / (c//layer.num_heads)**.5).softmax(-1).mean(1)
    return a[:,0,prefix:] if prefix else a.mean(1)

def timm_vit(size=(32, 32), **kwargs):
    from timm.models.vision_transformer import VisionTransformer
    return VisionTransformer(size, 8, num_classes=C, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2., **kwargs)
SIZES = [(32, 32), (48, 32), (48, 64)]
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('kwargs,prefix', [({}, 1), (dict(reg_tokens=4), 5), (dict(class_token=False, global_pool='avg'), 0),
    (dict(qk_norm=True, attn_drop_rate=.3, pos_drop_rate=.2), 1), (dict(global_pool='avg'), 1)],
    ids=['class', 'registers', 'pooled', 'dropout', 'pooled_with_class'])
def test_transmix_of_timm(kwargs, prefix, size):
    pytest.importorskip('timm')
    check_timm(kwargs, prefix, size)

def check_timm(kwargs, prefix, size):
    set_seed(0)
    model,seen = timm_vit(size, **kwargs),[]
    for p in model.parameters(): nn.init.normal_(p, std=.3)
    layer = model.blocks[-1].attn
    grab(model, layer, seen)
    for page,x in zip(pages(TransMix(attention=1), model, [(pictures(size=size, seed=i), Y) for i in range(3)], LabelSmoothingCE(.1, W)),
        seen):
        with torch.no_grad():
            qkv = timm_attention(layer, x, prefix) if not kwargs.get('qk_norm') else timm_normed(layer, x, prefix)
        grid = size[0]//8,size[1]//8
        close(page['weights'][0], share_of_mask(qkv, page['plan'].mask(size), grid))
        close(page['weights'][0] + page['weights'][1], torch.ones(N))
        close(page['loss'], weighed(partial(F.cross_entropy, weight=W, reduction='none', label_smoothing=.1), page, W.__getitem__))

def timm_normed(layer, x, prefix):
    n,t,c = x.shape
    q,k,_ = layer.qkv(x).view(n, t, 3, layer.num_heads, c//layer.num_heads).permute(2, 0, 3, 1, 4)
    a = (layer.q_norm(q) @ layer.k_norm(k).transpose(-2, -1) / (c//layer.num_heads)**.5).softmax(-1).mean(1)
    return a[:,0,prefix:]

def test_transmix_with_registers_on_few_rows(): check_timm(dict(reg_tokens=4), 5, (24, 32))

@pytest.mark.parametrize('patch', [8, 14, 16])
@pytest.mark.parametrize('prefix', [0, 1, *(n for n in (2, 5))])
def test_grids_of_patches(prefix, patch):
    wrong = [(h, w) for h in range(2, 21) for w in range(2, 21) if h*w > 4 and patch_grid(h*w+prefix, (h*patch, w*patch)) != (h, w)]
    assert not wrong

@pytest.mark.parametrize('dropout', [0., .4])
def test_transmix_of_torchvision(dropout):
    set_seed(0)
    model,seen = vit(attention_dropout=dropout, dropout=dropout),[]
    for p in model.parameters(): nn.init.normal_(p, std=.3)
    layer = model.encoder.layers[-1].self_attention
    grab(model, layer, seen)
    for page,x in zip(pages(TransMix(attention=1), model, [(pictures(seed=i), Y) for i in range(3)], CrossEntropyLossFlat()), seen):
        q,k,_ = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).detach().unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / 8**.5).softmax(-1).mean(1)[:,0,1:]
        close(page['weights'][0], share_of_mask(attention, page['plan'].mask((32, 32)), (4, 4)))
        close(page['loss'], weighed(partial(F.cross_entropy, reduction='none'), page))

class Hugging(nn.Module):
    def __init__(self, size=(32, 32), attn='sdpa'):
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification
        self.vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=size, patch_size=8, num_labels=C, attn_implementation=attn, attention_probs_dropout_prob=.2, hidden_dropout_prob=.2))
    def forward(self, x): return self.vit(x).logits

@pytest.mark.parametrize('size', [(32, 32), (48, 32)], ids=str)
def test_transmix_of_hugging_face(size):
    pytest.importorskip('transformers')
    set_seed(0)
    model = Hugging(size)
    for p in model.parameters(): nn.init.normal_(p, std=.3)
    seen = {}
    def linear(name): return [m for n,m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(name)][-1]
    names = ('query', 'key') if any(n.endswith('query') for n,_ in model.named_modules()) else ('q_proj', 'k_proj')
    for name in names:
        linear(name).register_forward_hook(lambda m,i,o,name=name: seen.setdefault(name, []).append(o.detach()) if o.requires_grad
            else None)
    got = pages(TransMix(attention=1), model, [(pictures(size=size, seed=i), Y) for i in range(3)])
    for page,q,k in zip(got, seen[names[0]], seen[names[1]]):
        q,k = (o.unflatten(-1, (2, 8)).transpose(1, 2) for o in (q, k))
        attention = (q @ k.transpose(-2, -1) / 8**.5).softmax(-1).mean(1)[:,0,1:]
        close(page['weights'][0], share_of_mask(attention, page['plan'].mask(size), (size[0]//8, size[1]//8)))

class Blocks(nn.Module):
    "Calls torch's attention several times in one layer"
    def __init__(self):
        super().__init__()
        self.patches,self.a,self.b,self.head,self.drop = nn.Conv2d(3, 8, 8, 8),nn.Linear(8, 8),nn.Linear(8, 8),nn.Linear(8,
            C),nn.Dropout(.5)
    def forward(self, x):
        t = self.patches(x).flatten(2).transpose(1, 2)
        t = self.drop(torch.cat([t.mean(1, keepdim=True), t], 1))[:,None]
        t = t + F.scaled_dot_product_attention(self.a(t), t, t)
        q = self.b(t)
        self.qk = q.detach(),t.detach()
        return self.head((t + F.scaled_dot_product_attention(q, t, t))[:,0,0])

def test_transmix_of_attention_and_area():
    "The rule of the authors' code: the mean of both"
    for share in (.5, 0., .25):
        set_seed(0)
        (page,),(alone,) = (pages(TransMix(attention=a) if a != .5 else TransMix(), vit(), [(pictures(), Y)]) for a in (share, 1.))
        close(page['lam'], alone['lam'])
        close(page['weights'][0], share*alone['weights'][0] + (1-share)*page['lam'])
        assert (alone['weights'][0]-alone['lam']).abs().max() > 1e-3

@pytest.mark.parametrize('y', [Y, torch.tensor([0, 1, -100, 3, 1, -100])], ids=['all', 'some'])
def test_progressive_attention(y):
    "The rule of MixPro's code: attention counts by the cosine between the prediction and the labels mixed by area"
    set_seed(0)
    model = vit()
    for p in model.parameters(): nn.init.normal_(p, std=.3)
    state = {k: v.clone() for k,v in model.state_dict().items()}
    def run(attention):
        model.load_state_dict(state)
        set_seed(0)
        return pages(TransMix(attention=attention), model, [(pictures(), y)])[0]
    page,alone = run('progressive'),run(1.)
    onehot = torch.stack([F.one_hot(o, C) if o >= 0 else torch.zeros(C) for o in y]).float()
    area = page['lam'][:,None]*onehot + (1-page['lam'])[:,None]*onehot[page['plan'].index]
    p = page['pred'].softmax(1)
    share = (area*p).sum(1)/(area.norm(dim=1)*p.norm(dim=1)).clamp_min(1e-8)
    close(page['weights'][0], share*alone['weights'][0] + (1-share)*page['lam'])
    assert share.max()-share.min() > .1 and (alone['weights'][0]-alone['lam']).abs().max() > 1e-3
    close(page['loss'], weighed(partial(F.cross_entropy, reduction='none'), page, lambda y: (y >= 0).float()))

@pytest.mark.parametrize('attention', [-.1, 1.5, 'all', None])
def test_bad_share_of_attention(attention):
    with pytest.raises((TypeError, ValueError), match='attention must be a number from 0 to 1'): TransMix(attention=attention)

def test_transmix_takes_the_last_call():
    set_seed(0)
    model = Blocks()
    model.drop.p = 0.
    page, = pages(TransMix(attention=1), model, [(pictures(), Y)])
    q,k = model.qk
    close(page['weights'][0], share_of_mask((q @ k.transpose(-2, -1) / 8**.5).softmax(-1)[:,0,0,1:], page['plan'].mask((32, 32)), (4, 4)))

def swin():
    return pytest.importorskip('timm').create_model('swin_tiny_patch4_window7_224', img_size=32, window_size=2, embed_dim=8, depths=(2, 1),
        num_heads=(1, 2), num_classes=C)
def tv_swin(): return tv.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [2, 2], num_classes=C)
def eager(): return Hugging(attn='eager') if pytest.importorskip('transformers') else None
@pytest.mark.parametrize('net', [Small, lambda: tv.resnet18(num_classes=C), swin, tv_swin, eager],
    ids=['small', 'resnet', 'swin', 'tv_swin', 'eager'])
def test_models_without_attention_are_refused(net):
    with pytest.raises(ValueError, match='TransMix.*Use `CutMix`'): fitted(TransMix(), net(), [(pictures(), Y)])
    assert not modules._global_forward_hooks and not modules._global_forward_pre_hooks

def test_snapmix_refuses_models_without_places():
    with pytest.raises(ValueError, match='SnapMix.*`CutMix`'):
        fitted(SnapMix(), nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, C)), [(pictures(), Y)])
    with pytest.raises(ValueError, match='SnapMix needs inputs with spatial dimensions'):
        fitted(SnapMix(), nn.Linear(4, C), [(torch.randn(N, 4), Y)])

# both

BOTH = dict(SnapMix=(SnapMix, Small), TransMix=(TransMix, lambda: vit(dropout=.3, attention_dropout=.3)),
    snap_by_batch=(lambda: RandomMix([SnapMix(), MixUp()]), Small),
    snap_by_item=(lambda: RandomMix([SnapMix(), MixUp()], per='item'), Small),
            trans_by_item=(lambda: RandomMix([TransMix(), MixUp()], per='item'), lambda: vit(dropout=.3)))
def state(model): return {k: v.clone() for k,v in model.state_dict().items()}

class Drops(nn.Dropout):
    "Remembers its masks"
    def forward(self, x):
        out = super().forward(x)
        if self.training and torch.is_grad_enabled(): self.masks = [*getattr(self, 'masks', []), (out == 0) & (x != 0)]
        return out

@pytest.mark.parametrize('name', BOTH)
def test_model_is_left_as_it_was(name):
    make,net = BOTH[name]
    def run(cb):
        set_seed(0)
        model = net()
        for m in list(model.modules()):
            for k,child in list(m.named_children()):
                if type(child) is nn.Dropout: setattr(m, k, Drops(child.p))
        passes = []
        class Check(Callback):
            order = 20
            def before_batch(self):
                "Between mixing and the forward pass nothing has changed"
                passes.append(([m.training for m in model.modules()], [p.grad is None for p in model.parameters()],
                    [b.clone() for b in model.buffers()], torch.get_rng_state(), torch.is_grad_enabled(),
                    [set(vars(m)) - {'masks'} for m in model.modules()]))
        fitted(cb, model, [(pictures(seed=i), Y) for i in range(3)], cbs=[Check()], seed=3)
        return passes,[m.masks for m in model.modules() if isinstance(m, Drops)],torch.get_rng_state()
    (a,drops_a,end_a),(b,drops_b,end_b) = run(make()),run([])
    for p,q in zip(a, b):
        assert p[0] == q[0] and p[1] == q[1] and p[4] and torch.equal(p[3], q[3]) and p[5] == q[5]
    for u,v in zip(a[0][2], b[0][2]): assert torch.equal(u, v)
    assert torch.equal(end_a, end_b) and [len(o) for o in drops_a] == [len(o) for o in drops_b] and drops_a

def test_dropout_before_attention():
    def run(cb):
        model = Blocks()
        fitted(cb, model, [(pictures(), Y)], seed=3)
        return torch.get_rng_state()
    assert torch.equal(run(TransMix()), run([]))

class Stops(Callback):
    run_valid = False
    def __init__(self, at, exc, order=70):
        self.order = order
        setattr(self, at, self.stop)
        self.exc,self.done = exc,False
    def stop(self):
        if self.done: return
        self.done = True
        raise self.exc('stop')

@pytest.mark.slow
@pytest.mark.parametrize('exc', [CancelBatchException, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize('at', ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_batch'])
@pytest.mark.parametrize('name', BOTH)
def test_no_hook_is_left(name, at, exc):
    make,net = BOTH[name]
    model = net()
    try: fitted(make(), model, [(pictures(), Y)]*2, cbs=[Stops(at, exc)], notes=False)
    except exc: pass
    gc.collect()
    if exc is CancelBatchException and at != 'after_batch': assert not modules._global_forward_hooks
    model(pictures()) # where nobody could be told of the end, the next call finds out
    assert not modules._global_forward_hooks and not modules._global_forward_pre_hooks and not any(m._forward_hooks
        for m in model.modules())
    assert len({m.training for m in model.modules()}) == 1

@pytest.mark.parametrize('make', [TransMix, lambda: RandomMix([TransMix(), MixUp()]), lambda: ManifoldMixUp(method=TransMix()),
    lambda: RandomMix([TransMix(), MixUp()], per='item')], ids=['alone', 'batch', 'manifold', 'item'])
def test_hooks_go_with_their_batch(make):
    class Count(Callback):
        order = 60
        def before_fit(self): self.seen = []
        def after_loss(self): self.seen.append(len(modules._global_forward_hooks))
    gc.collect()
    gc.disable()
    try: fitted(make(), vit(), [(pictures(), Y)]*6, cbs=[count := Count()], notes=False)
    finally: gc.enable()
    assert max(count.seen) <= 2

def test_hooks_with_keywords_are_forgotten_too(request):
    before = len(modules._global_forward_hooks_with_kwargs)
    fitted(TransMix(), vit(), [(pictures(), Y)]*3)
    assert len(modules._global_forward_hooks_with_kwargs) == before

@pytest.mark.parametrize('per', ['batch', 'item'])
@pytest.mark.parametrize('kind', ['snap', 'trans'])
def test_inside_of_a_random_choice(kind, per):
    own,model = (SnapMix(1.), Small()) if kind == 'snap' else (TransMix(), vit())
    model.eval()
    got = pages(RandomMix([own, CutMix(), MixUp()], [.5, .2, .2], per=per), model, [(pictures(seed=i), Y) for i in range(16)])
    weighed_otherwise = 0
    for page in got:
        if page['plan'] is None: continue
        close(page['loss'], weighed(partial(F.cross_entropy, reduction='none'), page))
        differs = (page['weights'][0] - page['lam']).abs() > 1e-5
        weighed_otherwise += differs.float().mean().item()
        if per == 'item': assert not differs[page['plan'].choice > 0].any()
    assert .15 < weighed_otherwise/16 < .75

@pytest.mark.parametrize('off', [lambda: SnapMix(0), lambda: SnapMix(lambda pct: 0.), lambda: TransMix(0)],
    ids=['SnapMix', 'scheduled', 'TransMix'])
def test_off_inside_of_a_random_choice_by_item(off, request):
    fitted(RandomMix([off(), MixUp()], per='item'), vit() if isinstance(off(), TransMix) else Small(), [(pictures(), Y)])

def test_transmix_beside_the_clean_batch(): fitted(RegMixUp(method=TransMix()), vit(), [(pictures(), Y)])

def test_snapmix_beside_the_clean_batch():
    page, = pages(RegMixUp(method=SnapMix(1.), eta=.5), model := Small().eval(), [(pictures(), Y)])
    assert (page['weights'][0]+page['weights'][1]).std() > 0

def test_snapmix_with_the_previous_batch(): fitted(SnapMix(pairing=PreviousBatch()), Small(), [(pictures(seed=i), Y) for i in range(3)])

def test_transmix_with_the_previous_batch():
    for page in pages(TransMix(pairing=PreviousBatch()), vit(), [(pictures(seed=i), Y) for i in range(3)])[1:]:
        close(sum(page['weights']), torch.ones(N))

@pytest.mark.parametrize('name', ['SnapMix', 'TransMix'])
def test_another_class_as_partner(name):
    make,net = BOTH[name]
    for page in pages(make(pairing=DifferentClass()), net(), [(pictures(), Y)]*3):
        assert (page['y'][page['plan'].index] != page['y']).all()
        close(page['loss'], weighed(partial(F.cross_entropy, reduction='none'), page))

@pytest.mark.parametrize('make', [lambda: RandomMix([SnapMix(), CutMix()]), lambda: RandomMix([SnapMix(), CutMix()], per='item'), SnapMix,
    lambda: RegMixUp(method=RandomMix([SnapMix()]))], ids=['batch', 'item', 'alone', 'nested'])
def test_the_same_callback_on_another_model(make):
    cb = make()
    for _ in range(2):
        learn = fitted(cb, Small(), [(pictures(), Y)]*4)
        learn.remove_cb(cb)
        cb.learn = None

def test_last_of_one_item():
    for make,net in BOTH.values():
        fitted(make(), net().eval() if net is Small else net(),
            [(pictures(), Y), (pictures(2), Y[:2]), (pictures(1), Y[:1])] if net is not Small else [(pictures(), Y), (pictures(2), Y[:2])])
