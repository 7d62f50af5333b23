"""On a GPU every method does what it does on the CPU, in each precision, and no batch waits for the device. Without one these tests are
skipped; `GPU_TESTS_ON=cpu python -m pytest tests/test_gpu.py` runs their code on the CPU, where it shows that they run and nothing else."""
import os
from functools import partial

import pytest
import torch
from apps import close, quiet
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, Recorder, nn, to_device
from fastai.callback.all import ChannelsLast, MixedPrecision
from test_precision import (
    BS,
    CLASSES,
    KINDS,
    N,
    apart,
    check_against,
    check_checkpointing,
    check_scaler,
    fit,
    loss_of,
    patches,
    picture_net,
    pictures,
)

from fastai_mixup.all import *
from fastai_mixup.methods import fmix
from fastai_mixup.registry import AROUND, METHODS

DEVICE = os.environ.get('GPU_TESTS_ON', 'cuda')
IS_CUDA = DEVICE == 'cuda'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(),
    reason='needs a GPU with CUDA; GPU_TESTS_ON=cpu tries the code of these tests on the CPU')]
needs_cuda = pytest.mark.skipif(not IS_CUDA, reason='only CUDA can say whether somebody waits for it')

@pytest.fixture(autouse=True)
def exact():
    "Convolutions in float32, by the same algorithm each time (products are in float32 by default)"
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False): yield

@pytest.fixture
def amp(request):
    if not IS_CUDA: request.getfixturevalue('on_cpu')

# Every method, at the inputs and at a hidden layer

def map_net(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))
MAPS = torch.randint(CLASSES, (N, BS, 32, 32), generator=torch.Generator().manual_seed(2))
GIVEN = {RandomMix: dict(methods=[MixUp(1.), CutMix()])}
HIDDEN = {picture_net: ['layer1', 'layer2'], patches: 'encoder.layers.*', map_net: '1'}
def make(cls): return cls(**GIVEN.get(cls, {}))
def net_of(cls):
    recipe = make(cls).recipe
    return patches if recipe.watches else map_net if recipe.looks_at == 'targets' else picture_net

def hidden(cls): return ManifoldMixUp(method=make(cls), layers=HIDDEN[net_of(cls)], include_input=False)
CASES = {cls.__name__: (partial(make, cls), net_of(cls)) for cls in (*METHODS, *AROUND)}
CASES |= {"RandomMix, per='item'": (lambda: RandomMix([MixUp(1.), CutMix(), ResizeMix()], per='item'), picture_net),
    'GuidedMixup, gradients': (lambda: GuidedMixup(gradients=True), picture_net)}
CASES |= {f'{cls.__name__}, hidden': (partial(hidden, cls), net_of(cls)) for cls in METHODS if not make(cls).recipe.watches}
each_case = pytest.mark.parametrize('name', CASES)

def fit_case(name, *cbs, **kwargs):
    mix,net = CASES[name]
    if net is map_net: kwargs |= dict(y=MAPS, loss_func=CrossEntropyLossFlat(axis=1))
    return fit((mix, net, pictures), *cbs, **kwargs)[0]

@pytest.fixture
def same_clouds(monkeypatch):
    "FMix draws its noise on the device; here it is that of the CPU"
    noise = fmix.low_frequency_noise
    monkeypatch.setattr(fmix, 'low_frequency_noise', lambda *args: noise(*args[:4], 'cpu').to(args[4]))

DECIDES = 'PuzzleMix', 'SaliencyMix', 'CatchUpMix' # compare numbers, of which two may be as close as rounding
def moved(a, b): return (a.xb[0]-b.xb[0]).flatten(1).abs().amax(1) > 1e-3 # items that were mixed in another way

@each_case
def test_values_are_those_of_the_cpu(name, same_clouds):
    here,there = (fit_case(name, device=device) for device in ('cpu', DEVICE))
    assert len(here) == len(there) == N and any((a.lam < 1).any() for a in here)
    decided = name.startswith(DECIDES)
    for a,b in zip(here, there):
        assert (a.device, b.device) == ('cpu', DEVICE) and a.layer == b.layer and torch.equal(a.index, b.index)
        if decided and (moved(a, b).any() or (a.lam-b.lam).abs().max() > 1e-3): continue
        close(a.lam, b.lam, 1e-5)
        for v,w in zip((*a.weights, a.xb[0], a.pred, a.loss), (*b.weights, b.xb[0], b.pred, b.loss)): close(v, w, 1e-3)
        assert apart(a.grads, b.grads) < 1e-2
    if decided: assert torch.cat([moved(a, b) for a,b in zip(here, there)]).float().mean() < .2

def test_clouds_of_the_device():
    "FMix keeps the share that was drawn, and the loss follows from it"
    for a,b in zip(fit_case('FMix'), fit_case('FMix', device=DEVICE), strict=True):
        close(a.lam, b.lam, 1e-6)
        close(b.loss, loss_of(b), 1e-5)

# Precisions and layouts

each_kind = pytest.mark.parametrize('kind', KINDS)

@each_kind
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_mixed_precision(mode, kind, amp):
    pages,net = fit(kind, MixedPrecision(mode, init_scale=1.), device=DEVICE)
    check_against(fit(kind)[0], pages, .1, same=kind != 'blocks')
    assert {p.dtype for p in net.parameters()} == {torch.float32}

@each_case
def test_methods_in_bfloat16(name, amp):
    for p in fit_case(name, MixedPrecision('bf16'), device=DEVICE):
        assert p.pred.isfinite().all() and p.loss.isfinite() and all(g.isfinite().all() for g in p.grads)
        assert p.pred.dtype == p.loss.dtype == torch.float32 and ((p.lam >= 0) & (p.lam <= 1)).all()

@each_kind
def test_gradient_scaler(kind, amp): check_scaler(kind, device=DEVICE)

@each_kind
def test_checkpointing(kind): check_checkpointing(kind, device=DEVICE)

@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'embedded'])
def test_channels_last(kind):
    pages,_ = fit(kind, ChannelsLast(), layout=torch.channels_last, device=DEVICE)
    check_against(fit(kind)[0], pages, 1e-2, same=kind != 'blocks')
    for p in pages: assert p.xb[0].is_contiguous(memory_format=torch.channels_last)

# Draws

def states(): return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if IS_CUDA else [])]

class States(Callback):
    "Draws that others may see are those without mixing"
    def before_fit(self): self.before = states()
    def after_fit(self): assert all(map(torch.equal, self.before, states()))

@each_case
def test_draws_are_private(name): fit_case(name, States(), device=DEVICE)

@each_case
def test_one_seed_gives_one_run(name):
    for a,b in zip(*(fit_case(name, device=DEVICE, lr=1e-2) for _ in range(2)), strict=True):
        assert torch.equal(a.index, b.index)
        if name.startswith(DECIDES) and moved(a, b).any(): continue
        close(a.lam, b.lam, 1e-5)
        close(a.loss, b.loss, 1e-3)

# No synchronisation

class NoWaiting(Callback):
    "Nothing may wait for the device in a batch, after the first, in which models are looked through"
    order = -100 # of the events of a batch, the first
    def before_batch(self):
        if self.iter > 0: torch.cuda.set_sync_debug_mode('error')
    def after_batch(self): torch.cuda.set_sync_debug_mode('default')
    after_cancel_batch = after_batch

@pytest.fixture
def waiting_again():
    yield
    if IS_CUDA: torch.cuda.set_sync_debug_mode('default')

def fit_quickly(name, *cbs):
    "Batches that lie on the device, and nobody who writes losses down"
    mix,net = CASES[name]
    y = to_device(MAPS if net is map_net else torch.arange(BS*N).view(N, BS) % CLASSES, DEVICE)
    dls = DataLoaders(list(zip(to_device(pictures(), DEVICE), y)), [])
    dls._device = torch.device(DEVICE)
    learn = quiet(Learner(dls, net(), CrossEntropyLossFlat(axis=1 if net is map_net else -1), SGD, lr=.01, cbs=[mix(), *cbs]))
    learn.remove_cb(Recorder)
    learn.fit(1)
    return learn

@each_case
def test_batches_on_the_device(name):
    "What the next tests run, where nobody watches"
    assert next(fit_quickly(name).model.parameters()).device.type == DEVICE

@needs_cuda
@each_case
def test_no_batch_waits(name, waiting_again): fit_quickly(name, NoWaiting())

@needs_cuda
@each_case
def test_no_batch_waits_in_bfloat16(name, waiting_again): fit_quickly(name, MixedPrecision('bf16'), NoWaiting())

@needs_cuda
def test_waiting_is_seen(waiting_again):
    class Reads(Callback):
        run_valid = False
        def after_pred(self): self.pred.sum().item()
    with pytest.raises(RuntimeError, match='synchroniz'): fit_quickly('MixUp', Reads(), NoWaiting())

# Two processes

def test_two_devices(tmp_path):
    "By nccl where there are two GPUs"
    if IS_CUDA and torch.cuda.device_count() < 2: pytest.skip('needs two GPUs')
    pytest.importorskip('accelerate')
    from on_ranks import ON_DEVICES
    from test_distributed import check_step, launch, steps
    ranks = launch(2, tmp_path, 'devices')
    for name in ON_DEVICES:
        assert all(r[name].pages for r in ranks)
        if name in ('inputs', 'hidden', 'some', 'across'):
            for pages in steps(ranks, name): check_step(pages, across=name == 'across')
        assert any(p.mixed for r in ranks for p in r[name].pages)
        for k,v in ranks[0][name].params.items(): close(v, ranks[1][name].params[k], 1e-6)
