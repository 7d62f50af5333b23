"Time of mixing one hidden layer, forward and backward, compared with the usual gather and lerp, and with copying it once each way"
from time import perf_counter

import bench
import torch

from fastai_mixup.batch import Plan, draw_lam

SIZES = ['64x64x56x56', '64x64x32x32', '64x512x7x7', '64x128x768']


class Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g.clone()


def gather_and_lerp(x, plan):
    return torch.lerp(x[plan.index], x, plan.lam.view(-1, *[1]*(x.ndim-1)))


def rows_of(size, rounds):
    x = torch.randn([int(s) for s in size.split('x')], requires_grad=True)
    g,hidden = torch.randn_like(x),x.view_as(x)
    contestants = {'copied': lambda plan: Copied.apply(hidden), 'fastai_mixup': lambda plan: plan.mix(hidden),
                   'gather and lerp': lambda plan: gather_and_lerp(hidden, plan)}
    seconds = {name: [] for name in contestants}
    for _ in range(rounds+2):
        plan = Plan(draw_lam(.4, len(x)), int(torch.randint(1, len(x), ())))
        for name,f in contestants.items():
            start = perf_counter()
            torch.autograd.grad(f(plan), hidden, g)
            seconds[name].append(perf_counter() - start)
    return bench.compare({name: s[2:] for name,s in seconds.items()}, ('gather and lerp', 'copied'), size=size)


if __name__ == '__main__':
    args = bench.arguments(__doc__, rounds=40, sizes=(SIZES, 'activations, items first'))
    bench.run('hidden', args, lambda: [r for s in args.sizes for r in rows_of(s, args.rounds)])
