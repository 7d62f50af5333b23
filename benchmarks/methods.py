"Cost of each method: `before_batch` compared with MixUp's, and a whole training step compared with one without mixing"
from statistics import mean

import bench
import torch
from fastai.vision.all import CrossEntropyLossFlat, TensorCategory, TensorImage, TensorMask, xresnet18
from torchvision.models import VisionTransformer

from fastai_mixup import registry
from fastai_mixup.all import *

SIZES = ['64x3x128x128']
def is_of_maps(make): return make().recipe.looks_at == 'targets'
METHODS = {**{cls.__name__: cls for cls in registry.METHODS if not cls().recipe.needs_model},
           'RandomMix([MixUp, CutMix])': lambda: RandomMix([MixUpCallback(), CutMixCallback()]),
           "RandomMix(per='item')": lambda: RandomMix([MixUpCallback(), CutMixCallback()], per='item'),
           'MixUp(DifferentClass)': lambda: MixUpCallback(pairing=DifferentClass()),
           'MixUp(SameClass)': lambda: MixUpCallback(pairing=SameClass()),
           'MixUp(LeastOverlap)': lambda: MixUpCallback(pairing=LeastOverlap()),
           'MixUp(PreviousBatch)': lambda: MixUpCallback(pairing=PreviousBatch()), 'MixUp(ReMix)': lambda: MixUpCallback(labels=ReMix())}
ASKS = {cls.__name__: cls for cls in registry.METHODS if cls().recipe.needs_model and not cls().recipe.watches}
WHOLE = {'ManifoldMixUp': ManifoldMixUp, 'ManifoldMixUp(CutMix)': lambda: ManifoldMixUp(method=CutMixCallback()), 'AlignMixUp': AlignMixUp,
         'CatchUpMix': CatchUpMix, 'RegMixUp': RegMixUp, 'GuidedMixup(gradients)': lambda: GuidedMixup(gradients=True), **ASKS}
TRANSFORMERS = {cls.__name__: cls for cls in registry.METHODS if cls().recipe.watches}


def batch(shape): return TensorImage(torch.randn(shape)), TensorCategory(torch.randint(10, shape[:1]))
def learner_with_maps(shape, make):
    batch = TensorImage(torch.randn(shape)), TensorMask(torch.randint(10, (shape[0], *shape[2:])))
    model = bench.GivenPredictions(torch.randn(shape[0], 10, *shape[2:]))
    return bench.learner(batch, model, make(), CrossEntropyLossFlat(axis=1), batches=12)


def inputs_of(size, rounds):
    shape = [int(s) for s in size.split('x')]
    model = bench.GivenPredictions(torch.randn(shape[0], 10))
    learners = {name: learner_with_maps(shape, make) if is_of_maps(make) else bench.learner(batch(shape), model, make(), batches=12)
                for name,make in METHODS.items()}
    return bench.compare(bench.in_turns(learners, 'inputs', rounds, average=mean), ('MixUp',), size=size)


def step_of(size, rounds):
    plain = {'no mixing': lambda: None, 'MixUp': MixUpCallback}
    shape = [int(s) for s in size.split('x')]
    nets = {f'xresnet18, {size}': (lambda: xresnet18(n_out=10), plain | WHOLE),
            f'transformer, {size}': (lambda: VisionTransformer(shape[-1], 8, 6, 4, 128, 256, num_classes=10), plain | TRANSFORMERS)}
    for name,(net,makes) in nets.items():
        learners = {}
        for method,make in makes.items():
            torch.manual_seed(0)
            learners[method] = bench.learner(batch(shape), net(), make(), batches=8)
        yield from bench.compare(bench.in_turns(learners, 'step', rounds), ('no mixing',), size=name)


if __name__ == '__main__':
    args = bench.arguments(__doc__, rounds=5, sizes=(SIZES, 'batches, items x channels x height x width'),
                           steps=(['16x3x64x64'], 'batches of the training steps'))
    bench.run('methods', args, lambda: [r for s in args.sizes for r in inputs_of(s, args.rounds)]
        + [r for s in args.steps for r in step_of(s, args.rounds)])
