"PuzzleMix shows what matters to the model, tells the loss what it shows, and leaves everything else as it was."
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, Tensor, nn
from fastai.callback.progress import ProgressCallback
from fastai.data.load import DataLoader
from fastai.torch_core import set_seed
from fastai.vision.core import TensorImage, TensorMask
from scipy.optimize import linear_sum_assignment
from test_methods import LABELS, LOSSES, SIZES, C, Losses, N, matrix, own_numbers
from torch.nn.parallel import DistributedDataParallel

from fastai_mixup.all import CutMix, GridMix, ManifoldMixUp, MixUp, RandomMix, ResizeMix
from fastai_mixup.batch import Batch
from fastai_mixup.methods.puzzlemix import (
    PuzzleMix,
    input_gradients,
    mask_energy,
    move_blocks,
    puzzle_mask,
    puzzle_plan,
    smoothed,
    solve_puzzle,
    source_positions,
    transport,
    travel_cost,
)
from fastai_mixup.methods.regmixup import RegMixUp
from fastai_mixup.pairing import PreviousBatch

PUZZLES = dict(plain=PuzzleMix, still=partial(PuzzleMix, travel=None), levels=partial(PuzzleMix, levels=4, grid=3),
    folded=partial(PuzzleMix, fold=True), fine=partial(PuzzleMix, grid=16, smooth=0))
each_puzzle = pytest.mark.parametrize('make', PUZZLES.values(), ids=PUZZLES)

class Weighed(nn.Module):
    "Some places of each channel matter more than others, so that items with other channels have another salience"
    def __init__(self, size, places=False):
        super().__init__()
        where = (3*torch.randn(N, *size, generator=torch.Generator().manual_seed(0))).exp().clamp_max(100)
        self.head,self.where,self.places,self.calls,self.pages = nn.Linear(N, C),where,places,0,[]
    def forward(self, x):
        x = x.as_subclass(Tensor)
        self.calls += 1
        pred = self.head((x*self.where).movedim(1, -1)).movedim(-1, 1) if self.places else self.head((x*self.where).flatten(2).mean(2))
        self.pages.append((x.detach(), pred.detach()))
        return pred

def trained(cb, size, y=LABELS, loss_func=None, n=4, places=False, x=None):
    "What the model saw and said in each batch, and the loss that the Learner reported"
    torch.manual_seed(1)
    batch = own_numbers(size) if x is None else x,y
    before = [o.clone() for o in batch]
    model,losses = Weighed(size, places),Losses()
    learn = Learner(DataLoaders([batch]*n, []), model, loss_func or CrossEntropyLossFlat(), SGD, lr=.01, cbs=[cb, losses])
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)
    assert all(torch.equal(a, b) for a,b in zip(batch, before))
    assert model.calls == len(model.pages) == n
    return [(*page, loss) for page,loss in zip(model.pages, losses.seen)]

@pytest.mark.slow
@each_puzzle
@pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('loss', LOSSES)
def test_loss_is_told_what_is_shown(make, size, loss):
    loss_func,y,by_hand = LOSSES[loss]
    for x,pred,got in trained(make(), size, y, loss_func, n=2):
        torch.testing.assert_close(got, by_hand(pred, y, matrix(x)), atol=1e-4, rtol=1e-4)

def test_items_are_really_mixed_each_by_a_mask_of_its_own():
    own = torch.cat([x[torch.arange(N),torch.arange(N)] for x,*_ in trained(PuzzleMix(), (9, 8), n=20)]).flatten(1)
    mixed = (own.mean(1) > 0) & (own.mean(1) < 1)
    assert mixed.float().mean() > .7 and own[mixed].unique(dim=0).shape[0] > .8*mixed.sum()

def test_mask_of_a_batch_that_shares_lam():
    for x,*_ in trained(PuzzleMix(per='batch'), (9, 8)):
        own = x[torch.arange(N),torch.arange(N)]
        assert (own == own[:1]).all()

INSIDE = dict(item=lambda m: RandomMix([m, ResizeMix(), CutMix()], per='item'), alone=lambda m: RandomMix([m], [.6], per='item'),
              batch=lambda m: RandomMix([m, MixUp(1.)], per='batch'), doses=lambda m: RandomMix([m, MixUp(1.)], per='item'))
@pytest.mark.slow
@each_puzzle
@pytest.mark.parametrize('inside', INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize('loss', ['classes', 'own', 'tags'])
def test_random_choice(make, inside, loss):
    loss_func,y,by_hand = LOSSES[loss]
    for x,pred,got in trained(inside(make()), (7, 10), y, loss_func, n=4):
        torch.testing.assert_close(got, by_hand(pred, y, matrix(x)), atol=1e-4, rtol=1e-4)

def test_beside_the_clean_batch():
    for x,pred,got in trained(RegMixUp(method=PuzzleMix(), eta=.5), (7, 10)):
        M = matrix(torch.cat([x[N:]]))
        assert torch.equal(x[:N], own_numbers((7, 10))) and (M.diagonal() < 1).any()
        torch.testing.assert_close(got, F.cross_entropy(pred[:N], LABELS) + .5*LOSSES['classes'][2](pred[N:], LABELS, M), atol=1e-4,
            rtol=1e-4)

def counted(*size): return torch.arange(N*math.prod(size)).view(N, 1, *size)

TWO_LEVELS = partial(PuzzleMix, levels=2, travel=.8)
@pytest.mark.parametrize('make,moves', [(TWO_LEVELS, True), (partial(TWO_LEVELS, travel=None), False),
    (partial(TWO_LEVELS, per='batch'), True),
                                        (lambda: RandomMix([TWO_LEVELS(), GridMix()], per='item'), True),
                                        (lambda: RandomMix([TWO_LEVELS(travel=None), GridMix()], per='item'), False)],
                         ids=['puzzle', 'still', 'batch', 'chosen', 'chosen_still'])
@pytest.mark.parametrize('size', [(13,), (7, 10), (8, 16), (4, 5, 3)])
def test_masks_move_with_their_pictures(make, moves, size):
    "Each place has a number of its own, in the picture and in its mask"
    y,seen,moved = counted(*size),[],False
    def told(pred, y):
        seen.append(y)
        return (pred.mean(1)*y.float().view(pred.mean(1).shape)).mean()
    x = torch.cat([y.float(), torch.rand(N, N-1, *size)], 1)
    for shown,*_ in trained(make(), size, TensorMask(y), told, places=True, x=x, n=4):
        places = shown[:,0].flatten(1) % math.prod(size)
        moved |= not torch.equal(places, places.new_tensor(range(math.prod(size))).expand_as(places))
        assert any(o.shape == y.shape and torch.equal(o.as_subclass(Tensor).float(), shown[:,:1]) for o in seen)
    assert moved == moves

def test_whole_blocks_are_only_moved():
    "Nothing is lost, and nothing doubled, where blocks divide the sides"
    x,source = counted(8, 12).float(),torch.stack([torch.randperm(24) for _ in range(N)])
    moved = move_blocks(x, source_positions(source, (4, 6), (8, 12)))
    assert torch.equal(moved.flatten(1).sort(1)[0], x.flatten(1)) and not torch.equal(moved, x)
    blocks = lambda o: o.view(N, 4, 2, 6, 2).transpose(2, 3).flatten(3).flatten(1, 2)
    assert torch.equal(blocks(moved), blocks(x)[torch.arange(N)[:,None],source])

class Bright(nn.Module):
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.ones(()))
    def forward(self, x): return self.scale*x.square().flatten(1).sum(1)

def test_a_bright_blob_is_not_hidden_by_a_blank():
    x = torch.zeros(N, 1, 16, 24)
    for i in range(0, N, 2): x[i,0,2*i:2*i+4,3*i:3*i+6] = 1+i
    seen = []
    class Keep(Callback):
        order = 60
        def before_batch(self): seen.append((self.x, self.learn.puzzle_mix.plan.index))
    learn = Learner(DataLoaders([(x, torch.zeros(N))]*10, []), Bright(), lambda pred,y: (pred-y).mean(), SGD, lr=0.,
        cbs=[PuzzleMix(), Keep()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    full = x.flatten(1).sum(1)
    for mixed,perm in seen:
        alone = (full == 0) != (full[perm] == 0)
        torch.testing.assert_close(mixed.flatten(1).sum(1)[alone], (full+full[perm])[alone])

def test_two_blobs_in_one_place_are_both_shown():
    own,other = torch.rand(50, 8, 8, generator=torch.Generator().manual_seed(0))/10,torch.rand(50, 8, 8,
        generator=torch.Generator().manual_seed(1))/10
    own[:,3,4],other[:,3,4] = 40,20
    for travel,both in (.8, 1.), (None, 0.):
        mask,*sources = solve_puzzle(own, other, torch.full((50,), .4), travel=travel)
        shown = [(w.flatten(1)*(s.flatten(1) if travel is None else s.flatten(1).gather(1, source))).amax(1) > 10
                 for w,s,source in zip((mask, 1-mask), (own, other), sources)]
        assert (shown[0] & shown[1]).float().mean() == both

class Sensitive(nn.Module):
    "Has everything that a pass may change"
    def __init__(self):
        super().__init__()
        self.bn,self.drop,self.gru,self.head = nn.BatchNorm2d(3),nn.Dropout(),nn.GRU(3, 4, batch_first=True),nn.Linear(4, C)
        self.calls,self.h,self.seen,self.kept = 0,None,[],[]
    def forward(self, x):
        self.calls += 1
        self.seen.append(x.detach())
        o = self.bn(x)
        o.mul_(2)
        kept = self.drop(torch.ones(5))
        self.kept.append(kept)
        out,self.h = self.gru(o.mean(3).mT, None if self.h is None else self.h.detach())
        return self.head(out[:,-1])

class Clean(Callback):
    order = 40
    def before_batch(self):
        self.learn.had_grads = [*getattr(self.learn, 'had_grads', []),
            *(p.grad for p in self.model.parameters() if p.grad is not None and p.grad.any())]
    def after_epoch(self): assert self.learn.loss_func is CLEAN_LOSS

CLEAN_LOSS = CrossEntropyLossFlat()
def sensitive(*cbs):
    set_seed(0)
    x,y = torch.randn(24, 3, 9, 8),torch.arange(24) % C
    x[:,0,0,0] = torch.arange(24.)
    dls = DataLoaders(DataLoader([*zip(x, y)], bs=6, shuffle=True, num_workers=0), [])
    learn = Learner(dls, Sensitive(), CLEAN_LOSS, SGD, lr=0., cbs=[*cbs, Clean()])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    return learn

def test_state_is_untouched():
    plain,puzzled = sensitive().model,sensitive(PuzzleMix())
    assert puzzled.had_grads == []
    puzzled = puzzled.model
    assert puzzled.calls == plain.calls == 8 and puzzled.bn.num_batches_tracked == 8
    assert all(map(torch.equal, plain.kept, puzzled.kept))
    assert not torch.equal(plain.seen[0], puzzled.seen[0])
    again = nn.BatchNorm2d(3)
    for x in puzzled.seen: again(x)
    torch.testing.assert_close(again.running_mean, puzzled.bn.running_mean)
    torch.testing.assert_close(again.running_var, puzzled.bn.running_var)
    identity = sensitive(PuzzleMix(alpha=0)).model
    assert all(map(torch.equal, identity.seen, plain.seen))

def test_data_order_is_that_of_the_run_without():
    orders = []
    class Order(Callback):
        order = 1
        def before_batch(self): orders.append(self.x[:,0,0,0].clone())
    for cbs in [], [PuzzleMix()]: sensitive(*cbs, Order())
    assert torch.equal(torch.cat(orders[:8]), torch.cat(orders[8:])) and len(orders) == 16

def test_same_seed_same_pictures():
    a,b = (torch.stack([x for x,*_ in trained(PuzzleMix(), (9, 8))]) for _ in range(2))
    assert torch.equal(a, b)
    a,b = (sensitive(PuzzleMix()).model.seen for _ in range(2))
    assert all(map(torch.equal, a, b))

def all_x(x, path): return True
def gradients_of(model, x, loss_func=nn.CrossEntropyLoss()): return input_gradients(model, loss_func, (x,), (LABELS,), all_x)

class Through(nn.Module):
    def __init__(self, how): super().__init__(); self.how,self.head = how,nn.Linear(4, C)
    def forward(self, x): return self.head(self.how(x).flatten(1))

def test_gradients_of_awkward_models():
    x = torch.randn(N, 1, 2, 2)
    kept,wanted = x.clone(),gradients_of(plain := Through(lambda x: x), x)[0]
    assert wanted.abs().sum() > 0
    inplace = Through(lambda x: x.mul_(1))
    inplace.load_state_dict(plain.state_dict())
    frozen = Through(lambda x: x).requires_grad_(False)
    frozen.load_state_dict(plain.state_dict())
    for model in inplace, frozen:
        with torch.no_grad(): got, = gradients_of(model, x)
        torch.testing.assert_close(got, wanted)
    got, = gradients_of(plain, x, nn.CrossEntropyLoss(reduction='none'))
    torch.testing.assert_close(got, N*wanted)
    assert gradients_of(Through(lambda x: x.detach()), x) == [] and gradients_of(Through(lambda x: x.detach()).requires_grad_(False),
        x) == []
    assert torch.equal(x, kept) and not x.requires_grad and all(p.grad is None for p in plain.parameters())

class Autocast(Callback):
    "As fastai's `MixedPrecision`, on the CPU"
    order = 10
    def before_batch(self):
        self.context = torch.autocast('cpu', torch.bfloat16)
        self.context.__enter__()
    def after_loss(self): self.context.__exit__(None, None, None)

def test_salience_is_taken_in_full_precision():
    dtypes = []
    def seen(x):
        dtypes.append((torch.is_autocast_enabled('cpu'), x.dtype))
        return x
    learn = Learner(DataLoaders([(torch.randn(N, 1, 2, 2), LABELS)], []), Through(seen), CrossEntropyLossFlat(),
        cbs=[PuzzleMix(), Autocast()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert dtypes == [(False, torch.float32), (True, torch.float32)]

def test_wrapped_for_several_processes(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model,x,calls = Through(lambda x: x),torch.randn(N, 1, 2, 2),[]
        wrapped = DistributedDataParallel(model)
        wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(gradients_of(wrapped, x), gradients_of(model, x))
        assert all(p.grad is None for p in model.parameters()) and not calls # nothing was sent to other processes
    finally: torch.distributed.destroy_process_group()

def test_where_nothing_is_known_blocks_are_salient_at_random():
    class Blind(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(1, C)
        def forward(self, x):
            self.x = x.detach()
            return self.head(torch.ones(len(x), 1))
    learn = Learner(DataLoaders([(own_numbers((9, 8)), LABELS)], []), Blind(), CrossEntropyLossFlat(), cbs=PuzzleMix())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    lam = matrix(learn.model.x).diagonal()
    assert ((lam > 0) & (lam < 1)).float().mean() > .5

def test_only_the_inputs_that_are_mixed_are_asked():
    asked = []
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(2, C)
        def forward(self, a, b):
            asked.append((a.requires_grad, b.requires_grad))
            return self.head(torch.stack([a.square().flatten(1).mean(1), b.square().flatten(1).mean(1)], 1))
    dls = DataLoaders([(torch.randn(N, 1, 8, 8), torch.randn(N, 1, 8, 8), LABELS)], [])
    dls.n_inp = 2
    learn = Learner(dls, Two(), CrossEntropyLossFlat(), cbs=PuzzleMix(inputs=1))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert asked == [(False, True), (False, False)]

def test_partners_from_another_batch():
    x = torch.randn(N, 1, 8, 8)
    class Keep(nn.Module):
        def __init__(self): super().__init__(); self.head,self.seen = nn.Linear(1, C),[]
        def forward(self, x):
            self.seen.append(x.detach().clone())
            return self.head(x.square().flatten(1).mean(1, keepdim=True))
    batches = [(x+10*i, (LABELS+i) % C) for i in range(3)]
    learn = Learner(DataLoaders(batches, []), Keep(), CrossEntropyLossFlat(), cbs=PuzzleMix(pairing=PreviousBatch()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert torch.equal(learn.model.seen[0], x) and len(learn.model.seen) == 3
    low,high = learn.model.seen[1] < 5,learn.model.seen[1] > 5
    assert low.any() and high.any()

def test_hidden_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, C))
    learn = Learner(DataLoaders([(torch.randn(N, 1, 12, 20), LABELS)]*8, []), model, CrossEntropyLossFlat(), SGD,
        cbs=ManifoldMixUp(method=PuzzleMix(), layers=['0', '1']))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert all(p.grad.isfinite().all() for p in model.parameters())

def test_pictures_keep_their_type():
    x = TensorImage(torch.rand(N, N, 9, 8))
    class Types(Callback):
        order = 8.5
        def before_batch(self): self.seen = self.x
    types = Types()
    learn = Learner(DataLoaders([(x, LABELS)], []), Through(lambda x: x.as_subclass(Tensor)[:,0,:2,:2]), CrossEntropyLossFlat(),
        cbs=[PuzzleMix(), types])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert type(types.seen) is TensorImage and (types.seen.dtype, types.seen.shape) == (x.dtype, x.shape)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize('levels', [2, 3])
def test_any_precision(dtype, levels):
    s,x = salience(2, 4, 4),torch.randn(2, 3, 9, 8, dtype=dtype)
    lam = torch.full((2,), .5)
    plan = puzzle_plan(Batch((x,), (torch.zeros(2),), 2), torch.tensor([1, 0]), lam, lambda size: solve_puzzle(s, s.flip(0), lam, levels),
        True, levels)
    mixed,wanted = plan.mix(x),plan.mix(torch.view_as_real(x).permute(0, 1, 4, 2, 3).flatten(1, 2) if dtype.is_complex else x.double())
    if dtype.is_complex: wanted = torch.view_as_complex(wanted.unflatten(1, (3, 2)).permute(0, 1, 3, 4, 2).contiguous())
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, wanted.to(dtype))

def salience(n, *blocks, seed=0): return torch.rand(n, *blocks, generator=torch.Generator().manual_seed(seed)).add(.01).pow(3).mul(4)

@pytest.mark.parametrize('blocks', [(10,), (2, 2, 3)])
def test_mask_is_the_best_of_all(blocks):
    "In one and in three dimensions, where all masks are tried"
    masks = torch.tensor([*itertools.product([0., 1.], repeat=math.prod(blocks))]).view(-1, *blocks)
    lam = torch.rand(20, generator=torch.Generator().manual_seed(1))
    for weight in (0., .1, .5):
        difference = salience(20, *blocks)-salience(20, *blocks, seed=1)
        field = difference + .2*lam.logit().view(-1, *[1]*len(blocks))
        got = mask_energy(puzzle_mask(smoothed(difference, weight), lam), field, weight)
        best = torch.stack([mask_energy(masks, f.expand_as(masks), weight).min() for f in field])
        assert (got-best).max() < 1e-3 and (got-best).min() > -1e-4

def test_mask_of_several_levels_is_the_best_of_all():
    levels,weight,prior = 3,.3,.2
    masks = torch.tensor([*itertools.product([0., .5, 1.], repeat=6)]).view(-1, 2, 3)
    lam = torch.rand(40, generator=torch.Generator().manual_seed(2))
    own,other = salience(40, 2, 3),salience(40, 2, 3, seed=1)
    def price(z, i):
        choose = torch.tensor([1., 2, 1])[(2*z).long()]
        return mask_energy(z, (own-other)[i].expand_as(z), weight) - prior*(choose.log() + 2*z*lam[i].log()
            + 2*(1-z)*(1-lam[i]).log()).flatten(1).sum(1)
    got = puzzle_mask(smoothed(own-other, weight), lam, levels, prior)
    for i in range(40): assert price(got[i:i+1], i) - price(masks, i).min() < 1e-3
    assert got.unique().tolist() == [0, .5, 1]

@pytest.mark.parametrize('blocks', [(12,), (4, 4), (3, 3, 3)])
@pytest.mark.parametrize('travel', [0., .8])
def test_transport_is_near_the_best(blocks, travel):
    n,whole = 60,math.prod(blocks)
    salient,shown = salience(n, *blocks),(salience(n, *blocks, seed=3) > .5).float()
    source = transport(salient, shown, travel)
    assert torch.equal(source.sort(1)[0], torch.arange(whole).expand(n, -1))
    worth = shown.flatten(1)[:,None]*salient.flatten(1)[:,:,None] - travel*travel_cost(blocks)
    of = lambda s: worth[torch.arange(n)[:,None],s,torch.arange(whole)].sum(1)
    best = torch.stack([of(torch.tensor(linear_sum_assignment(w.T.numpy(), maximize=True)[1]).expand(n, -1))[i] for i,
        w in enumerate(worth)])
    stay = of(torch.arange(whole).expand(n, -1))
    assert (of(source) >= stay-1e-4).all() and (of(source) <= best+1e-3).all()
    assert (of(source)-stay).sum() > .85*(best-stay).sum()

def test_nothing_moves_for_nothing():
    even = torch.ones(2, 4, 4)
    for salient,shown in (even, salience(2, 4, 4)), (salience(2, 4, 4), even), (0*even, even.roll(1)):
        for travel in 0., .8: assert torch.equal(transport(salient, shown, travel), torch.arange(16).expand(2, -1))

def test_certain_shares():
    own,other = salience(2, 4, 4),salience(2, 4, 4, seed=1)
    mask,*sources = solve_puzzle(own, other, torch.tensor([0., 1.]))
    assert torch.equal(mask.flatten(1).mean(1), torch.tensor([0., 1.])) and all(torch.equal(s, torch.arange(16).expand(2, -1))
        for s in sources)

def test_gradients_that_are_no_numbers_leave_whole_pictures():
    bad = torch.full((N, 4, 4), torch.nan)
    mask,own,other = solve_puzzle(bad, bad, torch.full((N,), .5))
    assert mask.isfinite().all() and all(torch.equal(s.sort(1)[0], torch.arange(16).expand(N, -1)) for s in (own, other))

@pytest.mark.parametrize('kwargs', [dict(grid='8'), dict(grid=65), dict(levels=2.5), dict(levels=True), dict(prior='strong'),
    dict(prior=float('nan')), dict(smooth=None),
                                    dict(smooth=101), dict(travel='far'), dict(travel=-.1), dict(alpha=-1), dict(fold=None)])
def test_bad_parameters_are_refused(kwargs):
    with pytest.raises((TypeError, ValueError), match=f'{next(iter(kwargs))} must be'): PuzzleMix(**kwargs)

@pytest.mark.parametrize('x', [torch.randn(N, 5), torch.randint(9, (N, 5))], ids=['table', 'words'])
@pytest.mark.parametrize('inside', [lambda m: m, lambda m: RandomMix([m]), lambda m: RegMixUp(method=m)])
def test_what_has_no_places_is_refused(x, inside):
    with pytest.raises(ValueError, match='PuzzleMix needs inputs with spatial dimensions.*`MixUp`'): trained(inside(PuzzleMix()), (1,), x=x)
