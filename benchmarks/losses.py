"""Time of the mixed loss (from `after_pred` to the end of backward): ours, fastai's, and those of torchvision and timm, compared with
plain cross-entropy"""
import bench
import peers
import torch
from fastai.vision.all import TensorCategory
from timm.loss import SoftTargetCrossEntropy

from fastai_mixup.all import MixUpCallback

SIZES = ['1024x32000', '256x10000', '128x1000', '64x10']


def rows_of(size, rounds):
    n,classes = [int(s) for s in size.split('x')]
    contestants = {'plain': (None, None), 'fastai_mixup': (MixUpCallback(.4), None), 'fastai': (peers.FastaiMixUp(.4), None),
                   'torchvision': (peers.Torchvision(classes), torch.nn.CrossEntropyLoss()),
                   'timm': (peers.Timm(classes), SoftTargetCrossEntropy())}
    model = bench.GivenPredictions(torch.randn(n, classes))
    learners = {name: bench.learner((torch.randn(n, 1, 1, 1), TensorCategory(torch.randint(classes, (n,)))), model, cb, loss,
                                    batches=7 if n*classes > 1e7 else 30) for name,(cb,loss) in contestants.items()}
    return bench.compare(bench.in_turns(learners, 'loss', rounds), ('plain', 'fastai'), size=size)


if __name__ == '__main__':
    args = bench.arguments(__doc__, sizes=(SIZES, 'predictions, items x classes'))
    bench.run('losses', args, lambda: [r for s in args.sizes for r in rows_of(s, args.rounds)])
