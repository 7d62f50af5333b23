"Several processes: each mixes within its own batch, by its own draws; what DistributedDataParallel makes of it is what one process would."
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed

pytest.importorskip('accelerate')
from on_ranks import BS, CASES, PICTURES, ROWS, C, N, Y, normed
from oracle import close

from fastai_mixup.all import ManifoldMixUp, MixUp

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent/'on_ranks.py'

def launch(n, folder, part, code=0):
    "What each of `n` ranks writes down"
    done = subprocess.run([sys.executable, '-W', 'ignore', SCRIPT, str(n), folder, part], capture_output=True, text=True, timeout=600)
    assert done.returncode == code, f'{done.stderr[:4000]}\n...\n{done.stderr[-4000:]}'
    return [torch.load(folder/str(r), map_location='cpu', weights_only=False) if (folder/str(r)).exists() else None for r in range(n)]

@pytest.fixture(scope='module')
def two(tmp_path_factory): return launch(2, tmp_path_factory.mktemp('two'), 'two')

@pytest.fixture(scope='module')
def four(tmp_path_factory): return launch(4, tmp_path_factory.mktemp('four'), 'four')

def of(ranks, name): return [r[name] for r in ranks]
def steps(ranks, name): return list(zip(*(r[name].pages for r in ranks), strict=True))
def lam_of(page): return page.M[range(len(page.M)), page.ids]

def by_hand(page, M=None):
    "The loss of one linear layer, and its gradients"
    W,b = (page.head[k].clone().requires_grad_() for k in ('weight', 'bias'))
    pred = (page.M if M is None else M) @ W.T + b
    loss = sum((page.M[:,j]*F.cross_entropy(pred, Y[j].expand(len(pred)), reduction='none')).sum() for j in range(N)) / len(pred)
    return loss.detach(),dict(zip(('head.weight', 'head.bias'), torch.autograd.grad(loss, [W, b])))

def check_step(pages, across=False):
    "Each rank mixes among the items that it may meet; the gradients are the mean of those worked out by hand"
    hand = []
    for page in pages:
        may = torch.cat([p.ids for p in pages]) if across else page.ids
        close(page.M.sum(1), torch.ones(len(page.M)))
        assert ((page.M > 0).sum(1) <= 2).all() and not page.M[:, [j for j in range(N) if j not in may]].any()
        loss,grads = by_hand(page)
        close(page.loss, loss)
        hand.append(grads)
    for page in pages:
        for name in hand[0]: close(page.grads[name], torch.stack([g[name] for g in hand]).mean(0))

INPUTS,HIDDEN = ('inputs', 'inputs_unused', 'inputs_static', 'same', 'batch', 'uneven'),('hidden', 'hidden_unused', 'hidden_static', 'some',
    'seeds', 'uneven_hidden')
ACROSS = 'across', 'across_uneven', 'across_ones'

@pytest.mark.parametrize('name', (*INPUTS, *HIDDEN, *ACROSS))
def test_gradients_are_those_of_one_process(two, name):
    for pages in steps(two, name): check_step(pages, across=name in ACROSS)
    mixed = [not torch.equal(p.M, ROWS[p.ids]) for pages in steps(two, name) for p in pages if len(p.ids) > 1]
    assert sum(mixed) > .3*len(mixed) if name == 'some' else all(mixed)

@pytest.mark.parametrize('name', ('inputs', 'hidden', 'some', 'across', 'uneven4'))
def test_four_ranks(four, name):
    for pages in steps(four, name): check_step(pages, across=name in ('across', 'uneven4'))

def test_each_rank_draws_its_own(two, four):
    for ranks in two, four:
        for pages in steps(ranks, 'inputs'):
            assert len({tuple(lam_of(p).tolist()) for p in pages}) == len(pages)
            assert all(len(lam_of(p).unique()) > 1 for p in pages)
    for pages in steps(two, 'batch'):
        for p in pages: close(lam_of(p), lam_of(p)[:1].expand(len(p.M)))
        assert lam_of(pages[0])[0] != lam_of(pages[1])[0]

def test_the_rank_is_that_of_the_process_group(monkeypatch):
    "Not only that of the environment, which launchers set and `init_process_group(rank=…)` does not"
    def drawn(rank):
        monkeypatch.setattr(dist, 'is_initialized', lambda: True)
        monkeypatch.setattr(dist, 'get_rank', lambda: rank)
        set_seed(0)
        learn = Learner(DataLoaders([(torch.eye(6), torch.arange(6) % 3)], [], device='cpu'), nn.Linear(6, 3), nn.CrossEntropyLoss(),
            cbs=MixUp(1.))
        seen = []
        learn.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
        return seen[0]
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))

def test_one_seed_gives_one_training(two):
    for rank in two:
        for name,equal in ('again', True), ('other_seed', False):
            assert equal == all(torch.equal(a.M, b.M) for a,b in zip(rank['inputs'].pages, rank[name].pages))

def test_generator_of_all_ranks(two):
    for a,b in steps(two, 'same'): close(lam_of(a), lam_of(b))

def test_the_data_are_those_without_mixing(two):
    for name in 'inputs', 'hidden', 'some', 'across':
        for rank in two: assert all(torch.equal(a.ids, b.ids) for a,b in zip(rank['plain'].pages, rank[name].pages))
    epoch = [i for pages in steps(two, 'plain')[:3] for p in pages for i in p.ids.tolist()]
    assert len(epoch) == N+1 and set(epoch) == set(range(N)) and [len(p.ids) for p in two[0]['plain'].pages[:3]] == [BS, BS, 3]

@pytest.mark.parametrize('name', ('hidden', 'hidden_unused', 'hidden_static', 'some', 'found', 'output', 'hidden_cutmix', 'uneven_hidden',
    'synced_hidden', 'synced_found'))
def test_ranks_agree_on_the_place(two, name):
    both = [pages for pages in steps(two, name) if all(p.mixed for p in pages)]
    assert len(both) > 1 and all(a.layer == b.layer for a,b in both)
    if 'uneven' not in name: assert len({a.layer for a,_ in both}) > 1
    if name in ('some', 'uneven_hidden', 'synced_found'): assert any(a.mixed != b.mixed for a,b in steps(two, name))

def test_four_ranks_agree_on_the_place(four):
    for name in 'hidden', 'some':
        for pages in steps(four, name): assert len({p.layer for p in pages if p.mixed}) < 2

def test_layers_inside_of_the_wrapper(two):
    places = {p.layer for rank in two for p in rank['found'].pages}
    assert 'input' in places and any(p.startswith(('blocks', 'head')) for p in places) and not any('module' in p for p in places)
    for pages in steps(two, 'output'):
        for p in pages: assert p.layer in ('input', 'blocks.1', 'output')

def test_masks_at_hidden_layers(two):
    for pages in steps(two, 'hidden_cutmix'):
        for p in pages: close(p.M.sum(1), torch.ones(len(p.M)))

BESIDE = [n for n in CASES if n.startswith('beside_') or n == 'puzzle_static']

def check_beside(ranks, name):
    assert any(p.mixed for rank in ranks for p in rank[name].pages)
    for rank in ranks:
        for p,alone in zip(rank[name].pages, rank[name].alone, strict=True):
            assert (p.layer, p.mixed) == (alone.layer, alone.mixed)
            close(p.M, alone.M)
            close(p.loss, alone.loss)
            assert (p.weights is None) == (alone.weights is None)
            for a,b in zip(p.weights or (), alone.weights or ()): close(a, b)
    for pages,alones in zip(steps(ranks, name), zip(*(r[name].alone for r in ranks))):
        for p in pages:
            assert p.grads.keys() == alones[0].grads.keys()
            for k,g in p.grads.items(): close(g, torch.stack([a.grads[k] for a in alones]).mean(0), 1e-4)

@pytest.mark.parametrize('name', BESIDE)
def test_every_method_is_that_of_one_process(two, name): check_beside(two, name)

def test_methods_on_four_ranks(four): check_beside(four, 'beside_random')

def test_what_pairings_and_labels_promise(two):
    for rank in two:
        for p in rank['beside_different'].pages:
            for i,row in zip(p.ids, p.M): assert all(Y[j] != Y[i] for j in row.nonzero().flatten() if j != i)
        first,*later = rank['beside_previous'].pages
        assert torch.equal(first.M, ROWS[first.ids])
        for before,p in zip([first, *later], later):
            for i,row in zip(p.ids, p.M): assert set(row.nonzero().flatten().tolist()) <= {i.item(), *before.ids.tolist()}
        for name in 'remix', 'snapmix', 'transmix':
            assert any(p.weights is not None and not torch.allclose(p.weights[0], lam_of(p)) for p in rank[f'beside_{name}'].pages), name

FITS = [n for n in CASES if n != 'uneven4' and not n.startswith(('sync_bn', 'sent', 'across_shapes'))]

@pytest.mark.parametrize('name', FITS)
def test_after_the_fit(two, name):
    a,b = of(two, name)
    assert a.params.keys() == b.params.keys() and a.pages
    for k in a.params: assert torch.equal(a.params[k], b.params[k]), k
    for o in a.after, b.after:
        assert o.kind == 'Net' and o.hooks == 0 and not o.forwards and not any(o.cb) and 'DistributedDL' not in o.loaders
        close(o.M, torch.eye(N))

def test_accuracy_of_all_ranks(two):
    pages = steps(two, 'accuracy')
    for epoch,row in enumerate(two[0]['accuracy'].values):
        of_epoch = [p for ranks in pages[3*epoch:3*epoch+3] for p in ranks]
        hits = sum((p.M*(Y == p.pred.argmax(1)[:,None])).sum() for p in of_epoch)
        close(torch.tensor(row[1]), hits / sum(len(p.M) for p in of_epoch))
    assert [r[1] for r in two[0]['accuracy'].values] == [r[1] for r in two[1]['accuracy'].values]

def test_torch_refuses_sync_bn_on_cpus(two):
    for rank in two:
        for name in 'sync_bn', 'sync_bn_mixed': assert 'SyncBatchNorm layers only work with GPU modules' in rank[name]

def test_synchronised_batchnorm(two):
    "Where BatchNorm sees all ranks, gradients are those of one process with one BatchNorm over all mixed rows"
    for name in 'synced_inputs', 'synced_hidden':
        for pages in steps(two, name):
            net = normed()
            net.head.load_state_dict({k: v for k,v in pages[0].head.items()})
            preds = net(torch.cat([p.M for p in pages])[...,None,None].expand(-1, -1, *PICTURES.shape[2:])).split([len(p.M) for p in pages])
            losses = [sum((p.M[:,j]*F.cross_entropy(pred, Y[j].expand(len(pred)), reduction='none')).sum() for j in range(N))/len(pred)
                for p,pred in zip(pages, preds)]
            (sum(losses)/len(losses)).backward()
            for p,loss in zip(pages, losses): close(p.loss, loss, 1e-4)
            for k,q in net.named_parameters(): close(pages[0].grads[k], q.grad, 1e-3)

def test_probes_wait_for_no_other_rank(two):
    "Ranks look through the model at different batches, and send nothing then"
    calls = {r[f'synced_{k}'].calls for r in two for k in ('inputs', 'hidden', 'found', 'puzzle')}
    assert len(calls) == 1
    assert any(a.mixed != b.mixed for a,b in steps(two, 'synced_puzzle'))

def test_nothing_is_sent_by_default(two):
    for rank in two:
        sent = rank['sent']
        assert sent['none'] == sent['inputs'] == sent['hidden'] == sent['remix'] and len(sent['across']) == len(sent['none']) + 2*6

def test_partners_of_all_ranks(two, four):
    for ranks in two, four:
        total = there = expected = 0
        for pages in steps(ranks, 'across'):
            items = [(r, i) for r,p in enumerate(pages) for i in p.ids.tolist()]
            if len({i for _,i in items}) < len(items): continue
            where = {i: r for r,i in items}
            for r,p in enumerate(pages):
                for i,row in zip(p.ids.tolist(), p.M):
                    partner, = [j for j in row.nonzero().flatten().tolist() if j != i]
                    total,there,expected = total+1,there+(where[partner] != r),expected + (len(items)-len(p.ids))/(len(items)-1)
        assert total > 100 and abs(there-expected) < 3*total**.5/2

def test_partners_of_batches_of_one(two):
    for a,b in steps(two, 'across_ones'):
        for p,other in (a, b), (b, a): assert set(p.M.nonzero()[:,1].tolist()) == {p.ids.item(), other.ids.item()}

@pytest.mark.parametrize('name', ['across_cutmix', 'across_random', 'across_puzzle', 'across_snapmix', 'across_regmixup'])
def test_methods_with_partners_of_all_ranks(two, name):
    met = 0
    for pages in steps(two, name):
        for r,p in enumerate(pages):
            close(p.M[-len(p.ids):].sum(1), torch.ones(len(p.ids)), 1e-4)
            met += p.M[:, [j for j in pages[1-r].ids.tolist() if j not in p.ids]].any().item()
            if name in ('across_cutmix', 'across_random'):
                W = p.M
                close(p.loss, sum((W[:,j]*F.cross_entropy(p.pred, Y[j].expand(len(W)), reduction='none')).sum() for j in range(N))/len(W),
                    1e-4)
    assert met

def test_items_of_different_shapes_are_refused_on_all_ranks(two):
    for rank in two:
        assert 'needs items of the same shapes and types on all ranks, got' in rank[
            'across_shapes'] and '0.0: (21,) (torch.float32)' in rank['across_shapes'] and '0.0: (21, 1) (torch.float32)' in rank[
            'across_shapes'] and 'on rank 1' in rank['across_shapes']

@pytest.mark.parametrize('mix', ['hidden', 'across'])
def test_a_rank_that_dies(mix, tmp_path):
    "The others get torch's error, without a launcher that would end them, and before the time limit of the group is over"
    start = perf_counter()
    survivor,dead = launch(2, tmp_path, f'dies_{mix}', code=1)
    assert dead is None and 'Error' in survivor and perf_counter()-start < 60

# FSDP2: each rank holds a part of the parameters

@pytest.fixture(scope='module')
def sharded(tmp_path_factory): return launch(2, tmp_path_factory.mktemp('sharded'), 'sharded')

@pytest.mark.parametrize('name', ('inputs', 'hidden', 'some', 'found'))
def test_sharded_parameters(sharded, name):
    for pages in steps(sharded, name): check_step(pages)
    a,b = of(sharded, name)
    assert any(not torch.equal(p.M, ROWS[p.ids]) for p in a.pages) and a.after.kind == 'FSDPNet' and a.after.hooks == 0
    close(a.after.M, torch.eye(N))
    for k in a.params: assert torch.equal(a.params[k], b.params[k]), k

@pytest.mark.parametrize('name', ('hidden', 'some', 'found'))
def test_ranks_agree_on_the_place_of_sharded_parameters(sharded, name):
    both = [pages for pages in steps(sharded, name) if all(p.mixed for p in pages)]
    assert both and all(a.layer == b.layer for a,b in both)
    if name != 'hidden': assert [p.mixed for p in sharded[0][name].pages] != [p.mixed for p in sharded[1][name].pages]

def test_sharded_parameters_in_half_precision(sharded):
    "The inputs that the model is given are copies in bfloat16: it is mixed all the same, as far as eight bits tell"
    for pages in steps(sharded, 'halves'):
        for p in pages:
            M,(loss,_) = p.M,by_hand(p)
            assert torch.equal(M, M.bfloat16().float()) and p.layer in ('blocks.0', 'blocks.1') and ((M > 0).sum(1) == 2).all()
            close(M.sum(1), torch.ones(len(M)), 1e-2)
            close(p.loss, loss, 3e-2)

@pytest.mark.parametrize('name,who', [('puzzle', 'PuzzleMix'), ('snap', 'SnapMix'), ('trans', 'TransMix'), ('random', 'PuzzleMix'),
    ('around', 'SnapMix')])
def test_who_would_wait_for_the_other_rank_is_refused(sharded, name, who):
    for said in of(sharded, f'asks_{name}'): assert said.startswith('ValueError') and who in said and 'calls the model by itself' in said

# DataParallel: replicas and the parts of a batch that they see, without GPUs

class Replicas(nn.DataParallel):
    "Scatters tensors as plain ones and gathers predictions, as DataParallel does"
    def forward(self, *xb):
        with torch._C.DisableTorchFunctionSubclass(): parts = list(zip(*(x.as_subclass(torch.Tensor).chunk(2) for x in xb)))
        return torch.cat([nn.DataParallel.forward(self, *p) for p in parts])

class Keeps(nn.Linear):
    def forward(self, x):
        self.parts = [*getattr(self, 'parts', []), x.detach()]
        return super().forward(x)

class Gradients(Callback):
    def after_backward(self): self.learn.seen = self.learn.loss.clone(),[p.grad.clone() for p in self.model.parameters()]

class Embeds(nn.Sequential):
    def __init__(self): super().__init__(nn.Embedding(N, 4), nn.Linear(4, C))

def parallel(net, x, cb):
    learn = Learner(DataLoaders([(x, Y)], []), Replicas(net), CrossEntropyLossFlat(), SGD, cbs=[cb, Gradients()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    return learn

def test_inputs_of_data_parallel():
    torch.manual_seed(0)
    net = Keeps(N, C)
    learn = parallel(net, ROWS, MixUp(1.))
    assert len(net.parts) == 2
    M = torch.cat(net.parts)
    page = SimpleNamespace(M=M, head=net.state_dict())
    assert (M > 0).sum() == 2*N and (M[:N//2, N//2+1:] > 0).any()
    loss,grads = by_hand(page)
    close(learn.seen[0], loss)
    for got,g in zip(learn.seen[1], grads.values(), strict=True): close(got, g)

def test_what_data_parallel_would_lose_is_refused():
    with pytest.raises(RuntimeError, match='was not mixed.*So does DataParallel: use DistributedDataParallel'):
        parallel(Embeds(), torch.arange(N), MixUp())
    with pytest.raises(ValueError, match='ManifoldMixUp cannot mix in a DataParallel model.*distrib_ctx'):
        parallel(Keeps(N, C), ROWS, ManifoldMixUp())
