"""Time of mixing the inputs of a batch (`before_batch`): ours, fastai's, torchvision's and timm's, compared with one pass over the memory
of the batch"""
from statistics import mean

import bench
import peers
import torch
from fastai.vision.all import TensorCategory, TensorImage

from fastai_mixup.all import MixUpCallback

SIZES = ['64x3x224x224', '64x3x128x128', '16x3x128x128', '256x3x64x64', '128x1x28x28']


def batch(shape):
    return TensorImage(torch.randn(shape)), TensorCategory(torch.randint(10, shape[:1]))


def rows_of(size, rounds, batches):
    shape = [int(s) for s in size.split('x')]
    contestants = {'one memory pass': peers.OneMemoryPass(), 'fastai_mixup': MixUpCallback(.4), 'fastai': peers.FastaiMixUp(.4),
                   'torchvision': peers.Torchvision(10), 'timm, batch': peers.Timm(10), 'timm, elem': peers.Timm(10, 'elem')}
    dense = torch.nn.CrossEntropyLoss()
    model = bench.GivenPredictions(torch.randn(shape[0], 10))
    learners = {name: bench.learner(batch(shape), model, cb, dense if name[:2] == 'ti' or name[:2] == 'to' else None, batches)
                for name,cb in contestants.items()}
    return bench.compare(bench.in_turns(learners, 'inputs', rounds, average=mean), ('fastai', 'one memory pass'), size=size)


if __name__ == '__main__':
    args = bench.arguments(__doc__, sizes=(SIZES, 'batches, items x channels x height x width'))
    bench.run('inputs', args, lambda: [r for s in args.sizes for r in rows_of(s, args.rounds, 200 if s.endswith('28x28') else 20)])
