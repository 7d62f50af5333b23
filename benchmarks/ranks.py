"Time of a training step with and without mixing, where one, two or four processes train one model on the CPUs"
import json
import tempfile
from multiprocessing import get_context
from pathlib import Path

import bench
import torch
import torch.distributed as dist
from fastai.basics import nn
from torch.nn.parallel import DistributedDataParallel

from fastai_mixup.all import ManifoldMixUp, MixUp
from fastai_mixup.distributed import AcrossRanks

SIZES = ['16x3x32x32', '64x3x32x32']


def model():
    convs = [o for i,j in ((3, 16), (16, 32), (32, 64), (64, 64)) for o in (nn.Conv2d(i, j, 3, 2, 1), nn.BatchNorm2d(j), nn.ReLU())]
    return DistributedDataParallel(nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)))


def rows_of_rank(size, rounds):
    "What one rank measures"
    shape = [int(s) for s in size.split('x')]
    contestants = {'plain': None, 'MixUp': MixUp(.4), 'ManifoldMixUp': ManifoldMixUp(.4), 'AcrossRanks': MixUp(.4, pairing=AcrossRanks())}
    batch = torch.randn(shape),torch.randint(10, shape[:1])
    learners = {name: bench.learner(batch, model(), cb) for name,cb in contestants.items()}
    rows = bench.compare(bench.in_turns(learners, 'step', rounds), ('plain',), size=f'{size}, {dist.get_world_size()} rank(s)')
    received = (dist.get_world_size()-1)*sum(o.nbytes for o in batch)/1e3
    return [{**r, 'kB received for mixing': received*(r['contestant'] == 'AcrossRanks')} for r in rows]


def be(rank, ranks, folder, threads, rounds, sizes):
    "Be one rank; the first writes down what it measures"
    torch.set_num_threads(threads)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=ranks)
    torch.manual_seed(0)
    rows = [r for s in sizes for r in rows_of_rank(s, rounds)]
    if rank == 0: Path(f'{folder}/rows').write_text(json.dumps(rows))
    dist.destroy_process_group()


def rows_of(ranks, rounds, sizes):
    "Start `ranks` processes; what the first of them measures"
    with tempfile.TemporaryDirectory() as folder:
        processes = [get_context('fork').Process(target=be, args=(r, ranks, folder, torch.get_num_threads(), rounds, sizes))
            for r in range(ranks)]
        for p in processes: p.start()
        for p in processes: p.join()
        return json.loads(Path(f'{folder}/rows').read_text())


if __name__ == '__main__':
    args = bench.arguments(__doc__, sizes=(SIZES, 'batches of a rank, items x channels x height x width'),
        ranks=([1, 2, 4], 'numbers of processes'))
    bench.run('ranks', args, lambda: [r for n in args.ranks for r in rows_of(int(n), args.rounds, args.sizes)])
