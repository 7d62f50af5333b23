"""On a GPU, in bfloat16: mixing, the mixed loss, and whole training steps of a ResNet-50, a ViT-S and a text classifier, with the kernels
and the memory they take. Without a GPU only `--small` makes sense, which shows that the script runs"""
import argparse
import json
from pathlib import Path
from statistics import mean
from time import perf_counter

import bench
import peers
import timm
import torch
import torchvision
from fastai.callback.all import MixedPrecision
from fastai.vision.all import SGD, Callback, CrossEntropyLossFlat, TensorCategory, TensorImage, nn, to_device
from memory import peak, quietly
from timm.loss import SoftTargetCrossEntropy
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torchvision.models.resnet import BasicBlock, ResNet

from fastai_mixup import registry
from fastai_mixup.all import *

GPU = torch.cuda.is_available()
DEVICE = 'cuda' if GPU else 'cpu'
CLASSES = 1000
FULL = dict(mixing=['64x3x224x224', '256x3x128x128'], loss=['1024x32000', '256x1000', '64x10'],
    resnet=['64x3x128x128', '64x3x224x224', '256x3x128x128', '256x3x224x224'], vit=['64x3x224x224'], text=['64x256'])
SMALL = dict(mixing=['4x3x16x16'], loss=['4x10'], resnet=['4x3x32x32'], vit=['4x3x32x32'], text=['4x8'])

# Contestants: name: (what makes the callback, what makes the loss function)

def recipes(choose): return {cls.__name__: (cls, CrossEntropyLossFlat) for cls in registry.METHODS if choose(cls().recipe)}
NONE = {'plain': (lambda: None, CrossEntropyLossFlat)}
INPUTS = recipes(lambda o: not o.needs_model and o.looks_at != 'targets')
MODELS = recipes(lambda o: o.needs_model and not o.watches)
AROUND = {'RandomMix': (lambda: RandomMix([MixUp(), CutMix()]), CrossEntropyLossFlat)}
AROUND |= {cls.__name__: (cls, CrossEntropyLossFlat) for cls in registry.AROUND if cls is not RandomMix}
FASTAI = {"fastai's MixUp": (peers.FastaiMixUp, CrossEntropyLossFlat)}
def dense(classes):
    "timm and torchvision, whose targets are dense"
    return {"torchvision's MixUp": (lambda: peers.Torchvision(classes), nn.CrossEntropyLoss),
            "timm's Mixup": (lambda: peers.Timm(classes), SoftTargetCrossEntropy),
            "timm's Mixup, elem": (lambda: peers.Timm(classes, 'elem'), SoftTargetCrossEntropy)}
def some(*names): return {name: (INPUTS | MODELS | AROUND)[name] for name in names}


# Batches and models

def shape_of(size): return [int(s) for s in size.split('x')]
def labels(size, classes=CLASSES): return TensorCategory(torch.randint(classes, shape_of(size)[:1]))
def images(size, classes=CLASSES): return TensorImage(torch.randn(shape_of(size))),labels(size, classes)
def words(size): return torch.randint(1, 1000, shape_of(size)),labels(size)


class TextClassifier(nn.Module):
    def __init__(self, width=384, layers=4):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 6, 4*width, 0., batch_first=True, norm_first=True)
        self.emb,self.encoder = nn.Embedding(1000, width),nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x): return self.head(self.encoder(self.emb(x)).mean(1))


def resnet(size, small):
    if not small: return torchvision.models.resnet50(num_classes=CLASSES)
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    net.layer3,net.layer4,net.fc = nn.Identity(),nn.Identity(),nn.Linear(128, CLASSES)
    return net


def vit(size, small):
    name = 'vit_tiny_patch16_224' if small else 'vit_small_patch16_224'
    return timm.create_model(name, img_size=shape_of(size)[-1], num_classes=CLASSES, **({'depth': 2} if small else {}))
def text(size, small): return TextClassifier(48, 1) if small else TextClassifier()


# Settings: each gives Learners, what is timed, and the column it is compared with

def mixing(size, small):
    model = bench.GivenPredictions(torch.randn(shape_of(size)[0], CLASSES, device=DEVICE))
    who = {'one memory pass': (peers.OneMemoryPass, CrossEntropyLossFlat)} | INPUTS | FASTAI | dense(CLASSES)
    return learners(who, lambda: images(size), model),'inputs','one memory pass'


def loss(size, small):
    n,classes = shape_of(size)
    model = bench.GivenPredictions(torch.randn(n, classes, device=DEVICE))
    return learners(NONE | some('MixUp') | FASTAI | dense(classes), lambda: images(f'{n}x3x1x1', classes), model),'loss','plain'


def step_of_resnet(size, small):
    every = NONE | INPUTS | MODELS | AROUND | FASTAI | dense(CLASSES)
    few = NONE | some('MixUp', 'CutMix', 'FMix', 'ManifoldMixUp') | FASTAI | dense(CLASSES)
    return learners(every if shape_of(size)[0] <= 64 else few, lambda: images(size), resnet(size, small), True),'step','plain'


def step_of_vit(size, small):
    who = NONE | some('MixUp', 'CutMix', 'ManifoldMixUp') | {'TransMix': (TransMix, CrossEntropyLossFlat)} | FASTAI | dense(CLASSES)
    return learners(who, lambda: images(size), vit(size, small), True),'step','plain'


def step_of_text(size, small):
    who = NONE | some('MixUp', 'ManifoldMixUp', 'RegMixUp')
    return learners(who, lambda: words(size), text(size, small), True),'step','plain'


SETTINGS = dict(mixing=mixing, loss=loss, resnet=step_of_resnet, vit=step_of_vit, text=step_of_text)


def learners(contestants, make_batch, model, halves=False):
    "A Learner for each contestant, all with one model and one batch on the device; timm's mixing gets a batch that it may change"
    batch,model,res = to_device(make_batch(), DEVICE),model.to(DEVICE),{}
    for name,(make,loss_func) in contestants.items():
        cbs = [o for o in (make(), MixedPrecision('bf16') if halves else None) if o is not None]
        own = tuple(o.clone() for o in batch) if name.startswith('timm') else batch
        res[name] = bench.learner(own, model, cbs, loss_func(), batches=6 if GPU else 2, device=DEVICE, opt_func=SGD)
    return res


# What a step takes besides time

def fitted(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)


class LastBatch(Callback):
    "Profiles the last batch of a fit: in the first ones models are looked through"
    order,run_valid = -100,False
    def __init__(self): self.profile = profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU])
    def is_last(self): return self.iter == len(self.dls.train)-1

    def before_batch(self):
        if GPU: torch.cuda.synchronize()
        if self.is_last(): self.profile.start()

    def after_batch(self):
        if GPU: torch.cuda.synchronize()
        if self.is_last(): self.profile.stop()


def kernels(learn):
    "Kernels (and copies) of a batch; on a CPU calls of torch, those within others among them"
    last = LastBatch()
    with quietly(), learn.added_cbs(last): fitted(learn)
    device = DeviceType.CUDA if GPU else DeviceType.CPU
    return sum(e.device_type() == device for e in last.profile.profiler.kineto_results.events())


def peak_megabytes(learn):
    "Memory at its peak in a fit; on a CPU only what the fit allocates"
    if not GPU: return peak(learn)/2**20
    torch.cuda.reset_peak_memory_stats()
    fitted(learn)
    return torch.cuda.max_memory_allocated()/2**20


def rows_of(what, size, small, rounds, until):
    ls,part,against = SETTINGS[what](size, small)
    average = mean if part == 'inputs' else bench.median
    seconds = bench.in_turns(ls, part, rounds, warm_up=2 if GPU else 1, average=average, until=until)
    rows = bench.compare(seconds, (against,), size=f'{what} {size}')
    def taken(learn): return {'kernels' if GPU else 'calls': kernels(learn), 'MB': peak_megabytes(learn)}
    return [row | taken(ls[row['contestant']]) for row in rows]


def measure(sizes, small, rounds, minutes):
    "The rows of all settings, each of which gets an equal share of the time that is left, and why others were not run"
    end,todo,rows,not_run = perf_counter()+60*minutes,[(what, size) for what,of in sizes.items() for size in of],[],{}
    for i,(what,size) in enumerate(todo):
        left = end - perf_counter()
        try:
            if left <= 0: raise TimeoutError('out of time')
            rows += rows_of(what, size, small, rounds, perf_counter() + .8*left/(len(todo)-i))
        except (torch.OutOfMemoryError, TimeoutError) as e: not_run[f'{what} {size}'] = str(e).split('. ')[0]
        if GPU: torch.cuda.empty_cache()
    return rows,not_run


# Results

def where(): return dict(device=torch.cuda.get_device_name() if GPU else 'none: run on the CPU', **bench.machine())


def markdown(rows, not_run):
    columns,*lines = bench.cells(rows)
    table = [columns, ['---']*len(columns), *lines]
    skipped = [f'Not run: {what} ({why})' for what,why in not_run.items()]
    first = ', '.join(f'{k} {v}' for k,v in where().items())
    return '\n'.join([first, '', *(f"| {' | '.join(line)} |" for line in table), '', *skipped]) + '\n'


def save(rows, not_run, folder):
    "The table, as json and to be read, and a plot of the steps"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'gpu.json').write_text(json.dumps(dict(machine=where(), rows=rows, not_run=not_run), indent=1) + '\n')
    (folder/'gpu.md').write_text(markdown(rows, not_run))
    steps = [r for r in rows if r['size'].split()[0] in ('resnet', 'vit', 'text')]
    if steps: bench.plot(steps, folder/'gpu.png')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--small', action='store_true', help='tiny sizes, for a CPU; the numbers mean nothing')
    parser.add_argument('--rounds', type=bench.positive, default=5, help='turns of each contestant; the table gives medians over them')
    parser.add_argument('--minutes', type=float, default=5.5, help='time after which no more rounds are begun')
    parser.add_argument('--only', nargs='+', choices=list(SETTINGS), default=list(SETTINGS), help='settings to run')
    parser.add_argument('--results', type=Path, default=bench.RESULTS, help='folder for the tables and the plot')
    args = parser.parse_args()
    if not (GPU or args.small): parser.error('there is no GPU: use --small to see that the script runs')
    if not GPU and args.results == bench.RESULTS: parser.error('numbers of a CPU are no results: choose another folder by --results')
    return args


if __name__ == '__main__':
    args = arguments()
    torch.manual_seed(0)
    if not GPU: torch.set_num_threads(1)
    torch.set_float32_matmul_precision('high')
    rounds = 1 if args.small else args.rounds
    rows,not_run = measure({what: (SMALL if args.small else FULL)[what] for what in args.only}, args.small, rounds, args.minutes)
    bench.show(rows)
    for what,why in not_run.items(): print(f'not run: {what} ({why})')
    save(rows, not_run, args.results)
    print(f'\n{where()}\nwritten to {args.results.name}: gpu.json, gpu.md and gpu.png')
