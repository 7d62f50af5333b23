"Memory that mixing takes on top of training without it, at its peak: of the inputs in batches, of the loss in tables of logits"
import os
from contextlib import contextmanager

import bench
import peers
import torch
from fastai.vision.all import TensorCategory
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.profiler import ProfilerActivity, profile

from fastai_mixup.all import LabelSmoothingCE, MixUpCallback

@contextmanager
def quietly():
    "Without what the profiler writes about itself"
    kept,nowhere = os.dup(2),os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try: yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak(learn):
    "Bytes that are allocated in a fit, less those freed, at most"
    with quietly(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof, learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    now = most = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == '[memory]':
            now += event.nbytes()
            most = max(most, now)
    return most


def inputs():
    batch = torch.randn(64, 3, 128, 128),TensorCategory(torch.randint(10, (64,)))
    contestants = {'no mixing': None, 'fastai_mixup': MixUpCallback(.4), 'fastai': peers.FastaiMixUp(.4),
        'torchvision': peers.Torchvision(10),
                   'timm, batch': peers.Timm(10), 'timm, elem': peers.Timm(10, 'elem')}
    learners = {name: bench.learner(batch, bench.GivenPredictions(torch.randn(64, 10)), cb,
                                    torch.nn.CrossEntropyLoss() if isinstance(cb, (peers.Torchvision, peers.Timm)) else None, batches=4)
                for name,cb in contestants.items()}
    return 'inputs 64x3x128x128',learners,batch[0].nbytes


def losses():
    logits,classes = torch.randn(256, 10000),10000
    contestants = {'plain': (None, None), 'fastai_mixup': (MixUpCallback(.4), None), 'fastai': (peers.FastaiMixUp(.4), None),
                   'torchvision': (peers.Torchvision(classes), torch.nn.CrossEntropyLoss()),
                   'timm': (peers.Timm(classes), SoftTargetCrossEntropy()),
                   'fastai_mixup, LabelSmoothingCE': (MixUpCallback(.4), LabelSmoothingCE(.1)),
                   'torch, label_smoothing': (None, torch.nn.CrossEntropyLoss(label_smoothing=.1)),
                   'timm, LabelSmoothingCrossEntropy': (None, LabelSmoothingCrossEntropy(.1))}
    batch = torch.randn(256, 1, 1, 1),TensorCategory(torch.randint(classes, (256,)))
    return 'losses 256x10000',{name: bench.learner(batch, bench.GivenPredictions(logits), cb, loss, batches=4)
                               for name,(cb,loss) in contestants.items()},logits.nbytes


def rows():
    return [{'size': size, 'contestant': name, 'MB': most/2**20, 'x batch or logits': (most/unit,)*3}
            for size,learners,unit in (inputs(), losses()) for name,most in ((name, peak(learn)) for name,learn in learners.items())]


if __name__ == '__main__': bench.run('memory', bench.arguments(__doc__, rounds=1), rows)
