"""Train a small network on handwritten digits without mixing, with MixUp, ManifoldMixUp and LabelSmoothingCE, and compare.

The digits come with scikit-learn. By default 500 are trained on, 40% of whose labels are redrawn at random; the other 1297 are
the test set, with true labels. Every seed gives each method the same digits, the same labels and the same initial weights, so
that the differences are paired. Nothing is tuned on the test set: the settings are the libraries' usual ones.
"""
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import fastai.callback.all  # noqa: F401, gives Learner `fit_one_cycle`
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fastcore.script import call_parse
from fastprogress.fastprogress import progress_bar
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.all import LabelSmoothingCE, ManifoldMixUp, MixUp

def digits(seed, n_train, noise):
    "Train and test sets; each training label is redrawn at random with probability `noise`"
    x,y = load_digits(return_X_y=True)
    x,y = torch.tensor(x/16, dtype=torch.float32),torch.tensor(y)
    rng = np.random.default_rng(seed)
    order = torch.tensor(rng.permutation(len(x)))
    train,test = order[:n_train],order[n_train:]
    redrawn = torch.tensor(rng.random(n_train) < noise)
    y_train = torch.where(redrawn, torch.tensor(rng.integers(10, size=n_train)), y[train])
    return (x[train], y_train),(x[test], y[test])


def methods(alpha):
    "For each method its callbacks and its loss"
    return {'none': (lambda: [], CrossEntropyLossFlat),
            f'MixUp({alpha:g})': (lambda: [MixUp(alpha)], CrossEntropyLossFlat),
            f'ManifoldMixUp({alpha:g})': (lambda: [ManifoldMixUp(alpha)], CrossEntropyLossFlat),
            'LabelSmoothingCE(0.1)': (lambda: [], LabelSmoothingCE)}


def run(seed, cbs, loss_func, train, test, epochs):
    "Accuracy and NLL on the test set after training"
    set_seed(seed, reproducible=True)
    dls = DataLoaders(DataLoader(TensorDataset(*train), batch_size=50, shuffle=True, drop_last=True),
                      DataLoader(TensorDataset(*test), batch_size=len(test[0])), device='cpu')
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    learn = Learner(dls, model, loss_func(), cbs=cbs())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 5e-3)
    with torch.no_grad(): logits = model.eval()(test[0])
    return (logits.argmax(1) == test[1]).float().mean().item()*100,F.cross_entropy(logits, test[1]).item()


def table(scores):
    "One line for each method: mean ± sd over the seeds, and the gain over 'none', paired by seed"
    base,lines = np.array(scores['none']),[f"{'':24}{'accuracy, %':>16}{'NLL':>16}{'gain in accuracy':>20}{'better in':>12}"]
    for name,values in scores.items():
        (acc,nll),gain = np.array(values).T,np.array(values)[:,0]-base[:,0]
        line = f"{name:24}{acc.mean():>9.2f} ± {acc.std(ddof=1):<4.2f}{nll.mean():>10.3f} ± {nll.std(ddof=1):<5.3f}"
        if name != 'none': line += f"{gain.mean():>+11.2f} ± {gain.std(ddof=1):<5.2f}{(gain > 0).sum():>8} of {len(gain)}"
        lines.append(line)
    return '\n'.join(lines)


def mixed(alpha, x, y):
    "What the model sees of a batch, with the weights and labels of both parts in words"
    learn = Learner(DataLoaders([], [], device='cpu'), nn.Flatten(), CrossEntropyLossFlat(), cbs=MixUp(alpha))
    set_seed(0)
    learn.training,learn.xb,learn.yb = True,(x,),(y,)
    learn('before_batch')
    plan = learn.mix_up.plan
    lam,partner = (plan.lam, plan.index) if plan else (torch.ones(len(x)), torch.arange(len(x)))
    return learn.x,[f'{l:.0%} “{a}”, {1-l:.0%} “{b}”' for l,a,b in zip(lam.tolist(), y, y[partner])]


def figure(scores, alpha, train, title, path):
    "Left, digits of `train` as the model sees them; right, every run as a dot, with lines that join the runs of a seed"
    fig = plt.figure(figsize=(10, 4), layout='constrained')
    left,right = fig.subfigures(1, 2, width_ratios=(1, 1.2))
    left.suptitle('What the model is given, with its labels', fontsize=12)
    shown = torch.stack([(train[1] == digit).nonzero()[0,0] for digit in (0, 1, 3, 4, 6, 7)])
    for x,label,ax in zip(*mixed(alpha, *(o[shown] for o in train)), left.subplots(2, 3).flat):
        ax.imshow(x.view(8, 8), cmap='gray_r')
        ax.set_title(label, fontsize=9)
        ax.axis('off')
    ax,acc = right.subplots(),np.array([[v[0] for v in values] for values in scores.values()])
    ax.plot(acc, 'o-', color='C0', alpha=.35, lw=.8)
    ax.plot(acc.mean(1), '_', color='C1', ms=30, mew=3)
    ax.set_xticks(range(len(scores)), [name.replace('(', '\n(') for name in scores], fontsize=10)
    ax.set_ylabel('test accuracy, %', fontsize=10)
    ax.set_title(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


@call_parse
def main(
    alpha:float=1.0, # Parameter of Beta(alpha, alpha) for MixUp and ManifoldMixUp; 0 for no mixing
    seeds:int=5, # Number of seeds, each run by every method; at least 2
    epochs:int=40, # Number of epochs of each run
    data:str='noisy', # 'noisy': 40% of the labels redrawn at random; 'clean': true labels
    n_train:int=500, # Number of digits to train on, from 50 to 1700
    out:str='results/digits.png', # Where the figure goes
):
    "Compare MixUp, ManifoldMixUp and LabelSmoothingCE with plain training on handwritten digits"
    if data not in ('noisy', 'clean'): raise SystemExit(f"--data must be 'noisy' or 'clean', got {data!r}")
    if epochs < 1: raise SystemExit(f"--epochs must be at least 1, got {epochs}")
    if Path(out).suffix not in ('.png', '.pdf', '.svg'):
        raise SystemExit(f"--out must be a file name that ends with .png, .pdf or .svg, got {out!r}")
    if seeds < 2: raise SystemExit(f"--seeds must be at least 2, got {seeds}")
    if not 50 <= n_train <= 1700: raise SystemExit(f"--n-train must be from 50 to 1700, got {n_train}")
    try: MixUp(alpha)
    except ValueError as e: raise SystemExit(f"--{e}")
    torch.set_num_threads(1) # more only slow down so small a network
    noise = .4 if data == 'noisy' else 0.
    scores = {name: [] for name in methods(alpha)}
    jobs = [(seed, name) for seed in range(seeds) for name in scores]
    for seed,name in progress_bar(jobs):
        train,test = digits(seed, n_train, noise)
        scores[name].append(run(seed, *methods(alpha)[name], train, test, epochs))
    print(f"\n{n_train} digits, {noise:.0%} of the labels redrawn at random, {epochs} epochs, "
        f"{seeds} seeds; mean ± sd, gain paired by seed\n")
    print(table(scores))
    figure(scores, alpha, digits(0, 1700, 0.)[0], f'{n_train} digits, {noise:.0%} of the labels at random; a line is a seed', Path(out))
    print(f"\nFigure: {out}")
