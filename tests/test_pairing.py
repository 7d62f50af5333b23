"Partners are of the kind that was asked for, and whoever they are, the loss is that of the mixing matrix."
import copy
import gc
import random
import weakref
from functools import partial
from types import SimpleNamespace

import fastai.callback.schedule  # noqa: F401, gives Learner `lr_find`
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import (
    SGD,
    BCEWithLogitsLossFlat,
    Callback,
    CancelFitException,
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    MSELossFlat,
    nn,
)
from fastai.callback.training import GradientAccumulation
from fastai.data.all import Datasets
from fastai.learner import load_learner
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import TensorImage, TensorMask
from oracle import BS, C, N, Net, batches, check, close, fit, learner, mixed_losses, mixed_targets, plain, shared_lam
from scipy import stats
from sklearn.neighbors import KernelDensity
from torch.utils.data import DataLoader as TorchLoader

from fastai_mixup.all import *
from fastai_mixup.batch import Batch, Draws
from fastai_mixup.pairing import different_class, near_log_weights, same_class
from fastai_mixup.probe import same_draws

IDS = torch.arange(N)
OTHER,SAME = IDS % 5,torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4])
W = torch.tensor([1., 3., .5, 2., .2])
def ring(batch): return torch.arange(batch.n).roll(1)
def by_class(learn): return learn.yb[0]

PAIRINGS = dict(other=(DifferentClass, OTHER), same=(SameClass, SAME), near=(partial(NearTarget, .3, by_class), OTHER),
    own=(lambda: ring, OTHER))
METHODS = dict(
    MixUp=partial(MixUp, 1.), batch=partial(MixUp, 1., per='batch'), CutMix=CutMix, FMix=FMix, ResizeMix=ResizeMix, SaliencyMix=SaliencyMix,
    by_batch=lambda pairing: RandomMix([MixUp(1., pairing=pairing), CutMix(pairing=pairing), ResizeMix(pairing=pairing)]),
    by_item=lambda pairing: RandomMix([MixUp(1.), CutMix(), ResizeMix()], per='item', pairing=pairing))
def CE(pred, y, **kwargs): return F.cross_entropy(pred, y, reduction='none', **kwargs)
def own(pred, y): return F.cross_entropy(pred, y)**2
INDEX = dict(
    CE=(CrossEntropyLossFlat(), partial(mixed_losses, CE)), smoothed=(LabelSmoothingCE(.1),
    partial(mixed_losses, partial(CE, label_smoothing=.1))),
    weighted=(nn.CrossEntropyLoss(W), partial(mixed_losses, partial(CE, weight=W), norm=W.__getitem__)),
    sum=(nn.CrossEntropyLoss(reduction='sum'), partial(mixed_losses, CE, reduction='sum')),
    none=(CrossEntropyLossFlat(reduction='none'), partial(mixed_losses, CE, reduction='none')), own=(own, partial(shared_lam, own)))
TAGS = torch.randint(2, (N, C), generator=torch.Generator().manual_seed(0)).float()
NUMBERS = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
FLOAT = dict(MSE=(MSELossFlat(), F.mse_loss, NUMBERS), BCE=(BCEWithLogitsLossFlat(), F.binary_cross_entropy_with_logits, TAGS),
    own=(lambda p,y: (p-y).abs().max(), lambda p,y: (p-y).abs().max(), NUMBERS))

def pictures(size=(6, 7)): return torch.eye(N).view(N, N, *[1]*len(size)).expand(N, N, *size).contiguous()
def mean(x): return x.flatten(2).mean(2) if x.ndim > 2 else x
def partner(M, ids):
    "Of each row, -1 where there is nobody else"
    rest = M.clone()
    rest[range(len(ids)),ids] = 0
    return torch.where(rest.amax(1) > 1e-6, rest.argmax(1), -1)
def with_others(page): return not torch.equal(page.M, torch.eye(N)[page.ids])

def pages(cb, y, loss_func, epochs=2, x=None, bs=BS, **kwargs):
    torch.manual_seed(1)
    data = batches((pictures() if x is None else x,), (y,), bs)
    return fit(learner(data, loss_func, Net(encode=mean), cb, bs=bs, **kwargs), epochs)

@pytest.mark.slow
@pytest.mark.parametrize('loss', INDEX)
@pytest.mark.parametrize('pairing', PAIRINGS)
@pytest.mark.parametrize('name', METHODS)
def test_classes(name, pairing, loss):
    make,y = PAIRINGS[pairing]
    if (name, loss) == ('by_item', 'own'): pytest.skip('see `test_pairing_of_a_random_choice`')
    loss_func,want = INDEX[loss]
    seen = pages(METHODS[name](pairing=make()), y, loss_func)
    assert sum(map(with_others, seen))
    for page in seen:
        check(page, want(y), with_others(page), 2e-4)
        met = partner(page.M, page.ids)
        here = met[met >= 0]
        if pairing == 'other': assert (y[here] != y[page.ids][met >= 0]).all()
        if pairing == 'same': assert (y[here] == y[page.ids][met >= 0]).all()
        if pairing == 'own': assert (here == page.ids.roll(1)[met >= 0]).all()

@pytest.mark.parametrize('loss', FLOAT)
@pytest.mark.parametrize('pairing', [NearTarget, lambda: ring], ids=['near', 'own'])
@pytest.mark.parametrize('name', METHODS)
def test_numbers(name, pairing, loss):
    loss_func,want,y = FLOAT[loss]
    seen = pages(METHODS[name](pairing=pairing()), y, loss_func)
    assert sum(map(with_others, seen))
    for page in seen: check(page, mixed_targets(want, y), with_others(page), 2e-4)

@pytest.mark.parametrize('how', [dict(layers='encode', include_input=False), dict(layers='output')], ids=['hidden', 'output'])
@pytest.mark.parametrize('pairing', PAIRINGS)
def test_hidden(how, pairing):
    make,y = PAIRINGS[pairing]
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode,self.head = nn.Linear(N, N, bias=False),nn.Linear(N, N, bias=False)
            for layer in (self.encode, self.head): layer.requires_grad_(False).weight.copy_(torch.eye(N))
            self.scale = nn.Parameter(torch.ones(1))
        def forward(self, x): return self.head(self.encode(x))*self.scale
    class Said(Callback):
        order = 60
        def before_fit(self): self.seen = []
        def after_loss(self): self.seen.append((self.learn.pred.detach(), self.learn.loss.detach()))
    said = Said()
    torch.manual_seed(0)
    learn = learner(batches((torch.eye(N),), (y,)), CrossEntropyLossFlat(), Layers(), None)
    learn.remove_cbs(learn.cbs.filter(lambda cb: type(cb).__name__ == 'Witness'))
    learn.add_cbs([ManifoldMixUp(1., pairing=make(), **how), said])
    with learn.no_logging(): learn.fit(2, 0.)
    for (pred,loss),ids in zip(said.seen, list(IDS.split(BS))*2):
        close(loss, mixed_losses(CE, y)(pred, pred, ids))
        met = partner(pred, ids)
        if pairing == 'other': assert (y[met[met >= 0]] != y[ids][met >= 0]).all()
        if pairing == 'same': assert (y[met[met >= 0]] == y[ids][met >= 0]).all()

@pytest.mark.slow
@pytest.mark.parametrize('loss', INDEX)
@pytest.mark.parametrize('pairing', PAIRINGS)
@pytest.mark.parametrize('method', [None, CutMix, partial(MixUp, 1.), FMix])
def test_beside_the_clean_batch(method, pairing, loss):
    make,y = PAIRINGS[pairing]
    loss_func,want = INDEX[loss]
    cb = RegMixUp(2., eta=.7, pairing=make()) if method is None else RegMixUp(eta=.7, method=method(pairing=make()))
    def both(M, pred, ids):
        n = len(ids)
        close(M[:n], torch.eye(N)[ids])
        return want(y)(M[:n], pred[:n], ids) + .7*want(y)(M[n:], pred[n:], ids) if loss != 'own' else own(pred[:n],
            y[ids]) + .7*want(y)(M[n:], pred[n:], ids)
    for page in pages(cb, y, loss_func): check(page, both, tol=2e-4)

@pytest.mark.parametrize('per', ['batch', 'item'])
@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), own], ids=['CE', 'own'])
def test_pairing_of_a_random_choice(per, loss, request):
    "Given to `RandomMix` itself, it holds for all methods"
    for page in pages(RandomMix([MixUp(1.), CutMix()], per=per, pairing=ring), OTHER, loss, 6):
        met = partner(page.M, page.ids)
        assert (met == page.ids.roll(1))[met >= 0].all()

def kinds(y):
    "How often each meets each, over many draws of both pairings"
    g = torch.Generator().manual_seed(0)
    return [torch.stack([f(y, g) for _ in range(1200)]) for f in (different_class, same_class)]

COUNTS = [(1,), (5,), (1, 1), (3, 1), (2, 2), (5, 2, 1), (4, 4), (6, 1, 1, 1), (2, 3, 4), (1, 1, 1, 1, 1), (9, 3), (4, 3, 1)]
@pytest.mark.slow
@pytest.mark.parametrize('counts', COUNTS, ids=str)
def test_partners_of_classes(counts):
    y = torch.repeat_interleave(torch.tensor([7, -3, 40, 2, 0][:len(counts)]), torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    n,at = len(y),torch.arange(len(y))
    other,same = kinds(y)
    alone = other == at
    assert ((y[other] != y) | alone).all() and (y[same] == y).all()
    most = max(counts)
    assert (alone.sum(1) == max(0, 2*most-n)).all(), 'as few as can be are left alone'
    assert ((same == at) == torch.tensor([(y == c).sum() == 1 for c in y])).all()
    for perm in same, other if 2*most <= n else same: assert (perm.sort(1)[0] == at).all()
    met = F.one_hot(same, n).float().mean(0)
    want = ((y == y[:,None]) & ~torch.eye(n, dtype=torch.bool)).float()
    close(met, torch.where(want.sum(1, keepdim=True) > 0, want/want.sum(1, keepdim=True).clamp_min(1), torch.eye(n)), .08)
    if 2*most <= n: assert (F.one_hot(other, n).float().mean(0) > 0)[(y != y[:,None])].all() or len(set(counts)) > 1
    if len(set(counts)) == 1 and len(counts) > 1:
        want = (y != y[:,None]).float()
        close(F.one_hot(other, n).float().mean(0), want/want.sum(1, keepdim=True), .08)

@pytest.mark.parametrize('pairing', [DifferentClass, SameClass])
def test_class_targets_of_other_shapes_and_types(pairing):
    y = torch.tensor([0, 1, 0, 1, 2, 2])
    for target in y, y[:,None], y.int(), y.to(torch.uint8), y.bool(), y.view(6, 1, 1):
        perm = pairing()(Batch((), (target,), 6))
        flat = target.flatten()
        assert ((flat[perm] != flat) | (perm == torch.arange(6))).all() if pairing is DifferentClass else (flat[perm] == flat).all()
    for bad in (torch.randn(6),), (torch.zeros(6, 3, dtype=torch.long),), (), ('a',), (None,):
        with pytest.raises(ValueError, match=f'pairing={pairing.__name__}.*class index'): pairing()(Batch((), bad, 6))

@pytest.mark.parametrize('name', METHODS)
def test_one_class_only(name):
    y = torch.full((N,), 3)
    for page in pages(METHODS[name](pairing=DifferentClass()), y, CrossEntropyLossFlat()):
        check(page, mixed_losses(CE, y), False)
    assert any(with_others(page) for page in pages(METHODS[name](pairing=SameClass()), y, CrossEntropyLossFlat()))

@pytest.mark.parametrize('loss', INDEX)
@pytest.mark.parametrize('pairing', [DifferentClass, SameClass, lambda: NearTarget(by=by_class)], ids=['other', 'same', 'near'])
def test_batches_of_one(pairing, loss):
    loss_func,want = INDEX[loss]
    for page in pages(MixUp(1., pairing=pairing()), OTHER, loss_func, 1, bs=1): check(page, want(OTHER), False)

def test_crowded_batches():
    y = torch.tensor([0]*9 + [1, 2])
    for page in pages(MixUp(1., pairing=DifferentClass()), y, CrossEntropyLossFlat(), 5, bs=N):
        check(page, mixed_losses(CE, y))
        met = partner(page.M, page.ids)
        assert (met >= 0).sum() == 4 and (y[met[met >= 0]] != y[met >= 0]).all()

def kde(at, bandwidth):
    "Sample rates as in the published code of C-Mixup, without the item itself"
    rates = np.stack([np.exp(KernelDensity(kernel='gaussian', bandwidth=bandwidth).fit(row[None]).score_samples(at)) for row in at])
    np.fill_diagonal(rates, 0)
    return rates/rates.sum(1, keepdims=True)

@pytest.mark.parametrize('unit', [1e-4, 1., 1e4])
@pytest.mark.parametrize('sigma', [.2, .5, 3., 100.])
@pytest.mark.parametrize('dims', [1, 3])
def test_near_targets_are_those_of_the_paper(dims, sigma, unit):
    at = torch.randn(12, dims, generator=torch.Generator().manual_seed(0))*unit + 3*unit
    bandwidth = sigma*at.double().var(0, correction=0).sum().sqrt().item()
    torch.testing.assert_close(near_log_weights(at, sigma).softmax(1).double(), torch.tensor(kde(at.double().numpy(), bandwidth)),
        atol=1e-5, rtol=1e-3)

@pytest.mark.parametrize('shape,by', [((7,), None), ((7, 1), None), ((7, 2), None), ((7, 2, 3), None), ((7,), lambda learn: learn.xb[0]),
    ((7,), lambda learn: (learn.yb[0]*10).long())], ids=['number', 'column', 'two', 'table', 'input', 'integer'])
def test_near_targets_are_drawn_as_often_as_in_the_paper(shape, by):
    g = torch.Generator().manual_seed(0)
    y,x,n = torch.randn(shape, generator=g),torch.randn(7, 4, generator=g),3000
    batch = Batch((x,), (y,), 7, draws=Draws(g))
    met = sum(F.one_hot(NearTarget(.6, by)(batch), 7) for _ in range(n))
    at = (y if by is None else by(batch)).reshape(7, -1).double()
    p = kde(at.numpy(), .6*at.var(0, correction=0).sum().sqrt().item())
    for i in range(7):
        used = p[i]*n > 3
        assert not met[i][torch.tensor(p[i] < 1e-9)].any()
        if used.sum() > 1:
            assert stats.chisquare(met[i].numpy()[used], p[i][used]/p[i][used].sum()*met[i].numpy()[used].sum()).pvalue > 1e-4

@pytest.mark.parametrize('at', [torch.zeros(5), torch.ones(5)*1e30, torch.tensor([0., 0, 0, 0, 1e6]), torch.arange(5.)*1e-30,
    torch.tensor([1., 1, 2, 2, 2])], ids=str)
@pytest.mark.parametrize('sigma', [1e-3, .5, 1e3])
def test_near_targets_at_the_edges(at, sigma):
    met = torch.stack([NearTarget(sigma)(Batch((), (at,), 5)) for _ in range(50)])
    assert (met != torch.arange(5)).all() and (met >= 0).all() and (met < 5).all()
    if sigma < 1 and at[0] == 1 : assert (at[met] == at).all()

def test_near_targets_far_from_zero():
    at = torch.arange(4.).double()[:,None] + 2.**30
    met = torch.stack([NearTarget(.05)(Batch((), (at,), 4)) for _ in range(20)])
    assert ((met - torch.arange(4)).abs() == 1).all()

@pytest.mark.parametrize('by', [lambda learn: learn.xb[0][:2], lambda learn: None, lambda learn: torch.tensor(1.),
    lambda learn: learn.xb[0].cfloat()], ids=['rows', 'none', 'scalar', 'complex'])
def test_what_cannot_be_near(by):
    with pytest.raises(ValueError, match='NearTarget.*row'): pages(MixUp(pairing=NearTarget(by=by)), NUMBERS, MSELossFlat())

@pytest.mark.parametrize('make', [lambda: NearTarget(0), lambda: NearTarget('a'), lambda: NearTarget(by='domain'),
    lambda: SameClass(by=-1), lambda: DifferentClass(by=True), lambda: RareClass(by=SameClass), lambda: MixUp(pairing='same'),
    lambda: MixUp(pairing=SameClass), lambda: RegMixUp(method=CutMix(), pairing=SameClass()),
    lambda: ManifoldMixUp(pairing=PreviousBatch()), lambda: ManifoldMixUp(method=CutMix(pairing=PreviousBatch())),
    lambda: AlignMixUp(pairing=PreviousBatch()), lambda: RandomMix([MixUp(pairing=SameClass())], per='item')])
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises((TypeError, ValueError), match='sigma|by must|pairing'): make()

def test_hidden_layers_have_no_previous_batch_in_a_random_choice_either():
    with pytest.raises(ValueError, match='pairing'): ManifoldMixUp(method=RandomMix([CutMix(pairing=PreviousBatch())]))

@pytest.mark.parametrize('f', [different_class, same_class], ids=['different', 'same'])
def test_classes_wait_for_no_device(f):
    perm = f(torch.zeros(9, dtype=torch.long, device='meta'), torch.Generator().manual_seed(0))
    assert perm.is_meta and perm.shape == (9,) and perm.dtype == torch.long

def test_near_targets_wait_for_no_device():
    at = torch.zeros(9, 2, device='meta')
    assert near_log_weights(at, .5).shape == (9, 9)
    assert NearTarget()(Batch((), (at,), 9)).is_meta

@pytest.mark.parametrize('pairing', [DifferentClass, SameClass, PreviousBatch, lambda: NearTarget(by=by_class)],
    ids=['other', 'same', 'previous', 'near'])
def test_own_stream(pairing):
    "Nothing is taken from torch's stream, and the same seed gives the same partners"
    def run():
        cb = MixUp(1., pairing=pairing())
        seen = pages(cb, OTHER, CrossEntropyLossFlat())
        return [p.M for p in seen],torch.get_rng_state()
    (a,state),(b,_) = run(),run()
    pages(MixUp(0.), OTHER, CrossEntropyLossFlat())
    assert all(map(torch.equal, a, b)) and torch.equal(torch.get_rng_state(), state)

class Seen(Callback):
    "What the model was given and said, and the loss"
    order,run_valid = 60,True
    def before_fit(self): self.pages = []
    def after_pred(self):
        given = self.learn.model.given
        self.pages.append(SimpleNamespace(x=given, pred=self.learn.pred.detach(), y=self.learn.yb, training=self.training))
    def after_loss(self): self.pages[-1].loss = plain(self.learn.loss).clone()

class Keeps(nn.Module):
    "Keeps what `encode` gives, which holds the number of each item, and predicts from it"
    def __init__(self, encode=lambda *xb: xb[0], head=None):
        super().__init__()
        self.encode,self.head = encode,head or nn.Linear(N, C)
    def forward(self, *xb):
        x = self.encode(*xb)
        self.given = plain(x).clone()
        return self.head(x.real.float() if x.is_complex() else x.float())

def previous(data, cb, model, loss_func, n_inp=1, epochs=1, cbs=()):
    torch.manual_seed(0)
    seen = Seen()
    learn = learner(data, loss_func, model, None, n_inp=n_inp, lr=0.)
    learn.remove_cbs(learn.cbs.filter(lambda o: type(o).__name__ == 'Witness'))
    learn.add_cbs([cb, seen, *cbs])
    with learn.no_logging(): learn.fit(epochs)
    return seen.pages

def check_previous(M, at, size, before):
    "Rows of batch `at` hold an item of their own and one of the batch `before`"
    close(M.sum(1), torch.ones(len(M)), 3e-3)
    for row,i in zip(M, at):
        rest = row.clone()
        rest[i] = 0
        assert (rest > 1e-4).sum() <= 1 and row[i] >= 0
        if (rest > 1e-4).any(): assert int(rest.argmax()) in before

def words(): return nn.Embedding.from_pretrained(torch.eye(N))
class Words(Keeps):
    def __init__(self):
        super().__init__()
        self.emb = words()
    def forward(self, x):
        x = self.emb(x).mean(1)
        self.given = plain(x).clone()
        return self.head(x)

EYE = torch.eye(N)
INPUTS = dict(float=(EYE, Keeps), half=(EYE.half(), Keeps), bfloat=(EYE.bfloat16(), Keeps), double=(EYE.double(), Keeps),
    complex=(torch.complex(EYE, EYE), Keeps), tokens=(IDS[:,None].expand(N, 3).contiguous(), Words),
    pictures=(pictures(), partial(Keeps, mean)), dict=(dict(a=EYE, b=[EYE*2]), partial(Keeps, lambda d: d['a'])))
SPLITS = dict(even=(4, 4, 3), ones=(1,)*N, growing=(1, 2, 3, 5), shrinking=(5, 3, 2, 1))

@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('kind', INPUTS)
def test_previous_batch(kind, split):
    x,net = INPUTS[kind]
    rows = list(IDS.split(SPLITS[split]))
    data = [({'a': x['a'][i], 'b': [x['b'][0][i]]} if kind == 'dict' else x[i], OTHER[i]) for i in rows]
    seen = previous(data, MixUp(1., pairing=PreviousBatch()), net(), CrossEntropyLossFlat())
    assert len(seen) == len(rows)
    tol = 2e-2 if 'half' in kind or 'bfloat' in kind else 1e-4
    mixed = 0
    for b,page in enumerate(seen):
        M = (page.x.real if page.x.is_complex() else page.x).float()
        if b == 0: close(M, EYE[rows[0]])
        else: check_previous(M, rows[b].tolist(), len(rows[b]), rows[b-1].tolist() if tol < 1e-3 else range(N))
        mixed += not torch.equal(M, EYE[rows[b]])
        close(page.loss, mixed_losses(CE, OTHER)(M, page.pred, IDS), tol)
        if page.x.is_complex(): close(page.x.imag, page.x.real)
    assert mixed == len(rows)-1

@pytest.mark.parametrize('name', sorted(set(METHODS) - {'batch'}))
@pytest.mark.parametrize('loss', INDEX)
def test_previous_batch_by_each_method(name, loss):
    loss_func,want = INDEX[loss]
    rows = IDS.split(BS)
    data = [(pictures()[i], OTHER[i]) for i in rows]
    seen = previous(data, METHODS[name](pairing=PreviousBatch()), Keeps(mean), loss_func, epochs=2)
    if name == 'by_item' and loss == 'own': pytest.skip('see `test_pairing_of_a_random_choice`')
    for b,page in enumerate(seen):
        ids,before = rows[b % 3],rows[(b-1) % 3] if b else ()
        if name != 'by_batch': check_previous(page.x, ids.tolist(), len(ids), list(before))
        if loss == 'own':
            lam = page.x[range(len(ids)),ids]
            met = partner(page.x, ids)
            met = torch.where(met < 0, ids, met)
            if lam[0] < 1: close(page.loss, lam[0]*own(page.pred, OTHER[ids]) + (1-lam[0])*own(page.pred, OTHER[met]), 1e-4)
        else: close(page.loss, want(OTHER)(page.x, page.pred, IDS), 1e-4)

@pytest.mark.parametrize('loss', FLOAT)
def test_previous_batch_of_numbers_and_tags(loss):
    loss_func,want,y = FLOAT[loss]
    for y in (y, (y > 0).long()) if loss == 'BCE' else (y,):
        seen = previous([(EYE[i], y[i]) for i in IDS.split(BS)], MixUp(1., pairing=PreviousBatch()), Keeps(), loss_func)
        for page in seen: close(page.loss, want(page.pred, page.x @ y.float()), 1e-4)

@pytest.mark.parametrize('cb', [partial(MixUp, 1.), CutMix, FMix, ResizeMix])
@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss()], ids=['flat', 'torch'])
def test_previous_batch_of_masks(cb, loss_func):
    size = 5,6
    y = (OTHER.view(N, 1, 1) + torch.zeros(size, dtype=torch.long)) % C
    if cb is not ResizeMix: y = (y + torch.arange(30).view(size)) % C
    class Places(Keeps):
        def forward(self, x):
            self.given = plain(x).clone()
            return self.head(x.movedim(1, -1)).movedim(-1, 1)
    rows = IDS.split(BS)
    for b,page in enumerate(previous([(pictures(size)[i], TensorMask(y[i])) for i in rows], cb(pairing=PreviousBatch()), Places(),
        loss_func)):
        if isinstance(cb, partial): want = sum(page.x[:,j,0,0].view(-1, 1, 1)*CE(page.pred, y[[j]*len(page.x)]) for j in range(N)).mean()
        else: want = F.cross_entropy(page.pred, y.gather(0, page.x.argmax(1)))
        close(page.loss, want, 1e-4)

def test_previous_batch_with_several_inputs_and_targets():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(N, 2*C)
        def forward(self, a, b):
            self.given = torch.stack([a, b]).detach()
            return self.head(a).split(C, 1)
    def loss_func(pred, y, z): return F.cross_entropy(pred[0], y) + F.mse_loss(pred[1], z)
    seen = []
    class Told(Callback):
        order = 60
        def after_loss(self): seen.append((self.learn.model.given, [p.detach() for p in self.learn.pred], plain(self.learn.loss)))
    torch.manual_seed(0)
    learn = learner([(EYE[i], 2*EYE[i], OTHER[i], NUMBERS[i]) for i in IDS.split(BS)], loss_func, Two(), None, n_inp=2)
    learn.remove_cbs(learn.cbs.filter(lambda o: type(o).__name__ == 'Witness'))
    learn.add_cbs([MixUp(1., pairing=PreviousBatch()), Told()])
    with learn.no_logging(): learn.fit(1)
    for b,((given,pred,loss),ids) in enumerate(zip(seen, IDS.split(BS))):
        a,bb = given
        close(bb, 2*a)
        lam,met = a[range(len(ids)),ids],partner(a, ids)
        met = torch.where(met < 0, ids, met)
        close(lam, lam[:1].expand_as(lam))
        close(loss, lam[0]*loss_func(pred, OTHER[ids], NUMBERS[ids]) + (1-lam[0])*loss_func(pred, OTHER[met], NUMBERS[met]), 1e-4)

@pytest.mark.parametrize('extra', [torch.ones(1, 2), torch.ones(2), torch.ones(2, 5)], ids=lambda o: str(tuple(o.shape)))
def test_previous_batch_with_an_input_shared_by_all(extra):
    met = set()
    seen = previous([(EYE[i], extra, OTHER[i]) for i in IDS.split(4)]*20, MixUp(1., pairing=PreviousBatch(), inputs=0), Keeps(),
        CrossEntropyLossFlat(), n_inp=2)
    for page in seen[1::3]: met |= set(partner(page.x, IDS[4:8]).tolist())
    assert met >= {0, 1, 2, 3}

@pytest.mark.slow
def test_previous_batch_partners_are_even():
    rows = IDS[:8].split(4)
    seen = previous([(EYE[i], OTHER[i]) for i in rows]*150, MixUp(1., pairing=PreviousBatch()), Keeps(), CrossEntropyLossFlat())
    met = torch.cat([partner(page.x, rows[1]) for page in seen[1::2]])
    assert stats.chisquare(met.bincount(minlength=4).numpy()).pvalue > 1e-3

@pytest.mark.parametrize('second', [torch.randn(4, 6), torch.eye(N)[:4].double()], ids=['shape', 'dtype'])
def test_previous_batch_of_another_shape(second):
    with pytest.raises(ValueError, match='PreviousBatch.*same shape'):
        previous([(EYE[:4], OTHER[:4]), (second, OTHER[:4])], MixUp(pairing=PreviousBatch()), Keeps(), CrossEntropyLossFlat())

@pytest.mark.parametrize('pairing', [PreviousBatch, DifferentClass, SameClass])
def test_one_plan_for_an_epoch_has_no_pairing(pairing):
    with pytest.raises(ValueError, match='cannot be used where one plan is kept'):
        previous([(EYE[:4], OTHER[:4])]*2, MixUp(1., pairing=pairing(), stateful=True), Keeps(), CrossEntropyLossFlat())

class Event(Callback):
    run_valid = False
    def __init__(self, at, f, order=70):
        self.order = order
        setattr(self, at, lambda: f(self.learn))

NESTED = dict(MixUp=partial(MixUp, 1.), CutMix=CutMix, reg=partial(RegMixUp, 2.),
    reg_method=lambda pairing: RegMixUp(method=CutMix(pairing=pairing)), random=lambda pairing: RandomMix([CutMix(pairing=pairing)]),
    random_item=lambda pairing: RandomMix([CutMix()], per='item', pairing=pairing),
    twice=lambda pairing: RegMixUp(method=RandomMix([CutMix(pairing=pairing)])))
@pytest.mark.slow
@pytest.mark.parametrize('name', NESTED)
@pytest.mark.parametrize('end', ['fit', 'cancelled', 'lr_find'])
def test_memory_of_the_previous_batch_is_freed(name, end, request):
    refs,cb = [],NESTED[name](pairing=PreviousBatch())
    def data(): return [(torch.randn(4, N, 3, 3), OTHER[:4]) for _ in range(5)]
    note = Event('before_batch', lambda learn: refs.append(weakref.ref(learn.xb[0])), -5)
    def stop(learn): raise CancelFitException
    class Fresh:
        def __iter__(self): return iter(data())
        def __len__(self): return 5
    learn = Learner(DataLoaders(Fresh(), Fresh(), device='cpu'), Keeps(mean), CrossEntropyLossFlat(), SGD,
        cbs=[cb, note, *([Event('after_step', stop)] if end == 'cancelled' else [])])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=4, stop_div=False, show_plot=False, suggest_funcs=()) if end == 'lr_find' else learn.fit(2)
    learn.xb = learn.yb = learn.pred = learn.dl = None
    gc.collect()
    assert refs and [r() for r in refs] == [None]*len(refs)

@pytest.mark.slow
def test_only_one_batch_is_remembered():
    alive,refs = [],[]
    def look(learn):
        gc.collect()
        alive.append(sum(r() is not None for r in refs))
        refs.append(weakref.ref(learn.xb[0]))
    class Fresh:
        def __iter__(self): return ((torch.randn(4, N), OTHER[:4]) for _ in range(8))
        def __len__(self): return 8
    learn = learner(Fresh(), CrossEntropyLossFlat(), Keeps(), None)
    learn.remove_cbs(learn.cbs.filter(lambda o: type(o).__name__ == 'Witness'))
    learn.add_cbs([MixUp(1., pairing=PreviousBatch()), Event('before_batch', look, -5)])
    with learn.no_logging(): learn.fit(1)
    assert max(alive[2:]) <= 2

def _big_item(i): return torch.full((50_000,), float(i))
def _item_class(i): return i % 2
class Exports(Callback):
    order,run_valid = 70,False
    def __init__(self): self.sizes = []
    def after_batch(self):
        self.learn.export('mid.pkl')
        self.sizes.append((self.learn.path/'mid.pkl').stat().st_size)

EXPORTED = dict(MixUp=partial(MixUp, 1.), reg=partial(RegMixUp, 2.), method=lambda pairing: RegMixUp(method=MixUp(1., pairing=pairing)),
    by_item=lambda pairing: RandomMix([MixUp(1.)], per='item', pairing=pairing),
                by_batch=lambda pairing: RandomMix([MixUp(1., pairing=pairing)]))
@pytest.mark.parametrize('name', EXPORTED)
def test_previous_batch_is_not_exported(name, tmp_path):
    dls = Datasets(list(range(12)), [[_big_item], [_item_class]], splits=(range(12), range(4))).dataloaders(bs=4, num_workers=0,
        device=torch.device('cpu'))
    learn = Learner(dls, nn.Linear(50_000, 2), CrossEntropyLossFlat(), SGD, path=tmp_path,
        cbs=[EXPORTED[name](pairing=PreviousBatch()), exports := Exports()])
    learn.export('before.pkl')
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(exports.sizes) == 3 and max(exports.sizes) < (tmp_path/'before.pkl').stat().st_size + 50_000
    again = load_learner(tmp_path/'mid.pkl')
    assert any('PreviousBatch()' in repr(cb) for cb in again.cbs)

def test_nothing_leaks_to_another_learner():
    cb,pairing = MixUp(1., pairing=PreviousBatch()),PreviousBatch()
    for cbs in (cb, cb),(MixUp(1., pairing=pairing), MixUp(1., pairing=pairing)):
        for o in cbs:
            seen = previous([(EYE[i], OTHER[i]) for i in IDS.split(BS)], o, Keeps(), CrossEntropyLossFlat())
            close(seen[0].x, EYE[:4])
            o.learn.remove_cb(o)
            o.learn = None
    two = [MixUp(1., pairing=pairing) for _ in range(2)]
    inner = lambda learn: previous([(EYE[i], OTHER[i]) for i in IDS.split(BS)], two[1], Keeps(),
        CrossEntropyLossFlat()) if learn.iter == 1 else None
    seen = previous([(EYE[i], OTHER[i]) for i in IDS.split(BS)], two[0], Keeps(), CrossEntropyLossFlat(), cbs=[Event('after_batch', inner)])
    check_previous(seen[2].x, [8, 9, 10], 3, [4, 5, 6, 7])

def test_validation_is_not_remembered():
    rows = IDS.split(BS)
    seen = previous(tuple((EYE[i], OTHER[i]) for i in rows), MixUp(1., pairing=PreviousBatch()), Keeps(), CrossEntropyLossFlat(), epochs=2)
    train,valid = ([p for p in seen if p.training == t] for t in (True, False))
    assert len(train) == len(valid) == 6 and all(torch.equal(p.x, EYE[i]) for p,i in zip(valid, [*rows]*2))
    for p,i,before in zip(train[4:], rows[1:], rows): check_previous(p.x, i.tolist(), len(i), before.tolist())

def test_interrupted_fit_forgets_at_the_next():
    def boom(learn):
        if learn.iter == 1: raise KeyboardInterrupt
    cb,stop = MixUp(1., pairing=PreviousBatch()),Event('after_step', boom)
    with pytest.raises(KeyboardInterrupt):
        previous([(EYE[i], OTHER[i]) for i in IDS.split(BS)], cb, Keeps(), CrossEntropyLossFlat(), cbs=[stop])
    learn = cb.learn
    learn.remove_cb(stop)
    with learn.no_logging(): learn.fit(1)
    close(learn.seen.pages[0].x, EYE[:4])

def test_previous_batch_that_the_model_wrote_into():
    class Writes(Keeps):
        def forward(self, x):
            out = super().forward(x.clone())
            x.mul_(-1)
            return out
    seen = previous([(EYE[i].clone(), OTHER[i]) for i in IDS.split(BS)], MixUp(1., pairing=PreviousBatch()), Writes(),
        CrossEntropyLossFlat())
    check_previous(seen[1].x, [4, 5, 6, 7], 4, [0, 1, 2, 3])

def test_gradients_accumulate_over_previous_batches():
    rows,grads = IDS.split(1),[]
    seen = previous([(EYE[i], OTHER[i]) for i in rows], MixUp(1., pairing=PreviousBatch()), model := Keeps(), CrossEntropyLossFlat(),
        cbs=[GradientAccumulation(4), Event('before_step', lambda learn: grads.append(learn.model.head.weight.grad.clone()))])
    weight,bias = model.head.weight.detach().clone().requires_grad_(),model.head.bias.detach()
    total = sum(mixed_losses(CE, OTHER)(p.x, F.linear(p.x, weight, bias), IDS) for p in seen[:4])/4
    close(grads[0], torch.autograd.grad(total, weight)[0], 1e-4)

# By another target, or by what a function returns

DOMAIN = IDS % 3
@pytest.mark.parametrize('make', [SameClass, DifferentClass])
@pytest.mark.parametrize('by', [1, lambda batch: batch.yb[1], lambda batch: batch.xb[1]], ids=['position', 'target', 'input'])
def test_groups(make, by):
    "Partners are of the same group or of another, of whatever class, and the loss has the labels of both"
    def loss_func(pred, y, domain): return F.cross_entropy(pred, y)
    data,met = [(EYE[i], DOMAIN[i], OTHER[i], DOMAIN[i]) for i in IDS.split(BS)]*6,set()
    cb = MixUp(1., pairing=make(by=by), inputs=0, per='batch')
    for page,ids in zip(previous(data, cb, Keeps(), loss_func, n_inp=2), [*IDS.split(BS)]*6):
        here = partner(page.x, ids)
        found = (here >= 0) & (here != ids)
        assert ((DOMAIN[here] == DOMAIN[ids]) == (make is SameClass))[found].all()
        met |= set((OTHER[here] == OTHER[ids])[found].tolist())
        lam,here = page.x[range(len(ids)),ids],torch.where(found, here, ids)
        lam = lam.amin() # 1 for an item that is its own partner
        close(page.loss, lam*F.cross_entropy(page.pred, OTHER[ids]) + (1-lam)*F.cross_entropy(page.pred, OTHER[here]), 1e-4)
    assert False in met, 'also of another class'

@pytest.mark.parametrize('by', [2, lambda batch: None, lambda batch: batch.xb[0], lambda batch: torch.zeros(3).long()])
@pytest.mark.parametrize('make', [SameClass, DifferentClass, RareClass])
def test_what_is_no_group(make, by):
    y = torch.zeros(4).long()
    with pytest.raises(ValueError, match=f'pairing={make.__name__}.*class index for each of the 4 items.*(by returned|target 2 is None)'):
        make(by=by)(Batch((torch.rand(4, 2),), (y, y), 4, memory={}))

# Rare classes

def rare(pairing, y, n=3000, memory=None):
    "How often each item is the partner of each"
    batch = Batch((), (y,), len(y), draws=Draws(torch.Generator().manual_seed(0)), memory={} if memory is None else memory)
    return sum(F.one_hot(pairing(batch), len(y)) for _ in range(n)).double()/n

@pytest.mark.parametrize('y', [OTHER, SAME, torch.tensor([0]*9 + [1, 2]), torch.tensor([5, 5, 5, 5, 900])], ids=str)
@pytest.mark.parametrize('given', [True, False])
def test_rare_classes_are_drawn_by_the_inverse_of_their_frequency(given, y):
    counts = torch.randint(1, 50, (901,), generator=torch.Generator().manual_seed(0)) if given else y.bincount(minlength=901)
    want = (1/counts[y].double()).expand(len(y), -1).clone().fill_diagonal_(0)
    met = rare(RareClass(counts if given else None), y)
    close(met, want/want.sum(1, keepdim=True), .05)

def test_classes_are_counted_over_the_fit():
    memory,pairing = {},RareClass()
    for y in torch.zeros(20).long(), torch.ones(5).long(): rare(pairing, y, 1, memory)
    met = rare(pairing, torch.tensor([0, 0, 1]), 1, memory) # 22 of class 0, 6 of class 1
    seen, = memory.values()
    assert seen.bincount().tolist() == [22, 6]
    pairing.window = 4
    rare(pairing, torch.tensor([2, 2, 3]), 1, memory)
    assert memory[pairing].tolist() == [2, 2, 3, 0], 'the last ones'
    assert met.sum() == 3

@pytest.mark.parametrize('counts', [None, [4, 3, 0]])
def test_ignored_classes_are_partners_of_nobody(counts):
    met = rare(RareClass(counts), torch.tensor([0, 0, -100, 1]), 500)
    assert met[:,2].sum() == 0 and (met[:,[0, 1, 3]] > 0).sum() == 9
    assert rare(RareClass(counts), torch.tensor([-100, -100]), 3).tolist() == [[0, 1], [1, 0]]

def test_rare_classes_wait_for_no_device():
    y = torch.zeros(9, dtype=torch.long, device='meta')
    for pairing in RareClass(), RareClass([3, 2]): assert pairing(Batch((), (y,), 9, memory={})).is_meta

# A second loader

class Loader:
    "Batches in turn; counts how often it was begun"
    def __init__(self, batches): self.batches,self.begun = batches,0
    def __iter__(self):
        self.begun += 1
        return iter(self.batches)
    def __len__(self): return len(self.batches)

SPLIT = IDS[:7].split(3)
@pytest.mark.parametrize('sizes', [(4,), (1, 2, 1), (2, 2), (4, 4, 4)], ids=str)
@pytest.mark.parametrize('kind', INPUTS)
def test_second_loader(kind, sizes):
    "Items 0 to 6 are trained on, the others come from the loader, in batches of other sizes"
    x,net = INPUTS[kind]
    def items(i): return ({'a': x['a'][i], 'b': [x['b'][0][i]]} if kind == 'dict' else x[i], OTHER[i])
    other = [IDS[7:][torch.arange(at, at+size) % 4] for at,size in enumerate(sizes)]
    loader = Loader([items(i) for i in other])
    seen = previous([items(i) for i in SPLIT], MixUp(1., pairing=FromLoader(loader)), net(), CrossEntropyLossFlat(), epochs=2)
    tol = 2e-2 if 'half' in kind or 'bfloat' in kind else 1e-4
    assert len(seen) == 6 and loader.begun == -(-6//len(sizes))
    for b,page in enumerate(seen):
        M = (page.x.real if page.x.is_complex() else page.x).float()
        check_previous(M, SPLIT[b % 3].tolist(), len(M), other[b % len(other)].tolist() if tol < 1e-3 else range(N))
        met = partner(M, SPLIT[b % 3])
        if tol < 1e-3 and sizes == (4,): assert len(met.unique()) == len(met), 'each item of a larger batch at most once'
        close(page.loss, mixed_losses(CE, OTHER)(M, page.pred, IDS), tol)

@pytest.mark.parametrize('name', sorted(set(METHODS) - {'batch'}))
@pytest.mark.parametrize('loss', ['CE', 'weighted', 'smoothed'])
def test_second_loader_by_each_method(name, loss):
    loss_func,want = INDEX[loss]
    data = [(pictures()[i], OTHER[i]) for i in SPLIT]
    pairing = FromLoader([(pictures()[7:], OTHER[7:])])
    for b,page in enumerate(previous(data, METHODS[name](pairing=pairing), Keeps(mean), loss_func, epochs=2)):
        ids = SPLIT[b % 3]
        if name != 'by_batch': check_previous(page.x, ids.tolist(), len(ids), IDS[7:].tolist())
        close(page.loss, want(OTHER)(page.x, page.pred, IDS), 1e-4)

@pytest.mark.parametrize('cb', [partial(RegMixUp, 2.), lambda pairing: RegMixUp(method=CutMix(pairing=pairing))])
def test_second_loader_in_addition_to_the_clean_batch(cb):
    data = [(pictures()[i], OTHER[i]) for i in SPLIT]
    for b,page in enumerate(previous(data, cb(pairing=FromLoader([(pictures()[7:], OTHER[7:])])), Keeps(mean), CrossEntropyLossFlat())):
        ids,n = SPLIT[b],len(SPLIT[b])
        close(page.x[:n], EYE[ids])
        check_previous(page.x[n:], ids.tolist(), n, IDS[7:].tolist())

@pytest.mark.parametrize('make', [lambda: ManifoldMixUp(pairing=FromLoader([])), lambda: AlignMixUp(pairing=FromLoader([]))])
def test_hidden_layers_have_no_second_loader(make):
    with pytest.raises(ValueError, match='from outside of the batch'): make()

def random_item(i):
    "An item that draws from all streams"
    noise = torch.rand(2)[0].item() + random.random() + np.random.rand()
    return F.one_hot(torch.tensor(i), N).float() + torch.zeros(N).index_fill_(0, torch.tensor([(i+1) % N]), 1e-6*noise)

def torch_loader(): return TorchLoader(Items(range(N)), 4, shuffle=True)
def fastai_loader():
    return Datasets(list(range(N)), [[random_item], [_item_class]], splits=(range(N), range(N))).dataloaders(bs=4, num_workers=0,
        device=torch.device('cpu')).train
class Items:
    def __init__(self, ids): self.ids = ids
    def __len__(self): return len(self.ids)
    def __getitem__(self, i): return random_item(i),i % 2

class Noise(Keeps):
    "A model that draws"
    def forward(self, x): return super().forward(x) + torch.rand(1)

def trained_by(dl, cb):
    "What the model sees of its own items, in order, and where all streams are after a fit"
    set_seed(0)
    dl = dl()
    dls,model,seen = DataLoaders(dl, []),Noise(),[]
    if cb is not None: cb = cb(dl)
    learn = Learner(dls, model, CrossEntropyLossFlat(), SGD, lr=0., cbs=[Event('before_batch', lambda learn: seen.append(learn.xb[0]), -5),
        *([] if cb is None else [cb])])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    return seen,torch.get_rng_state(),random.getstate(),np.random.get_state()[1],learn

@pytest.mark.parametrize('second', [torch_loader, fastai_loader, None], ids=['torch', 'fastai', 'itself'])
@pytest.mark.parametrize('first', [torch_loader, fastai_loader], ids=['torch', 'fastai'])
def test_second_loader_leaves_all_streams(first, second):
    "Also where the second loader is the one that is trained on"
    seconds = []
    def cb(dl):
        seconds.append(set_aside(second, dl))
        return MixUp(1., pairing=FromLoader(seconds[0]))
    want,got = trained_by(first, None),trained_by(first, cb)
    for a,b in zip(want[0], got[0], strict=True): close(plain(b), plain(a))
    assert torch.equal(got[1], want[1]) and got[2] == want[2] and (got[3] == want[3]).all()
    again = trained_by(first, cb)
    assert torch.equal(got[4].model.given, again[4].model.given), 'the same seed, the same partners'

def set_aside(second, dl):
    "Make a second loader without moving the streams on"
    if second is None: return dl
    with same_draws(dl): return second()

@pytest.mark.parametrize('make', [torch_loader, fastai_loader])
def test_second_loader_begins_anew_in_another_order(make):
    "All items are met, also where the loader leaves out those of a last, smaller batch"
    set_seed(0)
    loader,rows = make(),IDS[:1].repeat(60, 1)
    seen = previous([(EYE[i], OTHER[i]) for i in rows], MixUp(1., pairing=FromLoader(loader)), Keeps(), CrossEntropyLossFlat())
    assert {int(partner((page.x > 1e-4).float(), rows[0])) for page in seen} >= set(range(1, N))

@pytest.mark.slow
def test_second_loader_with_workers():
    loader = TorchLoader(Items(range(N)), 4, shuffle=True, num_workers=2)
    state = torch.get_rng_state()
    seen = previous([(EYE[i], OTHER[i]) for i in SPLIT], MixUp(1., pairing=FromLoader(loader)), Keeps(), CrossEntropyLossFlat(), epochs=2)
    assert len(seen) == 6 and not any(torch.equal(page.x, EYE[i]) for page,i in zip(seen, [*SPLIT]*2)) and state is not None

def test_types_of_the_transforms_of_the_second_loader():
    "They see fastai's images, as everywhere"
    types = []
    class Typed:
        def __iter__(self):
            x = TensorImage(EYE[7:].view(4, N, 1, 1)).flip(-1)
            types.append(type(x))
            yield x,TensorCategory(OTHER[7:])
    for page in previous([(EYE[i].view(-1, N, 1, 1), OTHER[i]) for i in SPLIT], MixUp(1., pairing=FromLoader(Typed())), Keeps(mean),
        CrossEntropyLossFlat()): close(page.x.sum(1), torch.ones(len(page.x)))
    assert set(types) == {TensorImage}

def test_second_loader_in_nested_fits():
    "The batches of the outer fit come in turn, whatever a fit in the middle of it takes"
    other = Loader([(EYE[i:i+1], OTHER[i:i+1]) for i in range(7, N)])
    cb = MixUp(1., pairing=FromLoader(other))
    def within(learn):
        if learn.iter == 1: previous([(EYE[i], OTHER[i]) for i in SPLIT], MixUp(1., pairing=cb.pairing), Keeps(), CrossEntropyLossFlat())
    for event in 'before_batch', 'after_batch':
        seen = []
        previous([(EYE[i], OTHER[i]) for i in SPLIT], cb, Keeps(), CrossEntropyLossFlat(),
            cbs=[Event(event, within), Event('before_backward', lambda learn: seen.append(learn.xb[0].clone()))])
        assert [partner(x, i).unique().item() for x,i in zip(seen, SPLIT, strict=True)] == [7, 8, 9]
        cb.learn.remove_cbs(cb.learn.cbs)
        cb.learn = None

def test_second_loader_is_freed_and_not_copied_or_exported(tmp_path):
    dls = Datasets(list(range(12)), [[_big_item], [_item_class]], splits=(range(12), range(4))).dataloaders(bs=4, num_workers=0,
        device=torch.device('cpu'))
    pairing = FromLoader([(torch.rand(4, 50_000), torch.zeros(4).long())])
    learn = Learner(dls, nn.Linear(50_000, 2), CrossEntropyLossFlat(), SGD, path=tmp_path, cbs=[MixUp(1., pairing=pairing),
        exports := Exports()])
    assert copy.deepcopy(pairing) is pairing and copy.copy(pairing) is pairing
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.mix_up.next_fit is None and max(exports.sizes) < 600_000
    again = load_learner(tmp_path/'mid.pkl')
    again.dls = dls
    with pytest.raises(RuntimeError, match='saved without its loader.*pairing=FromLoader'), again.no_bar(), again.no_logging(): again.fit(1)
    again.mix_up.pairing = pairing
    again.remove_cb(again.exports)
    with again.no_bar(), again.no_logging(): again.fit(1)

def test_what_a_second_loader_has_to_give():
    def run(dl, inputs=1): return previous([(*[EYE[:4]]*inputs, OTHER[:4])], MixUp(pairing=FromLoader(dl)),
        Keeps(lambda *xb: xb[0]), CrossEntropyLossFlat(), n_inp=inputs)
    x,y = EYE[4:], OTHER[4:]
    for dl,inputs,said in [([(x[:,:3], y)], 1, r'input 0 of shape \(3,\)'), ([(x.double(), y)], 1, r'input 0 .*float64'),
        ([(x, F.one_hot(y, C))], 1, r'target 0 of shape \(5,\)'), ([(x, y.float())], 1, 'target 0'), ([x], 1, 'got a Tensor'),
        ([(x, x, y)], 1, 'got 3 in all'), ([(x,)], 1, 'got 1 in all'), ([(x, y)], 2, r'2 input\(s\) and 1 target'),
        ([({'a': x}, y)], 1, 'no input 0'), ([], 1, 'at least one batch'), ([(x[:0], y[:0])], 1, 'without items')]:
        with pytest.raises(ValueError, match=r'pairing=FromLoader\(list\).*' + said): run(dl, inputs)
    for dl in 3, None, iter([(x, y)]):
        with pytest.raises(TypeError, match='dl must be a DataLoader'): FromLoader(dl)

def test_only_what_has_rows_comes_from_the_second_loader():
    extra = torch.ones(1, 2)
    for page in previous([(EYE[i], extra, OTHER[i]) for i in SPLIT], MixUp(1., pairing=FromLoader([(EYE[7:], extra, OTHER[7:])]), inputs=0),
        Keeps(), CrossEntropyLossFlat(), n_inp=2): close(page.loss, mixed_losses(CE, OTHER)(page.x, page.pred, IDS), 1e-4)
