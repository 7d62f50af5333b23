"Time of a label-smoothing loss (from `after_pred` to the end of backward): ours, fastai's, timm's and torch's own, unmixed and under MixUp"
import bench
import torch
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.vision.all import TensorCategory
from timm.loss import LabelSmoothingCrossEntropy

from fastai_mixup.all import LabelSmoothingCE, MixUpCallback

SIZES = ['1024x32000', '256x10000', '128x1000']


def rows_of(size, rounds):
    n,classes = [int(s) for s in size.split('x')]
    contestants = {'torch': (torch.nn.CrossEntropyLoss(label_smoothing=.1), None), 'fastai_mixup': (LabelSmoothingCE(.1), None),
                   'fastai': (LabelSmoothingCrossEntropyFlat(), None), 'timm': (LabelSmoothingCrossEntropy(.1), None),
                   'fastai_mixup, mixed': (LabelSmoothingCE(.1), MixUpCallback(.4)),
                   'fastai, mixed': (LabelSmoothingCrossEntropyFlat(), FastaiMixUp(.4))}
    model = bench.GivenPredictions(torch.randn(n, classes))
    batch = torch.randn(n, 1, 1, 1),TensorCategory(torch.randint(classes, (n,)))
    learners = {name: bench.learner(batch, model, cb, loss, batches=7 if n*classes > 1e7 else 30) for name,(loss,cb) in contestants.items()}
    return bench.compare(bench.in_turns(learners, 'loss', rounds), ('fastai', 'torch'), size=size)


if __name__ == '__main__':
    args = bench.arguments(__doc__, sizes=(SIZES, 'predictions, items x classes'))
    bench.run('smoothing', args, lambda: [r for s in args.sizes for r in rows_of(s, args.rounds)])
