"""Fashion-MNIST with few training images: what mixing does to accuracy, likelihood and calibration, to noise in the labels, and over time.

The data are those of the Debian package `dataset-fashion-mnist` (31 MB):

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion

Every seed gives each method the same images, labels and initial weights. `--part select` chooses the dials of the recipes on 500 images held out of
the 2,000; the other parts train on all and score the 10,000 test images, which nothing is chosen on. A stopped run goes on where it was.
"""
import gzip
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Table, class_scores, report, run_all
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from fastai.callback.mixup import CutMix as FastaiCutMix, MixUp as FastaiMixUp
from fastai.callback.schedule import SchedLin
from fastai.layers import ConvLayer, ResBlock
from fastcore.script import call_parse
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.all import *


def idx(path, skip):
    "The numbers of an idx file, without its header"
    with gzip.open(path) as f: return torch.tensor(np.frombuffer(f.read(), dtype=np.uint8, offset=skip).copy())


def fashion(folder):
    "Images with mean 0 and deviation 1, and labels, of the training and the test set"
    found = {p.name: p for p in Path(folder).rglob('*ubyte.gz')}
    if len(found) < 4: raise SystemExit(f"--data must be a folder with the four files of Fashion-MNIST, got {folder!r}. See --help for how to get them.")
    def part(name): return (idx(found[f'{name}-images-idx3-ubyte.gz'], 16).view(-1, 1, 28, 28)/255 - .286)/.353, idx(found[f'{name}-labels-idx1-ubyte.gz'], 8).long()
    return part('train'),part('t10k')


def sample(train, seed, n, noise=0.):
    "`n` of the training images; each label is redrawn at random with probability `noise`"
    rng = np.random.default_rng(seed)
    at = torch.tensor(rng.permutation(len(train[0]))[:n])
    redrawn,random = torch.tensor(rng.random(n) < noise),torch.tensor(rng.integers(10, size=n))
    return train[0][at],torch.where(redrawn, random, train[1][at])


def net():
    "A residual network of 78,000 parameters"
    block = lambda a,b,stride: ResBlock(1, a, b, stride=stride)
    return nn.Sequential(ConvLayer(1, 16), block(16, 16, 1), block(16, 32, 2), block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


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


CE = CrossEntropyLossFlat
METHODS = {
    'none': (list, CE),
    'MixUp(.4)': (lambda: [MixUpCallback(.4)], CE), 'MixUp(1)': (lambda: [MixUpCallback(1.)], CE),
    'ManifoldMixUp(1)': (lambda: [ManifoldMixUp(1.)], CE), 'output mixup(1)': (lambda: [ManifoldMixUp(1., layers='output')], CE),
    'CutMix(1)': (lambda: [CutMixCallback(1.)], CE), 'RegMixUp': (lambda: [RegMixUp()], CE),
    'LabelSmoothingCE(.1)': (list, LabelSmoothingCE), 'MixUp(1) + smoothing': (lambda: [MixUpCallback(1.)], LabelSmoothingCE),
    'fastai MixUp(1)': (lambda: [FastaiMixUp(1.)], CE), 'fastai CutMix(1)': (lambda: [FastaiCutMix(1.)], CE),
    'RandomMix': (lambda: [RandomMix([MixUpCallback(1.), CutMixCallback(1.)])], CE)}
RECIPES = {
    'RandomMix .5': (lambda: [RandomMix([MixUpCallback(.4), CutMixCallback(1.)], [.25, .25])], CE),
    'RandomMix, item': (lambda: [RandomMix([MixUpCallback(1.), CutMixCallback(1.)], per='item')], CE),
    'RandomMix to .75': (lambda: [RandomMix([MixUpCallback(1.), CutMixCallback(1.)], stop=.75)], CE),
    'CutMix .5': (lambda: [CutMixCallback(1., p=.5)], CE), 'CutMix to .75': (lambda: [CutMixCallback(1., stop=.75)], CE),
    'CutMix fading': (lambda: [CutMixCallback(1., p=SchedLin(1., 0.))], CE),
    'SaliencyMix .5': (lambda: [SaliencyMix(1., p=.5)], CE), 'ResizeMix .5': (lambda: [ResizeMix(p=.5)], CE), 'FMix .5': (lambda: [FMix(1., p=.5)], CE),
    'ManifoldMixUp(CutMix)': (lambda: [ManifoldMixUp(method=CutMixCallback(1.))], CE), 'RegMixUp(CutMix)': (lambda: [RegMixUp(method=CutMixCallback(1.))], CE)}


def train_and_score(method, train, test, seed, epochs, lr=5e-3, augment=False):
    "Scores on `test` after training by one cycle"
    cbs,loss_func = (METHODS | RECIPES)[method]
    set_seed(seed, reproducible=True)
    dls = DataLoaders(DataLoader(TensorDataset(*train), batch_size=64, shuffle=True, drop_last=True), [], device='cpu')
    learn = Learner(dls, net(), loss_func(), cbs=[*cbs(), *[ShiftAndFlip()]*augment])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    def logits(x):
        with torch.no_grad(): return torch.cat([learn.model.eval()(b) for b in x.split(1000)])
    return class_scores(logits(test[0]), test[1]) | dict(train_accuracy=(logits(train[0]).argmax(1) == train[1]).float().mean().item()*100)


MAIN = ['none', 'MixUp(.4)', 'MixUp(1)', 'CutMix(1)', 'ManifoldMixUp(1)', 'output mixup(1)', 'RegMixUp', 'LabelSmoothingCE(.1)', 'MixUp(1) + smoothing', 'RandomMix', 'RandomMix to .75']
SHORT = ['none', 'MixUp(.4)', 'MixUp(1)', 'CutMix(1)', 'ManifoldMixUp(1)', 'LabelSmoothingCE(.1)', 'RandomMix to .75']
PARTS = {
    'main': dict(methods=MAIN), 'peers': dict(methods=['none', 'MixUp(1)', 'fastai MixUp(1)', 'CutMix(1)', 'fastai CutMix(1)']),
    'few': dict(methods=SHORT, n=500, epochs=60), 'noisy': dict(methods=SHORT, noise=.4), 'augmented': dict(methods=SHORT, augment=True),
    'select': dict(methods=[*METHODS, *RECIPES], held_out=500), 'select-augmented': dict(methods=[*SHORT, *RECIPES], held_out=500, augment=True)}


def score(data, method, seed, n=2000, epochs=40, noise=0., augment=False, held_out=0):
    "One run of a part"
    train,test = data
    x,y = sample(train, seed, n, noise)
    if held_out: test = x[-held_out:],y[-held_out:]
    return train_and_score(method, (x[:n-held_out], y[:n-held_out]), test, seed, epochs, augment=augment)


@call_parse
def main(
    part:str='main', # One of main, peers, few, noisy, augmented, select, select-augmented, epochs, dose, corrupted
    data:str='fashion', # Folder with the files of Fashion-MNIST
    seeds:int=5, # Number of seeds, each run by every method
    first:int=0, # The first seed
    threads:int=1, # Number of threads
    methods:str='', # Some of the part's methods, or others, separated by semicolons; all of the part by default
    results:str=str(RESULTS), # Folder of the tables
):
    "Train and score; print the table of the part"
    torch.set_num_threads(threads)
    sets,table = fashion(data),Table(f'fashion_{part}', results)
    if part in PARTS: settings = [PARTS[part]]
    elif part == 'epochs': settings = [dict(methods=['none', 'MixUp(1)', 'CutMix(1)'], epochs=e) for e in (5, 10, 20, 40, 80, 160)]
    elif part == 'corrupted': settings = [dict(methods=['none', 'MixUp(1)', 'ManifoldMixUp(1)'], noise=s) for s in (0., .2, .4, .6, .8)]
    elif part == 'dose':
        METHODS.update({f'MixUp({a:g})': (lambda a=a: [MixUpCallback(a)], CE) for a in (0, .1, .2, .4, .8, 1.6, 3.2, 6.4)})
        settings = [dict(methods=[f'MixUp({a:g})' for a in (0, .1, .2, .4, .8, 1.6, 3.2, 6.4)])]
    else: raise SystemExit(f"--part must be one of {', '.join([*PARTS, 'epochs', 'dose', 'corrupted'])}, got {part!r}")
    keys = ('n', 2000), ('epochs', 40), ('noise', 0.)
    chosen = methods.split(';') if methods else None
    jobs = [(dict(method=m, seed=seed, **{k: s.get(k, d) for k,d in keys}), (sets, m, seed, s))
            for seed in range(first, first+seeds) for s in settings for m in chosen or s['methods']]
    run_all(table, jobs, lambda sets,m,seed,s: score(sets, m, seed, **{k: v for k,v in s.items() if k != 'methods'}))
    for setting in dict.fromkeys(tuple(r[k] for k,_ in keys) for r in table.rows):
        print(f"\n{', '.join(f'{k} {v}' for (k,_),v in zip(keys, setting))}")
        print(report([r for r in table.rows if tuple(r[k] for k,_ in keys) == setting], base='MixUp(0)' if part == 'dose' else 'none'))
