"What makes mixing cheap, without a stopwatch: nothing waits for the device, few kernels, one compiled graph, no memory to speak of."
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, Tensor, nn
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.progress import ProgressCallback
from fastai.learner import Recorder
from fastai.vision.core import TensorImage
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer

from fastai_mixup.all import *
from fastai_mixup.registry import AROUND, METHODS

BENCHMARKS = Path(__file__).parent.parent/'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
import bench
from memory import peak

BS,CLASSES = 6,5

class Calls(TorchDispatchMode):
    "All that is asked of torch, with the devices it goes from and to"
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        devices = lambda o: {t.device.type for t in tree_leaves(o) if isinstance(t, Tensor)}
        self.seen.append((func, devices((args, kwargs)), devices(out), kwargs or {}))
        return out

class WatchedLearner(Learner):
    "Notes the calls of each training batch"
    def one_batch(self, i, b):
        with Calls() as calls: super().one_batch(i, b)
        self.batches.append(calls.seen)

def floats(): return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
def tokens(): return nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(8*3, CLASSES))
def vectors(bs=BS): return torch.randn(bs, 8)
def labels(bs=BS): return torch.randint(CLASSES, (bs,))
def own(pred, y): return F.cross_entropy(pred, y).exp()

def watched(cb, loss_func=None, model=floats, x=vectors, y=labels, bs=BS, n=4, device='meta'):
    "The calls of each batch of a fit on `device`"
    batch = tuple(o(bs).to(device) for o in (x, y))
    dls = DataLoaders([batch]*n, [])
    dls._device = torch.device(device)
    learn = WatchedLearner(dls, model().to(device), loss_func or CrossEntropyLossFlat(), cbs=cb)
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.batches = []
    learn.fit(1)
    return learn.batches

def waits(call):
    "Does it read a number from the device, or move data without `non_blocking`?"
    func,came,went,kwargs = call
    moved = came | went == {'cpu', 'meta'} and func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    return (func.overloadpacket is torch.ops.aten._local_scalar_dense and 'meta' in came) or (moved and not kwargs.get('non_blocking'))

STEPS = dict(
    classes=partial(watched, MixUp(.4)), torchs=partial(watched, MixUp(.4), nn.CrossEntropyLoss()),
    function=partial(watched, MixUp(.4), F.cross_entropy),
    ignoring=partial(watched, MixUp(.4), CrossEntropyLossFlat(ignore_index=2)), per_batch=partial(watched, MixUp(.4, per='batch')),
    smoothed=partial(watched, MixUp(.4), LabelSmoothingCE(.1)), smoothed_only=partial(watched, None, LabelSmoothingCE(.1)),
    own=partial(watched, MixUp(.4), own),
    numbers=partial(watched, MixUp(.4), MSELossFlat(), y=lambda bs: torch.randn(bs, CLASSES)),
    tags=partial(watched, MixUp(.4), BCEWithLogitsLossFlat(), y=lambda bs: torch.randint(2, (bs, CLASSES))),
    images=partial(watched, MixUp(.4), x=lambda bs: TensorImage(vectors(bs))), some=partial(watched, MixUp(.4, p=.5)),
    words=partial(watched, MixUp(.4), model=tokens, x=lambda bs: torch.randint(9, (bs, 3))),
    hidden=partial(watched, ManifoldMixUp(.4, layers='0', include_input=False)),
    anywhere=partial(watched, ManifoldMixUp(.4, layers=['0', '1']), n=12),
    output=partial(watched, ManifoldMixUp(.4, layers='output')))

@pytest.mark.parametrize('name', STEPS)
def test_nothing_waits(name):
    first,*later = STEPS[name]()
    probed = name in ('hidden', 'anywhere', 'output') # a model is looked through once per fit
    for calls in later if probed else (first, *later):
        assert any('meta' in went for _,_,went,_ in calls)
        assert not [call for call in calls if waits(call)]

MAPS = dict(model=lambda: nn.Conv2d(3, CLASSES, 1), y=lambda bs: torch.randint(CLASSES, (bs, 32, 32)),
    loss_func=CrossEntropyLossFlat(axis=1))
NOT_ON_META = {FMix} # a generator of that device
@pytest.mark.parametrize('cls', [cls for cls in METHODS if cls not in NOT_ON_META])
def test_no_method_waits(cls):
    "Of those that find a layer in the model, none after the first batch"
    recipe = cls().recipe
    net = MAPS if recipe.looks_at == 'targets' else dict(model=small_vit if recipe.watches else small_conv)
    first,*later = watched(cls(), x=lambda bs: torch.randn(bs, 3, 32, 32), **net)
    for calls in later if recipe.needs_model else (first, *later):
        assert any('meta' in went for _,_,went,_ in calls)
        assert not [call for call in calls if waits(call)]

PAIRINGS = [DifferentClass(), SameClass(), RareClass(), PreviousBatch(), LeastOverlap(), NearTarget(by=lambda batch: batch.yb[0])]
@pytest.mark.parametrize('pairing', PAIRINGS, ids=lambda o: type(o).__name__)
def test_no_pairing_waits(pairing):
    batches = watched(CutMix(pairing=pairing), model=small_conv, x=lambda bs: torch.randn(bs, 3, 32, 32))
    for calls in batches[1:]: assert any('meta' in went for _,_,went,_ in calls) and not [call for call in calls if waits(call)]

def small_vit(): return VisionTransformer(32, 8, 2, 2, 16, 16, num_classes=CLASSES)
def small_conv():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, CLASSES))

def test_waiting_is_seen():
    fastais = watched(FastaiMixUp(.4))
    assert all(any(waits(call) for call in calls) for calls in fastais)
    with pytest.raises((RuntimeError, NotImplementedError), match='meta'): watched(MixUp(.4), lambda p,y: own(p, y) * float(p.sum()))

@pytest.mark.slow
def test_lam_travels_for_many_batches_at_once():
    copies = [sum('cpu' in came and 'meta' in went for _,came,went,_ in calls) for calls in watched(MixUp(.4), n=127)]
    assert sum(copies) == 7 and copies[0] == 1

VIEWS = '''view t transpose unsqueeze squeeze expand select slice split detach alias unbind permute as_strided empty _unsafe_view narrow
    _reshape_alias scalar_tensor'''.split()
def kernels(calls):
    "Calls that make the device do something"
    return sum('meta' in came | went and func.overloadpacket.__name__.removesuffix('_copy') not in (*VIEWS, 'split_with_sizes',
        'empty_like')
               for func,came,went,_ in calls)

def extra(cb, loss_func=None, **kwargs):
    return kernels(watched(cb, loss_func, **kwargs)[-2]) - kernels(watched(None, loss_func, **kwargs)[-2])

@pytest.mark.parametrize('cb,loss_func,most', [
    (lambda: MixUp(.4), None, 26), (lambda: MixUp(.4), LabelSmoothingCE(.1), 6),
    (lambda: ManifoldMixUp(.4, layers='0', include_input=False), None, 30)],
    ids=['inputs', 'smoothed', 'hidden'])
@pytest.mark.parametrize('bs', [4, 32])
def test_few_kernels_whatever_the_size(cb, loss_func, most, bs): assert extra(cb(), loss_func, bs=bs) <= most

def test_two_kernels_mix_the_inputs():
    number = dict(loss_func=MSELossFlat(), y=lambda bs: torch.randn(bs, CLASSES))
    assert extra(MixUp(.4), **number) == 4 # two for the inputs, two for the targets

class Net(nn.Module):
    "Remembers which rows its inputs were made from"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(8*8, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    def forward(self, x): return self.net(x) + 0*x.flatten(1)[:,:1]

def compiled_losses(cb, compile_it, n=50):
    "Losses of a fit with the model compiled, and how many graphs it took"
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = TensorImage(torch.randn(BS, 1, 8, 8))
    counter,model = CompileCounterWithBackend('eager' if compile_it != 'inductor' else 'inductor'),Net()
    if compile_it == 'in place': model.compile(backend=counter)
    elif compile_it == 'part': model.net.compile(backend=counter)
    elif compile_it: model = torch.compile(model, backend=counter)
    learn = Learner(DataLoaders([(x, labels())]*n, []), model, CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(), torch._dynamo.config.patch(error_on_recompile=True): learn.fit(1, 1e-2)
    return torch.stack(list(learn.recorder.losses)),counter.frame_count

has_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a compiler')

@pytest.mark.slow
@pytest.mark.parametrize('how', ['wrapped', 'in place', 'part', pytest.param('inductor', marks=has_compiler)])
def test_compiled_once(how):
    plain,_ = compiled_losses(MixUp(1.), None)
    losses,graphs = compiled_losses(MixUp(1.), how)
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-5)
    assert graphs == compiled_losses(None, how)[1] == 1

def test_refused_compiled():
    words = DataLoaders([(torch.randint(9, (BS, 3)), labels())], [])
    for model in torch.compile(tokens(), backend='eager'), tokens():
        if not hasattr(model, '_orig_mod'): model.compile(backend='eager')
        with pytest.raises(ValueError,
            match="Input 'input' holds integers.*compiled|Input 0 holds integers.*compiled|holds integers.*compiled"):
            Learner(words, model, CrossEntropyLossFlat(), cbs=MixUp()).fit(1)
    part = tokens()
    part[0] = torch.compile(part[0], backend='eager')
    with pytest.raises(ValueError, match='holds integers.*compiled'): Learner(words, part, CrossEntropyLossFlat(), cbs=MixUp()).fit(1)
    for layers in None, '0', 'output':
        model = floats()
        if layers == '0': model[2].compile(backend='eager')
        else: model[2].forward = torch.compile(model[2].forward, backend='eager')
        with pytest.raises(ValueError, match='cannot look into a compiled model'):
            Learner(DataLoaders([(vectors(), labels())], []), model, CrossEntropyLossFlat(), cbs=ManifoldMixUp(layers=layers)).fit(1)

def peak_of(batch, logits, cb, loss_func=None): return peak(bench.learner(batch, bench.GivenPredictions(logits), cb, loss_func, batches=4))

@pytest.mark.slow
@pytest.mark.parametrize('n,width', [(64, 300), (1024, 100), (16384, 40)])
def test_memory_of_what_is_drawn_ahead(n, width):
    batch,logits = (torch.randn(n, width), torch.randint(3, (n,))),torch.randn(n, 3)
    extra = [peak(bench.learner(batch, bench.GivenPredictions(logits), cb, batches=130)) for cb in (MixUp(), None)]
    assert extra[0]-extra[1] < 1.05*batch[0].nbytes + 80*max(n, 4096) # some numbers for each of at most 4,096 items, or of one batch

def test_memory_of_the_inputs():
    batch,logits = (torch.randn(16, 3, 64, 64), torch.randint(10, (16,))),torch.randn(16, 10)
    extra = (peak_of(batch, logits, MixUp()) - peak_of(batch, logits, None)) / batch[0].nbytes
    assert .9 < extra < 1.1

@pytest.mark.parametrize('loss_func,plain', [(CrossEntropyLossFlat(), CrossEntropyLossFlat()),
    (LabelSmoothingCE(.1), nn.CrossEntropyLoss(label_smoothing=.1))])
def test_memory_of_the_loss(loss_func, plain):
    batch,logits = (torch.randn(32, 1), torch.randint(5000, (32,))),torch.randn(32, 5000)
    ours,theirs = (peak_of(batch, logits, cb, lf)/logits.nbytes for cb,lf in ((MixUp(), loss_func), (None, plain)))
    assert ours < 1.1 < theirs

SMALL = dict(inputs='4x3x8x8', losses='8x20', smoothing='8x20', hidden='4x3x8', steps='4x3x32x32', memory=None, methods='4x3x8x8',
    ranks='4x3x32x32')
def script(name, *args):
    return subprocess.run([sys.executable, '-W', 'ignore', BENCHMARKS/f'{name}.py', *args], capture_output=True, text=True,
        check=True).stdout

@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_benchmarks_run(name, tmp_path):
    sizes = ['--sizes', SMALL[name]] if SMALL[name] else []
    if name == 'methods': sizes += ['--steps', '4x3x32x32']
    if name == 'ranks': sizes += ['--ranks', '2']
    out = script(name, '--rounds', '2', '--threads', '1', '--results', str(tmp_path), *sizes)
    assert re.search(r'^size +contestant', out, re.M)
    assert {p.name for p in tmp_path.iterdir()} == {f'{name}_1.json', f'{name}_1.png'}

@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU it is run as it is')
def test_benchmark_of_gpus_runs_small(tmp_path):
    "What it writes on a CPU says so, and is not written to where results belong"
    out = script('gpu', '--small', '--results', str(tmp_path))
    assert re.search(r'^size +contestant', out, re.M) and 'not run' not in out
    assert {p.name for p in tmp_path.iterdir()} == {'gpu.json', 'gpu.md', 'gpu.png'}
    found = json.loads((tmp_path/'gpu.json').read_text())
    assert found['machine']['device'] == 'none: run on the CPU' and 'none: run on the CPU' in (tmp_path/'gpu.md').read_text()
    measured = {r['contestant'] for r in found['rows'] if r['size'].startswith('resnet')}
    assert {o.__name__ for o in (*METHODS, *AROUND)} - measured == {'TransMix', 'ClassMix'} # of transformers, of maps of classes
    assert all(r['ms'] > 0 and r['calls'] > 0 and r['MB'] > 0 for r in found['rows'])

@pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU it is run as it is')
@pytest.mark.parametrize('args,error', [([], 'there is no GPU'), (['--small'], 'numbers of a CPU are no results')])
def test_benchmark_of_gpus_needs_one(args, error, monkeypatch, capsys):
    from gpu import arguments
    monkeypatch.setattr(sys, 'argv', ['gpu.py', *args])
    with pytest.raises(SystemExit): arguments()
    assert error in capsys.readouterr().err

def test_all_benchmarks_are_tried(): assert {p.stem for p in BENCHMARKS.glob('*.py')} - {'bench', 'peers', 'gpu'} == set(SMALL)
