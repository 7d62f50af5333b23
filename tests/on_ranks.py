"What the tests of distributed training run on each rank: `python on_ranks.py RANKS FOLDER PART`; each rank writes down what it saw."
import os
import sys
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import DistributedDataParallelKwargs
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, Recorder, default_device, nn, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.distributed import DistributedDL
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.module import _global_forward_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.all import (
    CutMix,
    DifferentClass,
    ManifoldMixUp,
    MixedAccuracy,
    MixUp,
    PreviousBatch,
    PuzzleMix,
    RandomMix,
    RegMixUp,
    ReMix,
    SnapMix,
    TransMix,
)
from fastai_mixup.distributed import AcrossRanks

N,BS,C,SIDE = 21,4,3,8
DEVICE = 'cpu' # of this rank
Y = torch.arange(N)**2 % 5 % C
ROWS = torch.eye(N)
PICTURES = ROWS.view(N, N, 1, 1).expand(N, N, SIDE, SIDE).contiguous()

class Pass(nn.Module):
    def forward(self, x): return x*1

class Net(nn.Module):
    "What comes through `blocks` is M, if items are one-hot numbers; `spare` is a parameter that nothing uses"
    def __init__(self, head, spare=False):
        super().__init__()
        self.blocks,self.head = nn.Sequential(Pass(), Pass()),head
        if spare: self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = self.blocks(x)
        self.M = (x if x.ndim == 2 else x.flatten(2).mean(2)).detach()
        return self.head(x)

def rows(**kwargs): return Net(nn.Linear(N, C), **kwargs)
def pictures(**kwargs):
    return Net(nn.Sequential(nn.Conv2d(N, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, C)), **kwargs)
def normed(**kwargs):
    return Net(nn.Sequential(nn.Conv2d(N, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, C)), **kwargs)

def sharded(**kwargs):
    "Of which each rank holds a part: FSDP2"
    net,mesh = rows(),init_device_mesh('cpu', (dist.get_world_size(),))
    for part in net.blocks[1],net.head,net: fully_shard(part, mesh=mesh, **kwargs)
    return net

def halved():
    "The same, where each part answers in bfloat16"
    return sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))

def transformer(**kwargs):
    from timm.models.vision_transformer import VisionTransformer
    return Net(VisionTransformer(SIDE, 4, N, C, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.), **kwargs)

def inner(model): return getattr(model, 'module', model)
def whole(o): return o.full_tensor() if hasattr(o, 'full_tensor') else o.clone()
def state(model): return {k: whole(v) for k,v in model.state_dict().items()}
def grads(model): return {name: whole(p.grad) for name,p in inner(model).named_parameters() if p.grad is not None}

class Witness(Callback):
    "Writes down each training batch from outside"
    order,run_valid = 5,False
    def __init__(self, lists=None): self.lists = lists
    def before_fit(self): self.pages = []
    def before_batch(self): self.batch,self.before = [o.clone() for o in (self.x, self.y)],state(inner(self.model))

    def after_loss(self):
        net,cb = inner(self.model),next((cb for cb in self.learn.cbs if hasattr(cb, 'plan')), None)
        plan = cb and cb.plan
        self.pages.append(SimpleNamespace(
            batch=self.batch, ids=own_ids(self.batch[0]), M=net.M.clone(),
            head={k.removeprefix('head.'): v for k,v in self.before.items() if k.startswith('head.')},
            pred=self.learn.pred.detach().clone(),
            loss=self.learn.loss.clone(), weights=plan.label_weights if plan is not None and plan.has_own_labels else None,
            layer=plan and plan.layer, mixed=plan is not None))

    def after_backward(self): self.pages[-1].grads = grads(self.model)

def own_ids(x): return (x if x.ndim == 2 else x.flatten(2).mean(2)).argmax(1)

class Wrapped(Callback):
    "DistributedDataParallel by hand, for batches that each rank chooses itself"
    order = 11
    def __init__(self, **kwargs): self.kwargs = kwargs
    def before_fit(self): self.learn.model = DistributedDataParallel(self.learn.model, **self.kwargs)
    def after_fit(self): self.learn.model = self.learn.model.module

def learner(dls, net, cbs, lr, **kwargs):
    learn = Learner(dls, net, CrossEntropyLossFlat(), partial(SGD, mom=0.), lr=lr, cbs=[Witness(), *cbs], **kwargs)
    learn.remove_cb(ProgressCallback)
    if not kwargs: learn.remove_cb(Recorder)
    return learn

def remains(learn):
    "What must not remain after a fit"
    x = (ROWS if learn.witness.pages[0].batch[0].ndim == 2 else PICTURES).clone()
    with torch.no_grad(): learn.model(x.to(DEVICE))
    return SimpleNamespace(kind=type(learn.model).__name__, hooks=len(_global_forward_hooks),
        loaders=[type(dl).__name__ for dl in learn.dls.loaders], M=learn.model.M,
                           forwards=[n for n,m in learn.model.named_modules() if 'forward' in vars(m)],
                           cb=[getattr(cb, 'plan', None) for cb in learn.cbs])

def told(learn):
    return SimpleNamespace(pages=learn.witness.pages, params=state(learn.model), after=remains(learn),
        values=list(getattr(getattr(learn, 'recorder', None), 'values', [])))

def fit(mix, net=rows, seed=0, epochs=2, lr=.1, sync_bn=False, metrics=None, **ddp):
    "Train as users do, by `distrib_ctx`; what is in `ddp` goes to DistributedDataParallel"
    set_seed(seed)
    x = ROWS if net is rows else PICTURES
    dl = DataLoader(TensorDataset(x, Y), batch_size=BS, shuffle=True)
    learn = learner(DataLoaders(dl, dl, device=DEVICE), net(spare=bool(ddp.get('find_unused_parameters'))), [mix] if mix else [], lr,
        **({'metrics': metrics} if metrics else {}))
    if metrics: learn.recorder.train_metrics = True
    with learn.no_logging(), learn.distrib_ctx(sync_bn=sync_bn, cpu=DEVICE == 'cpu',
        kwargs_handlers=[DistributedDataParallelKwargs(**ddp)] if ddp else None):
        learn.fit(epochs)
    return told(learn)

def fit_lists(mix, sizes, net=rows, seed=0, lr=.1, x=ROWS, **ddp):
    "Train on batches of `sizes[rank]`"
    set_seed(seed)
    batches = [(x[i], Y[i]) for i in (torch.arange(N).roll(-7*dist.get_rank())[:sum(sizes[dist.get_rank()])].split(sizes[dist.get_rank()]))]
    learn = learner(DataLoaders(batches, []), net(), [mix, *[Wrapped(**ddp)]*(net not in (sharded, halved))], lr)
    with learn.no_logging(): learn.fit(1)
    return told(learn)

def beside(make, net=rows, **kwargs):
    "A fit without steps, and one of this process alone, on the batches and by the draws of this rank"
    def mix(): return make(generator=torch.Generator().manual_seed(dist.get_rank()))
    res = fit(mix(), net, lr=0., epochs=1, **kwargs)
    set_seed(0)
    alone = net()
    alone.load_state_dict(res.params)
    learn = learner(DataLoaders([p.batch for p in res.pages], []), alone, [mix()], 0.)
    with learn.no_logging(): learn.fit(1)
    res.alone = learn.witness.pages
    return res

PLACES = dict(layers=['blocks.0', 'blocks.1'])
DDP = {'': {}, '_unused': dict(find_unused_parameters=True), '_static': dict(static_graph=True)}

def same(**kwargs): return MixUp(1., generator=torch.Generator().manual_seed(7), **kwargs)

def error(f):
    try: f()
    except Exception as e: return f'{type(e).__name__}: {e}'

def synced(self, x):
    "SyncBatchNorm without a GPU"
    from torch.distributed.nn.functional import all_reduce
    synced.calls += 1
    if not self.training: return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0., self.eps)
    sums = all_reduce(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), x.new_full((x.shape[1],), x.numel()/x.shape[1])]))
    mean,square = sums[0]/sums[2],sums[1]/sums[2]
    return ((x - mean.view(-1, 1, 1)) / (square - mean**2 + self.eps).sqrt().view(-1, 1, 1))*self.weight.view(-1, 1, 1) + self.bias.view(-1,
        1, 1)

def with_synced(f):
    synced.calls = 0
    with (patch.object(nn.SyncBatchNorm, 'forward', synced), patch.object(DistributedDataParallel, '_passing_sync_batchnorm_handle',
        lambda *_: None)): res = f()
    res.calls = synced.calls
    return res

def counted(mix):
    "How often torch was asked to send something by us, not by the wrapper, in a fit"
    names,calls = [n for n in dir(dist) if n.startswith(('all_', 'broadcast', 'reduce', 'gather', 'scatter', 'barrier', 'send', 'recv',
        'isend', 'irecv'))],[]
    stock = {n: getattr(dist, n) for n in names if callable(getattr(dist, n))}
    def noting(n, f):
        def inner(*args, **kwargs):
            calls.append(n)
            return f(*args, **kwargs)
        return inner
    for n,f in stock.items(): setattr(dist, n, noting(n, f))
    try: fit(mix)
    finally:
        for n,f in stock.items(): setattr(dist, n, f)
    return calls

CASES = dict(
    **{f'inputs{k}': partial(fit, *[MixUp(1.)], **v) for k,v in DDP.items()},
    **{f'hidden{k}': (lambda v=v: fit(ManifoldMixUp(1., **PLACES), epochs=4, **v)) for k,v in DDP.items()},
    again=lambda: fit(MixUp(1.)), other_seed=lambda: fit(MixUp(1.), seed=1), same=lambda: fit(same()),
    batch=lambda: fit(MixUp(1., per='batch')), plain=lambda: fit(None),
    seeds=lambda: fit(ManifoldMixUp(1., **PLACES), seed=dist.get_rank()), some=lambda: fit(ManifoldMixUp(1., p=.5, **PLACES), epochs=6),
    found=lambda: fit(ManifoldMixUp(1.), pictures, epochs=4),
    output=lambda: fit(ManifoldMixUp(1., layers=['blocks.1', 'output']), epochs=3),
    hidden_cutmix=lambda: fit(ManifoldMixUp(method=CutMix(), **PLACES), pictures),
    uneven=lambda: fit_lists(MixUp(1.), [[4, 3, 1, 2], [4, 2, 4, 1]]),
    uneven_hidden=lambda: fit_lists(ManifoldMixUp(1., **PLACES), [[1, 3, 4, 2, 4], [4, 1, 4, 2, 2]], static_graph=True),
    **{f'beside_{name}': partial(beside, make, net) for name,(make,net) in dict(
        mixup=(partial(MixUp, 1.), rows), hidden=(partial(ManifoldMixUp, 1., **PLACES), rows), cutmix=(CutMix, pictures),
        random=(partial(RandomMix, [MixUp(1.), CutMix()]), pictures),
        random_items=(partial(RandomMix, [MixUp(1.), CutMix()], per='item'), pictures), regmixup=(RegMixUp, rows),
        snapmix=(SnapMix, pictures), transmix=(TransMix, transformer), puzzle=(PuzzleMix, pictures),
        different=(partial(MixUp, 1., pairing=DifferentClass()), rows), previous=(partial(MixUp, 1., pairing=PreviousBatch()), rows),
        remix=(partial(MixUp, 1., labels=ReMix(kappa=1.2)), rows)).items()},
    puzzle_static=lambda: beside(PuzzleMix, pictures, static_graph=True),
    accuracy=lambda: fit(MixUp(1.), metrics=[MixedAccuracy()]),
    sync_bn=lambda: error(lambda: fit(None, normed, sync_bn=True)),
    sync_bn_mixed=lambda: error(lambda: fit(ManifoldMixUp(), normed, sync_bn=True)),
    **{f'synced_{k}': (lambda cb=cb: with_synced(lambda: fit(cb(), normed, sync_bn=True, epochs=8))) for k,cb in dict(
        inputs=lambda: MixUp(1.), hidden=lambda: ManifoldMixUp(1., p=.5, **PLACES), found=lambda: ManifoldMixUp(1., p=.5),
        puzzle=lambda: PuzzleMix(p=.5)).items()},
    sent=lambda: {k: counted(cb) for k,cb in dict(none=None, inputs=MixUp(), hidden=ManifoldMixUp(), remix=MixUp(labels=ReMix()),
    across=MixUp(pairing=AcrossRanks())).items()},
    across=lambda: fit(MixUp(1., pairing=AcrossRanks()), epochs=20), across_cutmix=lambda: fit(CutMix(1., pairing=AcrossRanks()), pictures),
    across_random=lambda: fit(RandomMix([MixUp(1.), CutMix()], pairing=AcrossRanks()), pictures),
    across_puzzle=lambda: fit(PuzzleMix(pairing=AcrossRanks()), pictures),
    across_snapmix=lambda: fit(SnapMix(pairing=AcrossRanks()), pictures),
    across_regmixup=lambda: fit(RegMixUp(method=MixUp(1., pairing=AcrossRanks()))),
    across_uneven=lambda: fit_lists(MixUp(1., pairing=AcrossRanks()), [[4, 3, 1, 2], [4, 2, 4, 1]]),
    across_ones=lambda: fit_lists(MixUp(1., pairing=AcrossRanks()), [[1]*5]*2),
    across_shapes=lambda: error(lambda: fit_lists(MixUp(1., pairing=AcrossRanks()), [[4]]*2, x=[ROWS, ROWS[...,None]][dist.get_rank()])))
EVEN,UNEVEN = [[4, 3, 4, 2, 4]]*2,[[1, 3, 4, 3, 4], [4, 3, 1, 3, 4]]
SHARDED = dict(inputs=lambda: fit_lists(MixUp(1.), EVEN, net=sharded),
    hidden=lambda: fit_lists(ManifoldMixUp(1., **PLACES), EVEN, net=sharded),
    some=lambda: fit_lists(ManifoldMixUp(1., p=.7, **PLACES), UNEVEN, net=sharded),
    found=lambda: fit_lists(ManifoldMixUp(1., p=.7, include_input=False), UNEVEN, net=sharded),
    halves=lambda: fit_lists(ManifoldMixUp(1., include_input=False, **PLACES), EVEN, net=halved),
    **{f'asks_{k}': (lambda cb=cb: error(lambda: fit_lists(cb(), EVEN, net=sharded))) for k,cb in dict(
        puzzle=lambda: PuzzleMix(p=.5), snap=SnapMix, trans=TransMix, random=lambda: RandomMix([MixUp(), PuzzleMix()]),
        around=lambda: RegMixUp(method=RandomMix([MixUp(), SnapMix()]))).items()})
ON_DEVICES = 'inputs', 'hidden', 'some', 'found', 'across', 'across_cutmix'
FOUR = 'inputs', 'hidden', 'some', 'beside_random', 'across', 'uneven4'
CASES['uneven4'] = lambda: fit_lists(MixUp(1., pairing=AcrossRanks()), [[4, 3], [4, 1], [2, 2], [3, 4]])

class Dies(Callback):
    order = 50
    def before_batch(self):
        if dist.get_rank() == 1 and self.train_iter == 3: os._exit(1)

def broadcast(self, t, rank):
    t = torch.tensor(t, device=DEVICE)
    dist.broadcast(t, rank)
    return t.tolist()

def run(cases):
    res = {}
    for name,case in cases.items():
        dist.barrier()
        res[name] = case()
    return res

def survive(mix):
    "A fit in which rank 1 leaves: what the others are told"
    set_seed(0)
    dl = DataLoader(TensorDataset(ROWS, Y), batch_size=2, shuffle=True)
    learn = learner(DataLoaders(dl, dl, device='cpu'), rows(), [mix, Dies()], .1)
    with learn.no_logging(), learn.distrib_ctx(sync_bn=False, cpu=True): return error(lambda: learn.fit(2))

PARTS = dict(devices=lambda: run({n: CASES[n] for n in ON_DEVICES}),
    two=lambda: run({n: c for n,c in CASES.items() if n != 'uneven4'}), four=lambda: run({n: CASES[n] for n in FOUR}),
    sharded=lambda: run(SHARDED), **{f'dies_{k}': (lambda cb=cb: survive(cb())) for k,cb in dict(
    hidden=ManifoldMixUp, across=lambda: MixUp(pairing=AcrossRanks())).items()})

def take_device(rank, world):
    "A GPU for each rank, where there are as many; which backend they talk by"
    global DEVICE
    if torch.cuda.device_count() < world: return 'gloo'
    DEVICE = f'cuda:{rank}'
    torch.cuda.set_device(rank)
    return 'nccl'

def be(rank, world, folder, part):
    DistributedDL._broadcast = broadcast
    torch.set_num_threads(1) # before threads race for the pool that the fork has broken
    os.environ.update({'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world), 'MASTER_ADDR': 'localhost',
        'MASTER_PORT': '0'})
    default_device(use=part == 'devices' and torch.cuda.device_count() >= world)
    backend = 'gloo' if part != 'devices' else take_device(rank, world)
    dist.init_process_group(backend, init_method=f'file://{folder}/store', rank=rank, world_size=world,
        timeout=timedelta(seconds=20 if part.startswith('dies') else 300))
    torch.save(PARTS[part](), f'{folder}/{rank}')
    if not part.startswith('dies'): dist.barrier() # who leaves first closes what the other may still read from

if __name__ == '__main__':
    world,folder,part = int(sys.argv[1]),*sys.argv[2:]
    start = get_context('spawn' if part == 'devices' else 'fork') # a fork imports nothing again, but cannot use CUDA, which fastai begins
    ranks = [start.Process(target=be, args=(r, world, folder, part)) for r in range(world)]
    for p in ranks: p.start()
    for p in ranks: p.join()
    sys.exit(max(p.exitcode != 0 for p in ranks))
