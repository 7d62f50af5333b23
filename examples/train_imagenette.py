"""Train on Imagenette, as fastai's leaderboard does, with or without mixing.

The data are downloaded once (`untar_data`), or taken from a local folder in the same layout: `train/CLASS/*.jpg` and `val/CLASS/*.jpg`.

One process: `python examples/train_imagenette.py --mixup 0.2 --epochs 80`
Several:     `accelerate launch --num_processes 2 examples/train_imagenette.py --mixup 0.2 --epochs 80` (`pip install accelerate`)
On CPUs:     `python -m torch.distributed.run --nproc_per_node 2 examples/train_imagenette.py ...`
             (`accelerate launch --cpu` starts one process only)
"""
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev

import torch
from fastai.vision.all import *
from fastai.vision.models.xresnet import *
from fastcore.script import call_parse

from fastai_mixup.all import *

ARCHS = {f.__name__: f for f in (xresnet18, xresnet34, xresnet50, xresnet101, xresnext50)}
OPTIMIZERS = {'ranger': ranger, 'adam': Adam, 'rms': RMSProp, 'sgd': SGD}
ACTIVATIONS = {f.__name__: f for f in (Mish, Swish, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)}
POOLS = {'AvgPool': AvgPool, 'MaxPool': MaxPool}


def check(ok, name, allowed, got):
    if not ok: raise SystemExit(f"--{name} must be {allowed}, got {got!r}")


def check_each(is_ok, allowed, **settings):
    for name,got in settings.items(): check(is_ok(got), name, allowed, got)


def one_of(choices, name, got):
    "The choice of that name"
    check(got in choices, name, f"one of {', '.join(choices)}", got)
    return choices[got]


def images(data, size, woof):
    "The folder with the images: `data`, or a download"
    if not data:
        name = 'IMAGEWOOF' if woof else 'IMAGENETTE'
        download = partial(untar_data, getattr(URLs, name if size > 224 else f'{name}_320'))
        if not num_distrib(): return download()
        from fastai.distributed import rank0_first
        return rank0_first(download)
    path,classes = Path(data),{}
    for part in 'train', 'val':
        classes[part] = {image.parent.name for image in get_image_files(path/part)}
        check(classes[part], 'data', f"a folder in Imagenette's layout, with {part}/CLASS/IMAGE in it", data)
    unknown = classes['val']-classes['train']
    check(not unknown, 'data', f"a folder in which all classes are in train/, which has no {', '.join(sorted(unknown))}", data)
    return path


def loaders(path, size, bs, workers):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, splitter=GrandparentSplitter(valid_name='val'),
        get_y=parent_label,
                      item_tfms=[RandomResizedCrop(size, min_scale=.35), FlipItem(.5)], batch_tfms=Normalize.from_stats(*imagenet_stats))
    return block.dataloaders(path, path=path, bs=bs, num_workers=workers, device=default_device())


def without_gpu():
    "Let fastai's loaders agree on the order of the data on CPUs too; as they are they do it by way of a GPU"
    from fastai.distributed import DistributedDL
    def broadcast(self, t, rank):
        t = torch.tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast


def mixing(mixup, cutmix, manifold):
    "The callback that the settings ask for"
    methods = [cls(alpha) for cls,alpha in ((MixUpCallback, mixup), (CutMixCallback, cutmix)) if alpha]
    check(not (manifold and methods), 'manifold', '0 together with --mixup or --cutmix', manifold)
    if manifold: return [ManifoldMixUp(manifold)]
    return [RandomMix(methods)] if len(methods) > 1 else methods


@call_parse
def main(
    data:str='', # Folder in Imagenette's layout; downloaded if none is given
    woof:store_true=False, # Download Imagewoof instead
    size:int=128, # Side of the images: 128, 192 and 256 on the leaderboard
    epochs:int=5, # Number of epochs: 5, 20, 80 and 200 on the leaderboard
    runs:int=1, # Number of trainings
    mixup:float=0., # alpha of MixUp; with --cutmix, one of the two for each batch
    cutmix:float=0., # alpha of CutMix
    manifold:float=0., # alpha of ManifoldMixUp
    smoothing:float=.1, # Label smoothing, in [0, 1]
    arch:str='xresnet50', # xresnet18, xresnet34, xresnet50, xresnet101 or xresnext50
    act:str='Mish', # Activation: Mish, Swish, ReLU, LeakyReLU, ELU, GELU, SiLU or Hardswish
    sa:store_true=False, # Self-attention in the first stages
    sym:store_true=False, # Symmetric self-attention
    pool:str='AvgPool', # Pooling of the stem's and the residual paths: AvgPool or MaxPool
    opt:str='ranger', # ranger, adam, rms or sgd
    lr:float=8e-3, # Learning rate
    mom:float=.95, # Momentum
    sqrmom:float=.99, # Decay of the squared gradients
    eps:float=1e-6, # Added to their root
    wd:float=1e-2, # Weight decay
    bs:int=64, # Images in a batch, on each process
    workers:int=min(8, num_cpus()), # Processes that load images
    fp16:store_true=False, # Mixed precision
    seed:int=None, # Of the first run; the next one has the next
):
    "Train and print the accuracy of each run on the validation set"
    make,opt_func,act_cls,pooling = one_of(ARCHS, 'arch', arch),one_of(OPTIMIZERS, 'opt', opt),one_of(ACTIVATIONS, 'act', act),one_of(POOLS,
        'pool', pool)
    check_each(lambda v: v >= 1, 'a whole number from 1 up', size=size, epochs=epochs, runs=runs)
    check(bs >= 2, 'bs', 'a whole number from 2 up, as batch norm needs', bs)
    check_each(lambda v: 0 <= v < float('inf'), 'a number from 0 up', mixup=mixup, cutmix=cutmix, manifold=manifold, wd=wd, workers=workers)
    check_each(lambda v: 0 < v < float('inf'), 'a number above 0', lr=lr, eps=eps)
    check_each(lambda v: 0 <= v < 1, 'a number in [0, 1)', mom=mom, sqrmom=sqrmom)
    check(0 <= smoothing <= 1, 'smoothing', 'a number in [0, 1]', smoothing)
    mixing(mixup, cutmix, manifold)
    path = images(data, size, woof)
    settings = dict(mom=mom, eps=eps, **({} if opt == 'sgd' else dict(sqr_mom=sqrmom)))
    if opt == 'sgd': settings.pop('eps')
    if num_distrib():
        import fastai.distributed  # noqa: F401, gives Learner `distrib_ctx`
        if not torch.cuda.is_available(): without_gpu()
    scores = []
    for run in range(runs):
        if seed is not None: set_seed(seed+run)
        dls = loaders(path, size, bs, workers)
        model = make(n_out=dls.c, act_cls=act_cls, sa=sa, sym=sym, pool=pooling)
        check(len(dls.train), 'bs', f'at most the {len(dls.train_ds)} images of the training set', bs)
        learn = Learner(dls, model, loss_func=LabelSmoothingCE(smoothing), opt_func=partial(opt_func, **settings),
                        metrics=[accuracy, *[top_k_accuracy]*(dls.c > 5)], cbs=mixing(mixup, cutmix, manifold))
        if fp16: learn.to_fp16()
        with learn.distrib_ctx(sync_bn=False, cpu=not torch.cuda.is_available()) if num_distrib() else nullcontext():
            learn.fit_flat_cos(epochs, lr, wd=wd)
        scores.append(float(learn.recorder.values[-1][2]))
        if not rank_distrib(): print(f'Run {run}: {scores[-1]:.2%}')
    if runs > 1 and not rank_distrib(): print(f'{runs} runs: {mean(scores):.2%} ± {stdev(scores):.2%}')
    if num_distrib(): torch.distributed.barrier() # a rank that left while gloo's threads still let go of what was sent would be aborted
