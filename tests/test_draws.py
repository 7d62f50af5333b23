"Who is mixed with whom and how much: the right distributions, repeatable, and without a trace in torch's own random stream."
import random

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, nn
from fastai.losses import CrossEntropyLossFlat
from oracle import BS, N, Net, batches, fit, learner
from scipy import stats

from fastai_mixup.all import *
from fastai_mixup.batch import draw_lam

EYE,Y = torch.eye(N),torch.arange(N) % 5

def pages(mix, n):
    torch.manual_seed(0)
    return fit(learner(batches((EYE,), (Y,)), CrossEntropyLossFlat(), Net(), mix), n)

def lams(mix, n):
    "The weight of each item itself, batch by batch"
    return [page.M[range(len(page.M)), page.ids] for page in pages(mix, n)]

@pytest.mark.parametrize('p', [0., .3, 1.])
def test_share_of_mixed_batches(p):
    mixed = [bool((lam < 1).any()) for lam in lams(MixUp(1., p=p), 40)]
    assert stats.binomtest(sum(mixed), len(mixed), p).pvalue > 1e-3

def test_fold():
    assert min(lam.min() for lam in lams(MixUp(1.), 5)) >= .5
    assert min(lam.min() for lam in lams(MixUp(1., fold=False), 5)) < .2

@pytest.mark.parametrize('per', ['item', 'batch'])
def test_per(per): assert all((lam == lam[0]).all() == (per == 'batch') for lam in lams(MixUp(1., per=per), 3))

def test_partners_are_uniform():
    full = [page for page in pages(MixUp(1.), 100) if len(page.ids) == BS]
    counts = sum((page.M[:,page.ids] > 0).long() for page in full)
    assert all(stats.chisquare([o for o in row if o < len(full)]).pvalue > 1e-4 for row in counts.tolist())

@pytest.mark.parametrize('alpha', [1e-9, 1e-4, .1, 1, 100, 1e6, 1e9])
@pytest.mark.parametrize('fold', [False, True])
def test_lam_follows_beta(alpha, fold):
    lam = draw_lam(alpha, 4000, fold, torch.Generator().manual_seed(0)).numpy()
    beta = stats.beta(alpha, alpha).rvs(40000, random_state=0)
    assert stats.ks_2samp(lam, (beta.clip(1-beta) if fold else beta).astype('float32')).pvalue > 1e-3

def test_lam_in_training_follows_beta():
    assert stats.kstest(torch.cat(lams(MixUp(.4, fold=False), 60)).numpy(), stats.beta(.4, .4).cdf).pvalue > 1e-3

class Dropped(Net):
    masks = ()
    def forward(self, x):
        pred = super().forward(x)
        self.masks = [*self.masks, F.dropout(torch.ones_like(pred))]
        return pred*self.masks[-1]

def squared(p, y): return F.cross_entropy(p, y)**2
def with_reduction(p, y, reduction='mean'): return F.cross_entropy(p, y, reduction=reduction)/2

def shuffled(mix, cls, loss_func=CrossEntropyLossFlat(), seed=0):
    random.seed(seed)
    torch.manual_seed(seed)
    learn = learner(cls(list(zip(EYE, Y)), BS, shuffle=True), loss_func, Dropped(), mix)
    return fit(learn, 3),learn.model

@pytest.mark.parametrize('loss_func', [CrossEntropyLossFlat(), squared, with_reduction], ids=['flat', 'own', 'reduction'])
@pytest.mark.parametrize('cls', [torch.utils.data.DataLoader, DataLoader], ids=['torch', 'fastai'])
def test_data_order_and_dropout(cls, loss_func):
    (mixed,net),(unmixed,plain) = (shuffled(mix, cls, loss_func) for mix in (MixUp(1.), []))
    assert not torch.equal(net.head.weight, plain.head.weight)
    torch.testing.assert_close([net.masks, [p.yb for p in mixed]], [plain.masks, [p.yb for p in unmixed]], rtol=0, atol=0)

def test_seed():
    fits = [shuffled(MixUp(1.), torch.utils.data.DataLoader, seed=seed) for seed in (0, 0, 1)]
    (a,net_a),(b,net_b),(c,_) = ((torch.cat([p.M.max(1).values for p in mixed]), net.head.weight) for mixed,net in fits)
    assert torch.equal(a, b) and torch.equal(net_a, net_b) and not torch.equal(a, c)

def test_each_fit_draws_anew():
    torch.manual_seed(0)
    learn = learner(torch.utils.data.DataLoader(list(zip(EYE, Y)), BS), CrossEntropyLossFlat(), Net(), MixUp(1.))
    assert not torch.equal(fit(learn)[0].M, fit(learn)[0].M)

def test_generator():
    a,b,c = (torch.cat(lams(MixUp(1., generator=torch.Generator().manual_seed(seed)), 2)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)

class Rows(nn.Linear):
    "Keeps the mixing matrices that come by"
    def __init__(self):
        super().__init__(BS, 5)
        self.seen = []
    def forward(self, x):
        self.seen.append(x.clone())
        return super().forward(x)

def matrices(mix, n, *cbs):
    "The mixing matrices of `n` batches of one size"
    torch.manual_seed(0)
    learn = Learner(DataLoaders([(torch.eye(BS), Y[:BS])]*n, []), Rows(), CrossEntropyLossFlat(), cbs=[mix, *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return torch.stack(learn.model.seen)

def test_drawn_ahead():
    "Over hundreds of batches every lam and partner is drawn anew, from the right distribution"
    M = matrices(MixUp(.4, fold=False), 300)
    lam = M.diagonal(dim1=1, dim2=2).flatten()
    assert lam.unique().numel() > 1100
    assert stats.kstest(lam.numpy(), stats.beta(.4, .4).cdf).pvalue > 1e-3
    assert stats.chisquare([(M[:,0,j] > 0).sum() for j in range(1, BS)]).pvalue > 1e-3

@pytest.mark.parametrize('parameter,before,after,mark', [
    ('alpha', 1e9, 1e-9, lambda lam: lam.max() < .6), ('alpha', 1e9, 0, lambda lam: lam.max() < .6), ('p', 1, 0, lambda lam: lam.max() < 1),
    ('per', 'batch', 'item', lambda lam: lam.unique().numel() == 1), ('fold', True, False, lambda lam: lam.min() >= .5)],
    ids=['alpha', 'alpha off', 'p', 'per', 'fold'])
def test_a_parameter_changed_in_training_counts_from_the_next_batch(parameter, before, after, mark):
    class Turn(Callback):
        def before_batch(self):
            if self.iter == 21: setattr(self.learn.mix_up, parameter, after)
    mix = MixUp(1.)
    setattr(mix, parameter, before)
    said = [bool(mark(m.diagonal())) for m in matrices(mix, 40, Turn())]
    assert all(said[:21])
    assert not all(said[21:]) if parameter == 'fold' else not any(said[21:])
