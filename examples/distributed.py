"""Who is mixed with whom, and where, when several processes train one model on CPUs.

Two processes:                 `python -m torch.distributed.run --standalone --nproc_per_node 2 examples/distributed.py`
At hidden layers:              `... examples/distributed.py --method manifold`
Partners from all processes:   `... examples/distributed.py --across`

The class of each of the sixteen items is its number, so that the targets of a mixed batch show who is mixed with whom.
"""
import torch
import torch.distributed as dist
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from fastai.callback.progress import ProgressCallback
from fastai.distributed import DistributedDL
from fastcore.script import call_parse, store_true
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.all import ManifoldMixUp, MixUp
from fastai_mixup.distributed import AcrossRanks

METHODS = {'mixup': MixUp, 'manifold': ManifoldMixUp}


def without_gpu():
    "Let fastai's loaders agree on the order of the data on CPUs too; as they are they do it by way of a GPU"
    def broadcast(self, t, rank):
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast


class Pairs(Callback):
    "Writes down who is mixed with whom in each training batch"
    order,run_valid = 50,False
    def __init__(self, mixing): self.mixing = mixing
    def before_fit(self): self.lines = []

    def before_batch(self):
        plan = self.mixing.plan
        who = zip(self.y.tolist(), plan.lam.tolist(), plan.partners(self.y).tolist())
        self.lines.append(f"at {plan.layer}: " + ', '.join(f'{i} is {lam:.0%} itself and {1-lam:.0%} {j}' for i,lam,j in who))


def trained(method, across, epochs, seed):
    "A Learner after its training"
    set_seed(seed)
    dl = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16)), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    mixing = METHODS[method](1., pairing=AcrossRanks() if across else None)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), model, CrossEntropyLossFlat(), SGD, cbs=[mixing, Pairs(mixing)])
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(), learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(epochs, .1)
    return learn


@call_parse
def main(
    method:str='mixup', # 'mixup' or 'manifold'
    across:store_true=False, # Draw partners from all processes
    epochs:int=1, # Number of epochs
    seed:int=0, # The same on all processes
):
    "Print who is mixed with whom on each rank"
    if method not in METHODS: raise SystemExit(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    if epochs < 1: raise SystemExit(f"--epochs must be at least 1, got {epochs}")
    if across and method != 'mixup': raise SystemExit(f"--across is for inputs: --method must be mixup, got {method!r}")
    torch.set_num_threads(1)
    if not dist.is_torchelastic_launched():
        raise SystemExit("Start it by `python -m torch.distributed.run --standalone --nproc_per_node 2 examples/distributed.py`")
    dist.init_process_group('gloo')
    without_gpu()
    learn = trained(method, across, epochs, seed)
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    found = [None]*dist.get_world_size()
    dist.all_gather_object(found, (learn.pairs.lines, weights))
    if dist.get_rank() == 0:
        for batch,lines in enumerate(zip(*(lines for lines,_ in found))):
            for rank,line in enumerate(lines): print(f'batch {batch}, rank {rank}, {line}')
        print(f"The parameters of all ranks are {'equal' if all(torch.equal(w, weights) for _,w in found) else 'different'}.")
    dist.barrier() # a rank that left while gloo's threads still let go of what was sent would be aborted
    dist.destroy_process_group()
