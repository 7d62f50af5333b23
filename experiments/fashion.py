"""Fashion-MNIST with few training images: what mixing does to accuracy, likelihood and calibration, to noise in the labels, and over time.

Every seed gives each method the same images, labels and initial weights. `--part select` chooses the parameters of the recipes on 500
images that are left out of the 2,000; the other parts train on all and score the 10,000 test images, which nothing is chosen on. A stopped
run goes on where it was.
"""
import gzip
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Table, check_positive, class_scores, names, report, run_all, text
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from fastai.callback.mixup import CutMix as FastaiCutMix
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.schedule import SchedLin
from fastai.layers import ConvLayer, ResBlock
from fastcore.script import call_parse
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

from fastai_mixup.all import *

def idx(path, skip):
    "The numbers of an idx file, without its header"
    with gzip.open(path) as f: return torch.tensor(np.frombuffer(f.read(), dtype=np.uint8, offset=skip).copy())


def fashion(folder):
    "Images with mean 0 and deviation 1, and labels, of the training and the test set"
    found = {p.name: p for p in Path(folder).rglob('*ubyte.gz')}
    if len(found) < 4:
        raise SystemExit(f"--data must be a folder with the four files of Fashion-MNIST, got {folder!r}; --help says how to get them")
    def part(name):
        return (idx(found[f'{name}-images-idx3-ubyte.gz'], 16).view(-1, 1, 28,
            28)/255 - .286)/.353, idx(found[f'{name}-labels-idx1-ubyte.gz'], 8).long()
    return part('train'),part('t10k')


def sample(train, seed, n, noise=0.):
    "`n` of the training images; each label is redrawn at random with probability `noise`"
    rng = np.random.default_rng(seed)
    at = torch.tensor(rng.permutation(len(train[0]))[:n])
    redrawn,random = torch.tensor(rng.random(n) < noise),torch.tensor(rng.integers(10, size=n))
    return train[0][at],torch.where(redrawn, random, train[1][at])


def resblocks():
    "fastai's: averages on the way past a block, and blocks that begin as the identity"
    return [ConvLayer(1, 16), *[ResBlock(1, a, b, stride=2) for a,b in ((16, 16), (16, 32), (32, 64))]]


def basic_blocks():
    "torchvision's"
    def halving(a, b): return BasicBlock(a, b, 2, nn.Sequential(nn.Conv2d(a, b, 1, 2, bias=False), nn.BatchNorm2d(b)))
    return [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), BasicBlock(16, 16), halving(16, 32), halving(32, 64)]


NETS = {'resblocks': resblocks, 'basic': basic_blocks}


def make_net(name):
    "A residual network of 78,000 parameters; channels last, which is faster on a CPU"
    return nn.Sequential(*NETS[name](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).to(memory_format=torch.channels_last)


class ShiftAndFlip(Callback):
    "Moves each training image by up to two places, and turns every other one around"
    run_valid,order = False,1
    def before_batch(self):
        x = self.learn.xb[0]
        n,_,h,w = x.shape
        flip,dy,dx = torch.rand(n) < .5,torch.randint(5, (n,)),torch.randint(5, (n,))
        padded = nn.functional.pad(torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x), (2, 2, 2, 2), mode='replicate')
        rows,cols = dy[:,None]+torch.arange(h),dx[:,None]+torch.arange(w)
        self.learn.xb = (padded[torch.arange(n)[:,None,None], 0, rows[:,:,None], cols[:,None,:]].unsqueeze(1),)


class Peer(Callback):
    "Mixes with a peer's function of a batch, which makes the targets probabilities"
    run_valid = False
    def __init__(self, mix): self.mix = mix
    def before_batch(self):
        x,y = self.mix(self.learn.xb[0], self.learn.yb[0])
        self.learn.xb,self.learn.yb = (x,),(y,)


def timm(**kwargs):
    from timm.data import Mixup
    return [Peer(Mixup(mode='elem', label_smoothing=0., num_classes=10, **kwargs))]


def torchvision(name):
    from torchvision.transforms import v2
    return [Peer(getattr(v2, name)(alpha=1., num_classes=10))]


CE = CrossEntropyLossFlat
both = lambda: [MixUpCallback(1.), CutMixCallback(1.)]
METHODS = {
    'none': (list, CE), 'LabelSmoothingCE(.1)': (list, LabelSmoothingCE),
    'MixUp(1) + smoothing': (lambda: [MixUpCallback(1.)], LabelSmoothingCE),
    **{f'MixUp({a})': (lambda a=float(a): [MixUpCallback(a)], CE) for a in ('.1', '.2', '.4', '.8', '1', '1.6', '3.2')},
    'CutMix(1)': (lambda: [CutMixCallback(1.)], CE), 'ManifoldMixUp(1)': (lambda: [ManifoldMixUp(1.)], CE),
    'output mixup(1)': (lambda: [ManifoldMixUp(1., layers='output')], CE), 'RegMixUp': (lambda: [RegMixUp()], CE),
    'RandomMix': (lambda: [RandomMix(both())], CE), 'RandomMix to .75': (lambda: [RandomMix(both(), stop=.75)], CE),
    'RandomMix .5': (lambda: [RandomMix(both(), [.25, .25])], CE), 'RandomMix by item': (lambda: [RandomMix(both(), per='item')], CE),
    'CutMix .5': (lambda: [CutMixCallback(1., p=.5)], CE), 'CutMix to .75': (lambda: [CutMixCallback(1., stop=.75)], CE),
    'CutMix fading': (lambda: [CutMixCallback(1., p=SchedLin(1., 0.))], CE),
    'SaliencyMix .5': (lambda: [SaliencyMix(1., p=.5)], CE), 'FMix .5': (lambda: [FMix(1., p=.5)], CE),
    'ManifoldMixUp(CutMix)': (lambda: [ManifoldMixUp(method=CutMixCallback(1.))], CE),
    'RegMixUp(CutMix)': (lambda: [RegMixUp(method=CutMixCallback(1.))], CE),
    **{f'{method.__name__}()': (lambda method=method: [method()], CE) for method in (FMix, GridMix, SmoothMix, ResizeMix, SaliencyMix,
        GuidedMixup, PuzzleMix, SnapMix, AlignMixUp, CatchUpMix)},
    'GuidedMixup(LeastOverlap)': (lambda: [GuidedMixup(pairing=LeastOverlap())], CE),
    'CutMix(1), decoupled': (lambda: [CutMixCallback(1.)], partial(LabelSmoothingCE, 0., decoupled=.1)),
    'RandomMix by BCE': (lambda: [RandomMix([MixUpCallback(.2), CutMixCallback(1.)])], partial(LabelSmoothingBCE, .1)),
    'fastai MixUp': (lambda: [FastaiMixUp(1.)], CE), 'fastai CutMix': (lambda: [FastaiCutMix(1.)], CE),
    'timm mixup': (lambda: timm(mixup_alpha=1.), nn.CrossEntropyLoss),
    'timm cutmix': (lambda: timm(mixup_alpha=0., cutmix_alpha=1.), nn.CrossEntropyLoss),
    'torchvision MixUp': (lambda: torchvision('MixUp'), nn.CrossEntropyLoss),
    'torchvision CutMix': (lambda: torchvision('CutMix'), nn.CrossEntropyLoss)}


def train_and_score(method, train, test, seed, epochs, lr=5e-3, augment=False, net='resblocks'):
    "Scores on `test` after training by one cycle"
    cbs,loss_func = METHODS[method]
    set_seed(seed, reproducible=True)
    dls = DataLoaders(DataLoader(TensorDataset(*train), batch_size=64, shuffle=True, drop_last=True), [], device='cpu')
    learn = Learner(dls, make_net(net), loss_func(), cbs=[*cbs(), *[ShiftAndFlip()]*augment])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    def logits(x):
        with torch.no_grad(): return torch.cat([learn.model.eval()(b) for b in x.split(1000)])
    return class_scores(logits(test[0]), test[1]) | dict(train_accuracy=(logits(train[0]).argmax(1) == train[1]).float().mean().item()*100)


OTHERS = [m for m in METHODS if m.endswith('()')] + ['GuidedMixup(LeastOverlap)', 'CutMix(1), decoupled', 'RandomMix by BCE']
DOSES = ['none', *[m for m in METHODS if m.startswith('MixUp(') and 'smoothing' not in m]]
RECIPES = ['none', 'MixUp(1)', 'CutMix(1)', *[m for m in METHODS if m.startswith(('RandomMix', 'CutMix ', 'SaliencyMix', 'FMix'))],
    'ManifoldMixUp(CutMix)', 'RegMixUp(CutMix)']
WINNER = 'RandomMix by item'
NAMED = ['none', 'MixUp(1)', 'CutMix(1)', 'ManifoldMixUp(1)', 'output mixup(1)', 'RegMixUp', 'LabelSmoothingCE(.1)', 'MixUp(1) + smoothing',
    WINNER]
MAIN = [*NAMED, 'MixUp(.4)', 'RandomMix', 'RandomMix to .75']
PARTS = {
    'select': [dict(methods=RECIPES, held_out=500)],
    'main': [dict(methods=MAIN)],
    'peers': [dict(methods=['none', 'MixUp(1)', *[m for m in METHODS if m.endswith((' MixUp', ' mixup'))], 'CutMix(1)',
    *[m for m in METHODS if m.endswith((' CutMix', ' cutmix'))]])],
    'few': [dict(methods=[*NAMED, 'RandomMix to .75'], n=500, epochs=60)],
    'noisy': [dict(methods=NAMED, noise=.4)],
    'augmented': [dict(methods=NAMED, augment=True)],
    'both': [dict(methods=NAMED, noise=.4, augment=True)],
    'plain': [dict(methods=['none', 'MixUp(.4)', 'MixUp(1)', 'fastai MixUp', 'CutMix(1)', 'LabelSmoothingCE(.1)', WINNER], net='basic')],
    'methods': [dict(methods=OTHERS)],
    'methods-few': [dict(methods=OTHERS, n=500, epochs=60)],
    'methods-noisy': [dict(methods=OTHERS, noise=.4)],
    'dose': [dict(methods=DOSES)],
    'epochs': [dict(methods=['none', 'MixUp(1)', WINNER], n=500, epochs=e) for e in (15, 30, 60, 120, 240)],
    'corrupted': [dict(methods=['none', 'MixUp(1)', 'CutMix(1)', 'ManifoldMixUp(1)'], noise=s) for s in (0., .2, .4, .8)]}
DEFAULTS = dict(n=2000, epochs=40, noise=0., augment=False, held_out=0, net='resblocks')


def rows_of(rows, **setting):
    "Those trained with `setting`, or the defaults"
    return [r for r in rows if all(r[k] == text(v) for k,v in (DEFAULTS | setting).items())]


def score(data, method, seed, n, epochs, noise, augment, held_out, net):
    "One line of the table, on the test set, or on images held out of the training set"
    train,test = data
    x,y = sample(train, seed, n, noise)
    if held_out: test = x[-held_out:],y[-held_out:]
    return train_and_score(method, (x[:n-held_out], y[:n-held_out]), test, seed, epochs, augment=augment, net=net)


@call_parse
def main(
    part:str='main', # Which of the parts that README.md lists
    data:str='fashion', # Folder with the files of Fashion-MNIST
    seeds:int=5, # Number of seeds, each run by every method
    first:int=0, # The first seed
    threads:int=1, # Number of threads
    methods:str='', # Other methods than those of the part, separated by semicolons
    results:str=str(RESULTS), # Folder of the table
):
    """Train and score; print the table of the part.

    The data are those of the Debian package `dataset-fashion-mnist` (31 MB):
    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    """
    if part not in PARTS: raise SystemExit(f"--part must be one of {', '.join(PARTS)}, got {part!r}")
    chosen = names(methods, ';')
    if set(chosen) - set(METHODS): raise SystemExit(f"--methods must be some of {'; '.join(METHODS)}, got {methods!r}")
    check_positive(seeds=seeds, threads=threads)
    if first < 0: raise SystemExit(f"--first must be a whole number from 0 up, got {first}")
    torch.set_num_threads(threads)
    sets,table = fashion(data),Table('fashion', results)
    settings = [(chosen or s['methods'], DEFAULTS | {k: v for k,v in s.items() if k != 'methods'}) for s in PARTS[part]]
    jobs = [(dict(method=m, seed=seed, **setting), (sets, m, seed, *setting.values()))
            for seed in range(first, first+seeds) for ms,setting in settings for m in ms]
    run_all(table, jobs, score)
    for ms,setting in settings:
        print(f"\n{', '.join(f'{k} {v}' for k,v in setting.items())}")
        print(report(sorted((r for r in rows_of(table.rows, **setting) if r['method'] in ms), key=lambda r: ms.index(r['method']))))
