"Time of a whole training step of an xresnet18, with and without mixing"
import bench
import peers
import torch
from fastai.vision.all import TensorCategory, TensorImage, xresnet18

from fastai_mixup.all import LabelSmoothingCE, ManifoldMixUpCallback, MixUpCallback

SIZES = ['64x3x64x64', '64x3x28x28']


def rows_of(size, rounds):
    shape = [int(s) for s in size.split('x')]
    contestants = {'plain': (None, None), 'MixUp': (MixUpCallback(.4), None), 'ManifoldMixUp': (ManifoldMixUpCallback(.4), None),
                   'LabelSmoothingCE': (None, LabelSmoothingCE(.1)), "fastai's MixUp": (peers.FastaiMixUp(.4), None)}
    batch = TensorImage(torch.randn(shape)),TensorCategory(torch.randint(10, shape[:1]))
    learners = {name: bench.learner(batch, xresnet18(n_out=10), cb, loss, batches=6) for name,(cb,loss) in contestants.items()}
    return bench.compare(bench.in_turns(learners, 'step', rounds, warm_up=1), ('plain',), size=size)


if __name__ == '__main__':
    args = bench.arguments(__doc__, sizes=(SIZES, 'batches, items x channels x height x width'))
    bench.run('steps', args, lambda: [r for s in args.sizes for r in rows_of(s, args.rounds)])
