"Whatever the registry names obeys the laws: what the model saw of each item is the weight of its label in the loss."
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn

from fastai_mixup.all import FromLoader, LabelSmoothingBCE, MixUp, NearTarget
from fastai_mixup.registry import LABEL_RULES, METHODS, PAIRINGS

N,C,SIZE = 5,3,(8, 8)
Y = torch.arange(2*N) % C

class Net(nn.Module):
    "An item's channels are all 0 but that of its own number, so that the means of the channels are the mixing matrix"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body,self.pool,self.head = nn.Conv2d(2*N, 8, 3, padding=1),nn.AdaptiveAvgPool2d(1),nn.Linear(8, C)
    def forward(self, x):
        if self.training and not x.requires_grad: self.x = x.detach() # not where a method runs the model by itself
        return self.head(self.pool(self.body(x).relu()).flatten(1))

class Pages(Callback):
    order,run_valid = 70,False
    def before_fit(self): self.pages = []
    def after_loss(self):
        mixer = next(cb for cb in self.cbs if hasattr(cb, 'recipe'))
        M,first = self.model.x.flatten(2).mean(2),N*(self.iter % 2)
        self.pages.append(SimpleNamespace(M=M, pred=self.pred, loss=self.loss, plan=mixer.plan, first=first))

def pages(cb, epochs=4, loss_func=None):
    "The batches of a training on the same two batches"
    x = torch.eye(2*N).view(2*N, 2*N, 1, 1).expand(2*N, 2*N, *SIZE).contiguous()
    batches = [(x[:N], Y[:N]), (x[N:], Y[N:])]
    learn = Learner(DataLoaders(batches, [], device='cpu'), Net(), loss_func or CrossEntropyLossFlat(), SGD, lr=.01, cbs=[cb, Pages()])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn.pages.pages

def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
def losses(page): return torch.stack([F.cross_entropy(page.pred, y.expand(N), reduction='none') for y in Y], 1)

def check_mixed(found, own_labels=False):
    assert any(page.plan is not None for page in found)
    for page in found:
        if page.plan is None: continue
        at,w = torch.arange(N),page.plan.label_lam
        close(page.M.sum(1), torch.ones(N))
        close(page.M[at,page.first+at].where(page.M.max(1).values < 1-1e-4, page.plan.lam), page.plan.lam)
        if not own_labels: close(page.loss, (page.M*losses(page)).sum(1).mean())
        elif page.plan.scale is None:
            assert ((w >= 0) & (w <= 1)).all()
            y,y1 = page.first+at,page.first+page.plan.index
            close(page.loss, (w*losses(page)[at,y] + (1-w)*losses(page)[at,y1]).mean())

of_maps = [cls for cls in METHODS if cls().recipe.looks_at == 'targets']
@pytest.mark.parametrize('cls', [cls for cls in METHODS if not cls().recipe.watches and cls not in of_maps])
def test_methods(cls):
    torch.manual_seed(1)
    check_mixed(pages(cls()), own_labels=cls().recipe.sets_labels)

@pytest.mark.parametrize('cls', of_maps)
def test_methods_of_maps(cls):
    "Position by position, what the model saw of an item is the weight of its class there"
    torch.manual_seed(1)
    x,y = torch.eye(N).view(N, N, 1, 1).expand(N, N, *SIZE).contiguous(),torch.randint(C, (N, *SIZE))
    model,seen = nn.Conv2d(N, C, 1),[]
    class Note(Callback):
        order = 70
        def after_loss(self): seen.append((self.learn.x.detach(), self.learn.pred.detach(), self.learn.loss.detach()))
    learn = Learner(DataLoaders([(x, y)]*4, [], device='cpu'), model, CrossEntropyLossFlat(axis=1), SGD, lr=.01, cbs=[cls(), Note()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert any(not torch.equal(M, x) for M,*_ in seen)
    for M,pred,loss in seen:
        items = torch.stack([F.cross_entropy(pred, o.expand_as(y), reduction='none') for o in y], 1)
        close(loss, (M*items).sum(1).mean())

@pytest.mark.parametrize('cls', PAIRINGS)
def test_pairings(cls):
    "Also where partners come from another batch"
    torch.manual_seed(1)
    x = torch.eye(2*N).view(2*N, 2*N, 1, 1).expand(2*N, 2*N, *SIZE)
    given = {NearTarget: dict(by=lambda batch: batch.yb[0]), FromLoader: dict(dl=[(x[:4], Y[:4]), (x[4:], Y[4:])])}
    pairing = cls(**given.get(cls, {}))
    found = [page for page in pages(MixUp(1., pairing=pairing)) if page.plan is not None]
    assert found
    for page in found:
        close(page.M.sum(1), torch.ones(N))
        close(page.M[torch.arange(N),page.first+torch.arange(N)].where(page.M.max(1).values < 1-1e-4, page.plan.lam), page.plan.lam)
        close(page.loss, (page.M*losses(page)).sum(1).mean())

@pytest.mark.parametrize('cls', [cls for cls in LABEL_RULES if not hasattr(cls, 'combine')])
def test_label_rules(cls):
    torch.manual_seed(1)
    check_mixed(pages(MixUp(1., labels=cls())), own_labels=True)

@pytest.mark.parametrize('cls', [cls for cls in LABEL_RULES if hasattr(cls, 'combine')])
def test_label_rules_that_combine_targets(cls):
    rows = F.one_hot(Y, C).float()
    for page in pages(MixUp(1., labels=cls()), loss_func=LabelSmoothingBCE()):
        seen = [[rows[j] for j in range(2*N) if page.M[i,j] > 1e-6] for i in range(N)]
        target = torch.stack([o[0] if len(o) == 1 else cls().combine(*o, torch.tensor(.5)) for o in seen])
        close(page.loss, F.binary_cross_entropy_with_logits(page.pred, target))

def test_the_one_left_out():
    assert [cls.__name__ for cls in METHODS if cls().recipe.watches] == ['TransMix'], 'it needs a model with attention, as in its notebook'
