"What is left of each item is what the loss is told, for every method, loss, number of dimensions and size."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import (
    SGD,
    BCEWithLogitsLossFlat,
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    L,
    L1LossFlat,
    Learner,
    MSELossFlat,
    Tensor,
    nn,
)
from fastai.vision.core import TensorImage, TensorMask
from scipy import stats
from torchvision.transforms.v2 import CutMix as TorchvisionCutMix

from fastai_mixup.all import *
from fastai_mixup.masks import box_mask

N,C = 6,4
METHODS = dict(
    CutMix=CutMix, cutmix_folded=partial(CutMix, fold=True), cutmix_minmax=partial(CutMix, minmax=(.2, .9)), SaliencyMix=SaliencyMix,
    ResizeMix=ResizeMix,
    SmoothMix=SmoothMix, GridMix=GridMix, fine_grid=partial(GridMix, grid=50), FMix=FMix, soft_fmix=partial(FMix, soft=.4))
SIZES = dict(signal=(13,), picture=(7, 10), tall=(11, 4), volume=(3, 5, 4), one_place=(1, 1))
each_method = pytest.mark.parametrize('name', METHODS)
each_size = pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)

def own_numbers(size, n=N): return torch.eye(n).view(n, n, *[1]*len(size)).expand(n, n, *size).contiguous()

class Shares(nn.Module):
    "Sees which item each position shows; predicts for the item, or for each of its positions"
    def __init__(self, positions=False):
        super().__init__()
        self.head,self.positions,self.pages = nn.Linear(N, C),positions,[]
    def forward(self, x):
        self.x = x.detach().as_subclass(Tensor)
        pred = self.head(x.movedim(1, -1)).movedim(-1, 1) if self.positions else self.head(x.flatten(2).mean(2))
        self.pages.append((self.x, pred.detach()))
        return pred

class Losses(Callback):
    order = 50
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append(self.learn.loss.detach())

def trained(cb, size, y, loss_func, n=6, positions=False, x=None):
    "What the model saw and said in each batch, and the loss that the Learner reported"
    torch.manual_seed(1)
    batch = x if x is not None else own_numbers(size),y
    before = [o.clone() for o in batch]
    model,losses = Shares(positions),Losses()
    learn = Learner(DataLoaders([batch]*n, []), model, loss_func, SGD, lr=.1, cbs=[*L(cb), losses])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert all(torch.equal(a, b) for a,b in zip(batch, before))
    return [(*page, loss) for page,loss in zip(model.pages, losses.seen)]

def matrix(x):
    "The share of each item in each item"
    M = x.flatten(2).mean(2)
    torch.testing.assert_close(M.sum(1), torch.ones(N))
    assert ((M > 1e-6).sum(1) <= 2).all()
    return M

def index_loss(items):
    "The mixed loss by its definition, for a loss that has one value for each item"
    def loss(pred, y, M): return sum(M[i,j]*items(pred[i:i+1], y[j:j+1]) for i in range(N) for j in range(N)) / N
    return loss

CE = partial(F.cross_entropy, reduction='sum')
W = torch.tensor([1., 3., .5, 2.])
def weighted(pred, y, M):
    at = [(M[i,j]*W[y[j]], CE(pred[i:i+1], y[j:j+1])) for i in range(N) for j in range(N)]
    return sum(w*l for w,l in at) / sum(w for w,_ in at)
def own(pred, y): return F.cross_entropy(pred, y)**2
def by_hand_own(pred, y, M):
    lam = M.diagonal()
    torch.testing.assert_close(lam, lam[:1].expand(N), atol=1e-5, rtol=0)
    k = next((int(row.nonzero()[-1]) for row in M[:1] if row[1:].any()), 0)
    return lam[0]*own(pred, y) + (1-lam[0])*own(pred, y.roll(-k))

LABELS = torch.tensor([0, 1, 2, 3, 1, 2])
LOSSES = dict(
    classes=(CrossEntropyLossFlat(), LABELS, index_loss(CE)), torchs=(nn.CrossEntropyLoss(), LABELS, index_loss(CE)),
    smoothed=(LabelSmoothingCE(.1), LABELS, index_loss(partial(CE, label_smoothing=.1))),
    weighted=(nn.CrossEntropyLoss(W), LABELS, weighted),
    own=(own, LABELS, by_hand_own), numbers=(MSELossFlat(), torch.randn(N, C), lambda p,y,M: F.mse_loss(p, M@y)),
    tags=(BCEWithLogitsLossFlat(), torch.randint(2, (N, C)), lambda p,y,M: F.binary_cross_entropy_with_logits(p, M@y.float())))

@each_method
@each_size
@pytest.mark.parametrize('loss', LOSSES)
def test_loss_is_told_what_is_left(name, size, loss):
    loss_func,y,by_hand = LOSSES[loss]
    for x,pred,got in trained(METHODS[name](), size, y, loss_func):
        torch.testing.assert_close(got, by_hand(pred, y, matrix(x)), atol=1e-4, rtol=1e-4)

def winner(x): return x[torch.arange(N),torch.arange(N)] >= .5

@each_method
@pytest.mark.parametrize('loss_func,plain', [(CrossEntropyLossFlat(axis=1), F.cross_entropy),
    (nn.CrossEntropyLoss(W), partial(F.cross_entropy, weight=W)), (own, own)],
                         ids=['fastai', 'weighted', 'own'])
def test_masks_are_pasted(name, loss_func, plain):
    size = 7,10
    # a mask that is resized is not the same
    y = LABELS.view(N, 1, 1).expand(N, *size) if name == 'ResizeMix' else torch.randint(C, (N, *size))
    for x,pred,got in trained(METHODS[name](), size, TensorMask(y), loss_func, positions=True):
        partner = matrix(x).fill_diagonal_(0).argmax(1)
        pasted = torch.where(winner(x), y, y[partner])
        torch.testing.assert_close(got.as_subclass(Tensor), plain(pred, pasted), atol=1e-5, rtol=1e-5)

def test_maps_of_numbers_are_mixed_place_by_place():
    y = torch.randn(N, C, 7, 10)
    for x,pred,got in trained(SmoothMix(), (7, 10), y, L1LossFlat(), positions=True):
        torch.testing.assert_close(got, F.l1_loss(pred, torch.einsum('ijhw,jchw->ichw', x, y)), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('name', sorted(set(METHODS) - {'SaliencyMix'}))
def test_every_item_has_its_own_mask(name):
    masks = [x[torch.arange(N),torch.arange(N)] for x,*_ in trained(METHODS[name](), (9, 8), LABELS, CrossEntropyLossFlat())]
    assert torch.cat(masks).flatten(1).unique(dim=0).shape[0] > 2.5*N

@each_method
def test_off(name):
    for cb in METHODS[name](p=0), *([METHODS[name](alpha=0)] if 'smooth' not in name.lower() and 'resize' not in name.lower() else []):
        for x,*_ in trained(cb, (9, 8), LABELS, CrossEntropyLossFlat()): assert torch.equal(x, own_numbers((9, 8)))

@each_method
def test_real_pictures_come_back_as_they_are(name):
    x = TensorImage(torch.rand(N, N, 9, 8)).to(memory_format=torch.channels_last)
    class Types(Callback):
        order = 8.5 # before fastai casts for the model
        def before_batch(self): self.seen = self.x
    types = Types()
    learn = Learner(DataLoaders([(x, LABELS)], []), Shares(), CrossEntropyLossFlat(), cbs=[METHODS[name](), types])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert type(types.seen) is TensorImage and types.seen.dtype == x.dtype and types.seen.shape == x.shape

def test_same_seed_same_masks():
    a,b = (torch.stack([x for x,*_ in trained(FMix(), (9, 8), LABELS, CrossEntropyLossFlat())]) for _ in range(2))
    assert torch.equal(a, b)

@pytest.mark.slow
def test_cutmix_lam_is_distributed_as_torchvisions():
    size = 256,256
    ours = torch.cat([matrix(x).diagonal() for x,*_ in trained(CutMix(), size, LABELS, CrossEntropyLossFlat(), n=120)])
    theirs = TorchvisionCutMix(num_classes=2)
    torch.manual_seed(0)
    lams = [theirs.make_params([torch.zeros(2, 1, *size)])['lam_adjusted'] for _ in range(720)]
    assert stats.ks_2samp(ours.numpy(), lams).pvalue > 1e-3

class Lams(Callback):
    order = 50
    def before_fit(self): self.seen = []
    def after_pred(self): self.seen.append(self.learn.cut_mix.plan.lam)

def test_correct_off_keeps_what_was_drawn():
    lams = Lams()
    pages = trained([CutMix(correct=False), lams], (40, 30), LABELS, CrossEntropyLossFlat(), n=100)
    drawn,left = torch.cat(lams.seen),torch.cat([matrix(x).diagonal() for x,*_ in pages])
    assert stats.kstest(drawn.numpy(), 'uniform').pvalue > 1e-3
    assert (left > drawn - .03).all() and (left > drawn + .05).float().mean() > .2
    for (x,pred,got),lam in zip(pages, lams.seen):
        y1 = LABELS[matrix(x).fill_diagonal_(0).argmax(1)]
        ce = lambda y: F.cross_entropy(pred, y, reduction='none')
        if matrix(x).diagonal().max() < 1: torch.testing.assert_close(got, (lam*ce(LABELS) + (1-lam)*ce(y1)).mean())

def test_boxes_inside_and_clipped():
    centre,side = torch.tensor([[.5, .5], [0., 1.]]),torch.tensor([[.5], [.5]])
    mask = box_mask((8, 4), centre, side)
    assert (~mask).flatten(1).sum(1).tolist() == [4*2, 2*1] and not mask[1,0,3]

BAD = [(CutMix, dict(minmax=(.5, .2)), 'minmax'), (CutMix, dict(minmax=.5), 'minmax'), (CutMix, dict(correct=None), 'correct'),
    (CutMix, dict(alpha=-1), 'alpha'),
       (FMix, dict(decay=-1), 'decay'), (FMix, dict(soft=2), 'soft'), (GridMix, dict(grid=0), 'grid'), (GridMix, dict(grid=2.5), 'grid'),
       (SmoothMix, dict(sigma=(0, 1)), 'sigma'), (ResizeMix, dict(side=(.1, 1.2)), 'side')]
@pytest.mark.parametrize('cls,kwargs,name', BAD)
def test_bad_parameters_are_refused(cls, kwargs, name):
    with pytest.raises((TypeError, ValueError), match=name): cls(**kwargs)

@each_method
@pytest.mark.parametrize('x', [torch.randn(N, 5), torch.randint(9, (N, 5))], ids=['table', 'words'])
def test_what_has_no_spatial_dimensions_is_refused(name, x):
    with pytest.raises(ValueError, match='needs inputs with spatial dimensions.*`MixUp`'):
        trained(METHODS[name](), None, LABELS, CrossEntropyLossFlat(), x=x)

MIXES = dict(two=lambda per: RandomMix([MixUp(1.), CutMix()], per=per), all=lambda per: RandomMix([f() for f in METHODS.values()], per=per),
             some=lambda per: RandomMix([MixUp(1., fold=False), ResizeMix()], [.3, .3], per=per),
             inner_batch=lambda per: RandomMix([MixUp(1., per='batch'), CutMix(per='batch')], per=per))

@pytest.mark.slow
@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('per', ['item', 'batch'])
@pytest.mark.parametrize('loss', LOSSES)
def test_random_choice(mix, per, loss):
    loss_func,y,by_hand = LOSSES[loss]
    for x,pred,got in trained(MIXES[mix](per), (7, 10), y, loss_func, n=12):
        torch.testing.assert_close(got, by_hand(pred, y, matrix(x)), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('per', ['item', 'batch'])
def test_random_choice_pastes_masks(per):
    y = LABELS.view(N, 1, 1).expand(N, 7, 10)
    for x,pred,got in trained(RandomMix([CutMix(), FMix(), ResizeMix()], [.3, .3, .3], per=per), (7, 10), y, CrossEntropyLossFlat(axis=1),
        positions=True):
        partner = matrix(x).fill_diagonal_(0).argmax(1)
        torch.testing.assert_close(got, F.cross_entropy(pred, torch.where(winner(x), y, y[partner])), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('per', ['item', 'batch'])
def test_shares_of_random_choice(per):
    pages = trained(RandomMix([MixUp(1.), SmoothMix()], [.5, .2], per=per), (7, 10), LABELS, CrossEntropyLossFlat(), n=200)
    own = torch.cat([x[torch.arange(N),torch.arange(N)] for x,*_ in pages]).flatten(1)
    kind = torch.where((own == 1).all(1), 2, torch.where(own.amax(1)-own.amin(1) < 1e-6, 0, 1))
    n = len(kind) if per == 'item' else 200
    counts = kind.bincount(minlength=3)*n/len(kind)
    assert stats.chisquare(counts.numpy(), [.5*n, .2*n, .3*n]).pvalue > 1e-3

def test_random_choice_is_remembered_by_the_seed_and_leaves_others_alone():
    a,b = ([x for x,*_ in trained(RandomMix([CutMix(), FMix()], per='item'), (7, 10), LABELS, CrossEntropyLossFlat())] for _ in range(2))
    assert all(map(torch.equal, a, b))

def test_random_choice_among_alphas_serves_tables():
    x,rows = torch.eye(N),[]
    model = nn.Linear(N, C)
    model.register_forward_pre_hook(lambda m,args: rows.append(args[0].clone()))
    learn = Learner(DataLoaders([(x, LABELS)]*100, []), model, CrossEntropyLossFlat(),
        cbs=RandomMix([MixUp(.1), MixUp(1e9)], [.4, .4], per='item'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    M = torch.stack(rows)
    assert ((M > 0).sum(2) <= 2).all()
    half = (M.diagonal(dim1=1, dim2=2) < .501).float().mean()
    assert .33 < half < .47
    with pytest.raises(ValueError, match='needs inputs with spatial dimensions'):
        trained(RandomMix([MixUp(.1), CutMix()], per='item'), None, LABELS, CrossEntropyLossFlat(), x=x)

def test_two_that_mix_are_refused():
    with pytest.raises(ValueError, match='RandomMix'): trained([MixUp(), CutMix()], (7, 10), LABELS, CrossEntropyLossFlat())

class Given(Callback):
    order = 60
    def before_fit(self): self.seen = [*getattr(self, 'seen', [])]
    def after_pred(self): self.seen.append(0. if self.learn.mix_up.plan is None else 1-self.learn.mix_up.plan.lam.mean().item())

def scheduled(train, *args, **kwargs):
    torch.manual_seed(0)
    learn = Learner(DataLoaders([(torch.randn(200, 3), torch.arange(200) % 2)]*10, []), nn.Linear(3, 2), CrossEntropyLossFlat(),
        cbs=[MixUp(*args, **kwargs), Given()])
    with learn.no_bar(), learn.no_logging(): train(learn)
    return torch.tensor(learn.given.seen)

@pytest.mark.slow
def test_schedules():
    from fastai.callback.schedule import SchedCos, SchedNo, combine_scheds
    for train in lambda learn: learn.fit(4), lambda learn: learn.fit_one_cycle(4):
        down = scheduled(train, SchedCos(4, 1e-3))
        assert down[:4].mean() > .3 and (down[:-4].mean() > .2) and down[-2:].mean() < .05
        late = scheduled(train, combine_scheds([.5, .5], [SchedNo(0, 0), SchedNo(1, 1)]))
        assert (late[:20] == 0).all() and (late[21:] > 0).all()
        half = scheduled(train, lambda pct: 2. if pct < .5 else 0)
        assert (half[:20] > 0).all() and (half[21:] == 0).all()
    twice = scheduled(lambda learn: [learn.fit(2), learn.fit(2)], 1., start=.5)
    assert ((twice > 0) == torch.arange(40).remainder(20).ge(10)).all()
    epochs = scheduled(lambda learn: learn.fit(4), 1., start=1, stop=3)
    assert ((epochs > 0) == (torch.arange(40) >= 10) & (torch.arange(40) < 30)).all()

def test_lr_find_sees_the_mixing_of_the_start():
    from fastai.callback.schedule import SchedLin
    assert (scheduled(lambda learn: learn.lr_find(num_it=30, stop_div=False, show_plot=False), SchedLin(4, 1e-9)) > .25).all()
    assert (scheduled(lambda learn: learn.lr_find(num_it=30, stop_div=False, show_plot=False), 1., start=.1) == 0).all()

@pytest.mark.parametrize('kwargs,name', [(dict(alpha=lambda pct: -pct), 'alpha'), (dict(p=lambda pct: 2), 'p'), (dict(start=2.), 'start'),
    (dict(stop=-1), 'stop'), (dict(start='late'), 'start')])
def test_bad_schedules_are_refused(kwargs, name):
    with pytest.raises((TypeError, ValueError), match=f'{name} must be'): MixUp(**kwargs)

@pytest.mark.parametrize('per', ['item', 'batch'])
@pytest.mark.parametrize('methods', [lambda: [MixUp(0), MixUp(0)], lambda: [MixUp(1., start=1.), CutMix(p=0)],
    lambda: [MixUp(lambda pct: 0.), CutMix(stop=0)]])
def test_methods_that_are_off_are_not_chosen(per, methods):
    for x,*_ in trained(RandomMix(methods(), per=per), (7, 10), LABELS, CrossEntropyLossFlat()): assert torch.equal(x, own_numbers((7, 10)))

def test_random_choice_holds_no_learner():
    import pickle
    cb = RandomMix([CutMix(), SaliencyMix()])
    trained(cb, (7, 10), LABELS, CrossEntropyLossFlat())
    cb.learn = None
    assert len(pickle.dumps(cb)) < 5000

def test_random_choice_for_items_does_not_average_classes():
    y = LABELS.view(N, 1, 1).expand(N, 7, 10)
    with pytest.raises(ValueError, match="per='batch'"):
        trained(RandomMix([MixUp(), CutMix()], per='item'), (7, 10), y, CrossEntropyLossFlat(axis=1), positions=True)

class Two(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.head = nn.Linear(n, C)
    def forward(self, a, b):
        self.a,self.b = a.detach(),b.detach()
        return self.head(a.flatten(1)[:,:self.head.in_features])

def two_inputs(cb, a, b):
    dls = DataLoaders([(a, b, LABELS)], [])
    dls.n_inp = 2
    learn = Learner(dls, Two(8), CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn.model

@pytest.mark.parametrize('a,b', [((9,), (6, 8)), ((6, 8), (4, 5, 6)), ((6, 8), (12, 16))],
    ids=['signal and picture', 'picture and volume', 'two sizes'])
@each_method
def test_inputs_of_different_kinds(name, a, b):
    "Each is mixed, with the same partners"
    torch.manual_seed(0)
    model = two_inputs(METHODS[name](), own_numbers(a), own_numbers(b))
    shares = [matrix(o).fill_diagonal_(0) for o in (model.a, model.b)]
    both = (shares[0].sum(1) > 0) & (shares[1].sum(1) > 0)
    assert both.any() and torch.equal(shares[0].argmax(1)[both], shares[1].argmax(1)[both])

def test_salience_is_that_of_the_inputs_that_are_mixed():
    dull,dot = torch.zeros(N, 1, 20, 20),torch.zeros(N, 1, 20, 20)
    dot[:,:,15:18,15:18] = torch.arange(1., N+1).view(N, 1, 1, 1)
    model = two_inputs(SaliencyMix(minmax=(.3, .3), inputs=1), dull, dot)
    assert torch.equal(model.a, dull) and (model.b[:,0,16,16] != dot[:,0,16,16]).all() and (model.b[:,0,:8,:8] == 0).all()

@each_method
@pytest.mark.parametrize('y', [F.one_hot(LABELS, 13).float(), torch.softmax(torch.randn(N, 13), 1)], ids=['tags', 'soft'])
def test_numbers_for_classes_are_no_positions(name, y):
    learn = Learner(DataLoaders([(own_numbers((13,)), y)], []), Shares(), nn.CrossEntropyLoss(), cbs=METHODS[name]())
    learn.model.head = nn.Linear(N, 13)
    losses = Losses()
    learn.add_cb(losses)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    x,pred = learn.model.pages[0]
    torch.testing.assert_close(losses.seen[0], F.cross_entropy(pred, matrix(x)@y), atol=1e-5, rtol=1e-5)

def test_which_targets_have_positions():
    from fastai_mixup.batch import Batch
    from fastai_mixup.masks import MaskPlan
    plan = MaskPlan(Batch((), (), 2), 1, lambda size: torch.ones(2, *size))
    plan.mask((8, 12))
    sizes = {(2, 8, 12): 'map', (2, 1, 8, 12): 'map', (2, 4, 6): 'perhaps', (2, 3, 4, 6): 'perhaps', (2, 4, 10): None, (2,): None,
        (2, 7): None, (2, 16, 24): 'map'}
    assert {shape: plan.certainty(torch.zeros(shape, dtype=torch.long), True) for shape in sizes} == sizes
    numbers = sizes | {(2, 4, 6): None, (2, 3, 4, 6): 'perhaps', (2, 16, 24): 'perhaps', (2, 3, 16, 24): 'map', (2, 24, 3, 3): None,
        (2, 1, 1): None}
    assert {shape: plan.certainty(torch.zeros(shape), False) for shape in numbers} == numbers

def test_complex_pictures_are_resized_whole():
    x = torch.randn(N, 2, 8, 8, dtype=torch.complex64)
    class Keep(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(2, C)
        def forward(self, x):
            self.x = x
            return self.head(x.abs().mean((2, 3)))
    learn = Learner(DataLoaders([(x, LABELS)], []), Keep(), CrossEntropyLossFlat(), cbs=ResizeMix(side=(.7, .7)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert (learn.model.x.imag != 0).all()

def test_schedules_may_pass_below_the_smallest_alpha():
    from fastai.callback.schedule import SchedPoly
    late = scheduled(lambda learn: learn.fit(12), SchedPoly(0, 1, 6))
    assert late[0] == 0 and late[-1] > .1

@pytest.mark.parametrize('make,name', [
    (lambda: SmoothMix(alpha=2), 'alpha'), (lambda: ResizeMix(fold=True), 'fold'), (lambda: RandomMix([MixUp()], alpha=.3), 'alpha'),
    (lambda: CutMix(minmax=(.1, .2), fold=True), 'fold'),
    (lambda: MixUp(start=.75, stop=.25), 'start'), (lambda: MixUp(lambda: 1), 'alpha'), (lambda: MixUp(lambda pct: torch.ones(2)), 'alpha'),
    (lambda: RandomMix([MixUp()], [0]), 'weights'),
    (lambda: RandomMix([MixUp(inputs=0)]), 'inputs')])
def test_what_makes_no_sense_is_refused(make, name):
    with pytest.raises((TypeError, ValueError), match=name): make()
