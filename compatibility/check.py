"""Does mixing work with this model? Trains each of a zoo of models by `MixUp()` and by `ManifoldMixUp()`, with their default arguments,
and checks from outside:

- the inputs that reached the model, or for integers what its embeddings returned, are `M` times those of the batch, where each row of `M`
  holds a share of the item itself and the rest of one other; or the activations that came out of one hidden layer are `M` times what that
  layer made, and the inputs are unmixed;
- the loss is the sum of `M[i,j] * loss(pred[i], y[j])`, in double precision;
- the output of each such layer decides the prediction, whatever the inputs are.

A row of the table says *checked*, or the error by which the callback refuses, or what is WRONG. Models of libraries that are not installed
are left out.
"""
import csv
import re
import sys
import textwrap
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from fastai.basics import Callback, CancelFitException, nn, set_seed
from fastai.text.models.awdlstm import EmbeddingDropout
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tests'))
from apps import Before, Spy, close, floats, layer_of, matrix, mixed_ce, mixed_targets, mixed_tokens, places, was_mixed
from paths import check_path

import fastai_mixup
from fastai_mixup.all import ManifoldMixUp, MixUp
from fastai_mixup.layers.inputs import unwrapped
from models import ZOO

HERE = Path(__file__).resolve().parent
CALLBACKS = dict(MixUp=MixUp, ManifoldMixUp=ManifoldMixUp)
BY_HAND = dict(classes=mixed_ce(), pixels=mixed_ce(), tokens=mixed_tokens, numbers=mixed_targets(F.mse_loss))
COLUMNS = 'library','version','model','MixUp','ManifoldMixUp','hidden layers'


def layers(mixer):
    "Where it mixes: 'input', and modules"
    found = mixer.found().layers if isinstance(mixer, ManifoldMixUp) else []
    return [getattr(o, 'module', o.name) for o in found] or ['input']


class Enough(Callback):
    "Ends the training as soon as each layer was mixed, and three batches were seen"
    order = 70
    def before_fit(self): self.seen,self.n = set(),0
    def after_loss(self):
        mixer = next(cb for cb in self.learn.cbs if hasattr(cb, 'plan'))
        self.n += 1
        if mixer.plan is not None: self.seen.add(layer_of(mixer))
        self.wanted = set(layers(mixer))
    def after_batch(self):
        if self.n > 2 and self.seen == self.wanted: raise CancelFitException


class Once(Callback):
    "Ends the training after the first batch"
    def after_batch(self): raise CancelFitException


def parts(entry, pred): return entry.parts(pred) if entry.parts else [(1., pred)]
def by_hand(entry): return mixed_targets(entry.own_loss()) if entry.own_loss else BY_HAND[entry.loss]
def said(entry, pred): return [o for _,o in entry.parts(pred)] if entry.parts else floats(pred)


def taps(model, keeps):
    "The model itself, and all embeddings that should look up what is mixed"
    return ['', *(name for name,m in model.named_modules() if isinstance(m, (nn.Embedding, EmbeddingDropout)) and keeps not in name)]


def check_batch(entry, b):
    "Was at most one layer mixed, and does the loss follow? Returns that layer"
    moved = [o for o in places(b).values() if was_mixed(o)]
    assert len(moved) < 2, f'{len(moved)} layers were mixed'
    layer,M = matrix(b) if moved else (None, torch.eye(b.n, dtype=torch.float64))
    want = sum(w*by_hand(entry)(o.double(), b.yb[0], M) for w,o in parts(entry, b.pred))
    close(b.loss, want)
    return layer


def check(entry, mixer):
    "Train, and check each batch and each hidden layer; returns the names of the layers"
    learn = entry.learner(mixer, Before(), Enough())
    learn.add_cb(spy := Spy(taps(learn.model, entry.keeps)))
    data = list(islice(iter(learn.dls.train), 2))
    learn.fit(1)
    found = {check_batch(entry, b) for b in spy.batches if b.training}
    wanted = layers(mixer)
    assert found - {None} == set(wanted), 'not all layers were mixed'
    xb,other = (b[:learn.dls.n_inp] for b in data)
    learn.model.train()
    hidden = [o for o in wanted if o != 'input']
    for layer in hidden: check_path(learn.model, xb, other, layer, lambda pred: said(entry, pred))
    return [name for name,m in unwrapped(learn.model).named_modules() if any(m is o for o in hidden)]


def raised_by_us(e):
    "Was it the library that raised `e`, on purpose?"
    last = traceback.extract_tb(e.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(fastai_mixup.__file__).parent) and not isinstance(e, AssertionError)


def brief(e):
    "The error on one line, without what fastai writes in front of it"
    said = re.sub(r'^Exception occured in `\w+` when calling event `\w+`:', '', str(e))
    return ' '.join(f'{type(e).__name__}: {said}'.split())


def outcome(entry, make):
    "What came of training with the callback that `make` returns, and the names of the hidden layers"
    set_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return 'checked',check(entry, make())
        except Exception as e: return brief(e) if raised_by_us(e) else f'WRONG: {brief(e)}',[]


def trains(entry):
    "Does it train without mixing? The error if not"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: entry.learner(Once()).fit(1)
        except Exception as e: return brief(e)


def installed(library):
    try: return version(library)
    except PackageNotFoundError: return None


def row(entry):
    "The line of the table for one model"
    error = trains(entry)
    if error:
        return dict(zip(COLUMNS, (entry.library, installed(entry.library), entry.name,
            *[f'does not train without mixing either: {error}']*2, '')))
    said = {name: outcome(entry, make) for name,make in CALLBACKS.items()}
    return dict(zip(COLUMNS, (entry.library, installed(entry.library), entry.name, *(o for o,_ in said.values()),
        ' '.join(said['ManifoldMixUp'][1]))))


def load(path): return list(csv.DictReader(path.open(encoding='utf-8'))) if path.exists() else []


def save(rows, path):
    "Write `rows`, and keep those of other models that are there, all in the order of the zoo"
    key = lambda r: (r['library'], r['model'])
    table = {key(r): r for r in [*load(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(table[k] for e in ZOO if (k := (e.library, e.name)) in table)


def show(rows):
    for r in rows:
        print(f"{r['library']:18}{r['model']:50}{r['MixUp'][:30]:32}{r['ManifoldMixUp'][:30]:32}{r['hidden layers']}")
        for name in CALLBACKS:
            if r[name] != 'checked': print(textwrap.indent(textwrap.fill(f'{name}: {r[name]}', 150), '    '))


@call_parse
def main(
    libraries:str='', # Some of the libraries, separated by commas; all by default
    models:str='', # A part of the names of the models to check; all by default
    results:str=str(HERE/'results'), # Folder of the table
):
    "Check the models, print the table, and write it to models.csv"
    torch.set_num_threads(1)
    known = list(dict.fromkeys(e.library for e in ZOO))
    chosen = libraries.split(',') if libraries else known
    unknown = set(chosen) - set(known)
    if unknown: raise SystemExit(f"--libraries must be some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if not any(e.library in chosen and models in e.name for e in ZOO):
        raise SystemExit(f"--models must be a part of the name of a model of {', '.join(chosen)}, got {models!r}")
    missing = [o for o in chosen if not installed(o)]
    if missing: print('Not installed, left out:', ', '.join(missing))
    rows = []
    for entry in progress_bar([e for e in ZOO if e.library in chosen and e.library not in missing and models in e.name], leave=False):
        rows.append(row(entry))
        save(rows[-1:], Path(results)/'models.csv')
    show(rows)
    if any('WRONG' in v or 'does not train' in v for r in rows for v in r.values()): raise SystemExit(1)
