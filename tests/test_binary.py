"Binary cross-entropy on class indices and rows of labels, and `Union`: loss and gradients are those written out from the mixing matrix."
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.vision.all import (
    Callback,
    CategoryBlock,
    DataBlock,
    DataLoaders,
    Learner,
    MultiCategoryBlock,
    RandomSplitter,
    TensorImage,
    TransformBlock,
    noop,
)
from oracle import C, Head, N, Net, batches, check, close, fit, learner
from torch import nn

from fastai_mixup.all import *
from fastai_mixup.batch import Plan
from fastai_mixup.losses.mixed import mixed_loss

gen = torch.Generator().manual_seed(2)
IDX,BITS = torch.randint(C, (N,), generator=gen),torch.randint(2, (N, C), generator=gen)
SOME = IDX.index_fill(0, torch.tensor([1, 2, 9]), -100)
SOME_BITS = BITS.masked_fill(torch.rand(N, C, generator=gen) < .3, -1)
ONE = torch.randint(2, (N,), generator=gen)
W,POS = torch.tensor([1., 5., .5, 2., 3.]),torch.tensor([2., 1., .1, 4., 1.])
REDUCTIONS = 'mean','sum','none'

def written_out(y, eps=0., threshold=None, weight=None, pos_weight=None, ignore=-100, reduction='mean', combine=None):
    "Element by element: log-probabilities, the known parts of each target, its cut and its smoothing"
    index = y.ndim == 1 and C > 1 and y is not ONE
    rows = F.one_hot(y.clamp_min(0), C) if index else y.view(len(y), -1)
    known = (y != ignore)[:,None].expand(rows.shape) if index else rows != ignore
    def want(M, pred, ids):
        pred = pred.view(len(pred), -1)
        counts = M @ known.to(M.dtype)
        if combine is None: target = (M @ (rows*known).to(M.dtype)) / counts.where(counts > 0, 1)
        else: target = ((M > combine)[:,:,None] * (rows*known)[None]).amax(1).to(M.dtype)
        if threshold is not None: target = (target > threshold).to(M.dtype)
        target = target*(1-eps) + eps/(C if index else 2)
        yes = target*F.logsigmoid(pred)*(1 if pos_weight is None else pos_weight)
        loss = -(yes + (1-target)*F.logsigmoid(-pred))*counts*(1 if weight is None else weight)
        return loss if reduction == 'none' else loss.sum() if reduction == 'sum' else loss.sum()/counts.sum()
    return want

TARGETS = dict(indices=(IDX, -100), some=(SOME, -100), rows=(BITS, -100), floats=(BITS.float(), -100), bools=(BITS.bool(), -100),
    unknown=(SOME_BITS, -1), unknown_floats=(SOME_BITS.float(), -1))
OPTIONS = dict(plain={}, smooth=dict(eps=.2), cut=dict(threshold=.3), both=dict(eps=.2, threshold=.3),
    weights=dict(weight=W, pos_weight=POS), all=dict(eps=.1, threshold=.2, weight=W, pos_weight=POS))

@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize('target', TARGETS)
def test_oracle(target, option, reduction):
    (y,ignore),options = TARGETS[target],OPTIONS[option] | dict(reduction=reduction)
    torch.manual_seed(0)
    loss_func = LabelSmoothingBCE(**options, ignore_index=ignore)
    learn = learner(batches((torch.eye(N),), (y,)), loss_func, Net(), MixUp(1., fold=False))
    want = written_out(y.long() if y.dtype == torch.bool else y, ignore=ignore, **options)
    for page in fit(learn, 2): check(page, want)

@pytest.mark.parametrize('y', [IDX, BITS], ids=['indices', 'rows'])
def test_float64(y):
    torch.manual_seed(0)
    net = Net(Head((C,), dtype=torch.float64))
    learn = learner(batches((torch.eye(N).double(),), (y,)), LabelSmoothingBCE(.1, weight=W.double()), net, MixUp(1., fold=False))
    for page in fit(learn): check(page, written_out(y, .1, weight=W.double()), tol=1e-6)

@pytest.mark.parametrize('out', [(), (1,)], ids=str)
def test_one_logit(out):
    "Bits for one output are no class indices"
    torch.manual_seed(0)
    learn = learner(batches((torch.eye(N),), (ONE,)), LabelSmoothingBCE(.2, .3), Net(Head(out)), MixUp(1., fold=False))
    for page in fit(learn): check(page, written_out(ONE, .2, .3))

def test_gradients_by_differences():
    y,y1,lam = torch.tensor([0, 3, -100]),torch.tensor([4, 3, 1]),torch.tensor([.7, .2, .6], dtype=torch.float64)
    pred = torch.randn(3, C, dtype=torch.float64, generator=gen, requires_grad=True)
    loss = LabelSmoothingBCE(.1, weight=W.double(), pos_weight=POS.double())
    torch.autograd.gradcheck(lambda p: loss.mixed(p, y, y1, lam), pred)

@pytest.mark.parametrize('loss_func', [LabelSmoothingBCE(), LabelSmoothingCE(0., decoupled=.5)], ids=['binary', 'decoupled'])
def test_bytes_hold_no_negative_mark(loss_func):
    "Class 156 is what -100 would be as a byte"
    pred,y,lam = torch.randn(2, 200, generator=gen),torch.tensor([156, 7]),torch.tensor([.3, .6])
    close(loss_func.mixed(pred, y.byte(), y.flip(0).byte(), lam), loss_func.mixed(pred, y, y.flip(0), lam))

@pytest.mark.parametrize('loss_func,shown', [(LabelSmoothingBCE(thresh=.3), 'thresh=0.3'), (LabelSmoothingBCE(ignore_index=-1), 'index=-1'),
    (LabelSmoothingCE(decoupled=.2), 'decoupled=0.2')])
def test_options_are_shown(loss_func, shown): assert shown in repr(loss_func)

def test_batch_without_targets():
    torch.manual_seed(0)
    none = torch.full((N,), -100)
    for page in fit(learner(batches((torch.eye(N),), (none,)), LabelSmoothingBCE(.1), Net(), MixUp(1.))):
        close(page.loss, torch.tensor(0.))
        for g in page.grads: close(g, torch.zeros_like(g))

@pytest.mark.parametrize('y', [IDX, BITS, BITS.float()], ids=['indices', 'rows', 'floats'])
def test_unmixed_and_validation(y):
    "The loss of a batch that is not mixed, and of the validation, is that of the loss function itself"
    loss_func = LabelSmoothingBCE(.1, .3, POS)
    for page in fit(learner(batches((torch.eye(N),), (y,)), loss_func, Net(), MixUp(1., p=0.))):
        close(page.loss, loss_func(page.pred, page.yb[0]))
        close(page.loss, written_out(y, .1, .3, pos_weight=POS)(page.M, page.pred, page.ids))
    dl = batches((torch.eye(N),), (y,), N)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), net := Net(), loss_func, cbs=MixUp(1.))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    with torch.no_grad(): close(torch.tensor(learn.recorder.values[-1][1]), loss_func(net(torch.eye(N)), y))

# Other methods, and rules that weight whole items

IMAGES = torch.eye(N).view(N, N, 1, 1).expand(N, N, 8, 8).contiguous()
def means(x): return x.flatten(2).mean(2)
@pytest.mark.parametrize('mix', [CutMix, FMix, lambda **kw: RandomMix([MixUp(1.), CutMix()], per='item', **kw)],
    ids=['CutMix', 'FMix', 'by_item'])
@pytest.mark.parametrize('y', [IDX, BITS.float()], ids=['indices', 'rows'])
def test_methods(mix, y):
    for labels,combine in (None, None), (Union(), 0.), (Union(.2), .2):
        torch.manual_seed(0)
        for page in fit(learner(batches((IMAGES,), (y,)), LabelSmoothingBCE(.1), Net(encode=means), mix(labels=labels))):
            close(page.loss, written_out(y, .1, combine=None if combine is None else combine + 1e-6)(page.M, page.pred, page.ids), 1e-4)

@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_weights_of_items(reduction):
    "As SnapMix gives them: the losses of an item are weighted, a mean is over what is mixed of the targets"
    n,plan = 4,Plan(torch.tensor([.9, .6, .3, 1.]), 1)
    own,scale = torch.tensor([.8, .5, .9, .2]),torch.tensor([.5, 1.5, 1., .7])
    plan.set_labels(own, scale)
    pred,y = torch.randn(n, C, generator=gen),torch.tensor([0, 1, -100, 2])
    got = mixed_loss(LabelSmoothingBCE(.2, weight=W, reduction=reduction), pred, (y,), plan)
    def of(y): return LabelSmoothingBCE(.2, weight=W, reduction='none')(pred, y)
    items = (own[:,None]*of(y) + (1-own)[:,None]*of(y.roll(-1)))*scale[:,None]
    counts = plan.lam*(y >= 0) + (1-plan.lam)*(y.roll(-1) >= 0)
    close(got, dict(none=items, sum=items.sum(), mean=items.sum()/(counts.sum()*C))[reduction])

def test_snapmix():
    class Small(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, C))
    learn = Learner(DataLoaders([(torch.randn(6, 3, 16, 16), IDX[:6])], []), Small(), LabelSmoothingBCE(.1, .2), cbs=SnapMix())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

# Union

UNION = dict(flat=BCEWithLogitsLossFlat(), module=nn.BCEWithLogitsLoss(), function=F.binary_cross_entropy_with_logits,
    own=lambda p,t: F.binary_cross_entropy_with_logits(p, t.float()), partial=partial(F.binary_cross_entropy_with_logits),
    ours=LabelSmoothingBCE())
@pytest.mark.parametrize('above', [0., .2, .49])
@pytest.mark.parametrize('name', UNION)
def test_union(name, above):
    for y in [BITS.float()] + [BITS, BITS.bool()]*(name in ('flat', 'own', 'ours')):
        torch.manual_seed(0)
        learn = learner(batches((torch.eye(N),), (y,)), UNION[name], Net(), MixUp(1., fold=False, labels=Union(above)))
        pages = fit(learn)
        assert above > .2 or any((page.M > above).sum() > len(page.M) for page in pages)
        for page in pages: check(page, written_out(BITS, combine=above))

def test_union_of_soft_rows():
    "The larger of both, also where it is no 1"
    y = torch.rand(N, C, generator=gen)
    for page in fit(learner(batches((torch.eye(N),), (y,)), BCEWithLogitsLossFlat(), Net(), MixUp(1., labels=Union()))):
        target = ((page.M > 0)[:,:,None]*y[None]).amax(1)
        close(page.loss, F.binary_cross_entropy_with_logits(page.pred, target))

def test_union_of_indices_and_rows_is_the_cut_of_the_loss():
    for y,above in product((IDX, BITS), (0., .2)):
        def run(loss_func, **kw):
            torch.manual_seed(0)
            return fit(learner(batches((torch.eye(N),), (y,)), loss_func, Net(), MixUp(1., fold=False, **kw)))
        for a,b in zip(run(LabelSmoothingBCE(.1), labels=Union(above)), run(LabelSmoothingBCE(.1, above))): close(a.loss, b.loss)

@pytest.mark.parametrize('y,loss_func', [(IDX, CrossEntropyLossFlat()), (BITS.float(), nn.CrossEntropyLoss()), (IDX, LabelSmoothingCE()),
    (BITS.float(), LabelSmoothingCE()), (IDX, BCEWithLogitsLossFlat()), (BITS.float(), MSELossFlat()),
    (IDX, lambda p,t: F.cross_entropy(p, t))])
@pytest.mark.parametrize('targets', [None, 'losses', 'average'])
def test_union_needs_a_loss_of_several_labels(y, loss_func, targets):
    with pytest.raises(ValueError, match='LabelSmoothingBCE'):
        fit(learner(batches((torch.eye(N),), (y,)), loss_func, Net(), MixUp(1., labels=Union(), targets=targets)))

@pytest.mark.parametrize('targets', ['losses', 'average'])
def test_union_whatever_targets_says(targets):
    for loss_func,y in (BCEWithLogitsLossFlat(), BITS), (LabelSmoothingBCE(), BITS), (LabelSmoothingBCE(), IDX), (UNION['own'], BITS):
        torch.manual_seed(0)
        for page in fit(learner(batches((torch.eye(N),), (y,)), loss_func, Net(), MixUp(1., fold=False, labels=Union(), targets=targets))):
            check(page, written_out(y, combine=0.))

@pytest.mark.parametrize('mix', [lambda: SnapMix(labels=Union()), lambda: TransMix(labels=Union()), lambda: MixUp(labels=Union),
    lambda: Union(.5), lambda: Union(-1), lambda: Union('all')])
def test_bad_union(mix):
    with pytest.raises((TypeError, ValueError), match='labels|above'): mix()

def test_union_and_accuracy():
    "Several labels are compared with those of the union"
    learn = learner(batches((torch.eye(N),), (BITS,)), BCEWithLogitsLossFlat(), Net(), MixUp(1., labels=Union()))
    metric,correct = MixedAccuracy(),[]
    class Count(type(learn.witness)):
        order = 50
        def __init__(self): pass
        def before_fit(self): metric.reset()
        def after_loss(self):
            metric.accumulate(self.learn)
            target = ((self.model.M > 0)[:,:,None]*BITS[None]).amax(1)
            correct.append(((self.learn.pred > 0) == target.bool()).float().flatten())
        def after_backward(self): pass
    learn.add_cb(Count())
    fit(learn)
    close(torch.as_tensor(metric.value), torch.cat(correct).mean())

class Accuracies(Callback):
    "The accuracy of a metric over the training batches, and that written out by `right(learn)`: what is right, and what counts"
    order = 50
    def __init__(self, right): self.metric,self.right,self.parts = MixedAccuracy(),right,[]
    def before_fit(self): self.metric.reset()
    def after_loss(self):
        self.metric.accumulate(self.learn)
        self.parts.append([o.sum() for o in self.right(self.learn)])
    def check(self):
        right,count = (sum(o) for o in zip(*self.parts))
        assert self.metric.value == pytest.approx((right/count).item(), abs=1e-5)

@pytest.mark.parametrize('y', [SOME_BITS, SOME_BITS.float()], ids=['integers', 'floats'])
@pytest.mark.parametrize('above', [0, .3])
def test_union_and_accuracy_of_unknown_labels(y, above):
    "What is known of one item only counts by its share, as in the loss"
    known = y != -1
    def right(learn):
        M = learn.model.M
        union = ((M > above)[:,:,None]*(y*known)[None]).amax(1)
        counts = M @ known.to(M.dtype)
        return counts*((learn.pred > 0) == union.bool()),counts
    accuracies = Accuracies(right)
    fit(learner(batches((torch.eye(N),), (y,)), LabelSmoothingBCE(ignore_index=-1), Net(), MixUp(1., labels=Union(above)), [accuracies]))
    accuracies.check()

def test_accuracy_of_maps_with_union():
    "Maps are pasted, by the metric as by the loss"
    maps = torch.randint(2, (N, C, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    x = torch.eye(N)[:,:,None,None].expand(N, N, 6, 6).contiguous()
    def right(learn):
        target = torch.einsum('ijhw,jchw->ichw', learn.model.x, maps)
        return ((learn.pred > 0) == target.bool()).float(),torch.ones_like(target)
    class Maps(nn.Conv2d):
        def forward(self, x):
            self.x = x.detach()
            return super().forward(x)
    accuracies = Accuracies(right)
    learn = Learner(DataLoaders([(x, maps)]*3, []), Maps(N, C, 1), nn.BCEWithLogitsLoss(), lr=0., cbs=[CutMix(labels=Union()), accuracies])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    accuracies.check()

# Errors

@pytest.mark.parametrize('loss_func', [BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits],
    ids=['flat', 'module', 'function'])
def test_class_indices_need_ours(loss_func):
    with pytest.raises(ValueError, match='For class indices use `LabelSmoothingBCE'):
        fit(learner(batches((torch.eye(N),), (IDX,)), loss_func, Net(), MixUp(1.)))

@pytest.mark.parametrize('pred,y,match', [((4, C), (3,), 'need class indices of shape'), ((4, C), (4, C+1), 'need class indices of shape'),
    ((4, 3, C), (4,), 'need class indices of shape'), ((4,), (3,), 'need class indices of shape')])
def test_shapes_that_do_not_fit(pred, y, match):
    with pytest.raises(ValueError, match=match): LabelSmoothingBCE()(torch.randn(pred), torch.zeros(y).long())

@pytest.mark.parametrize('kwargs', [dict(eps=-.1), dict(eps='x'), dict(threshold=1.1), dict(thresh=2), dict(weight=[1.]),
    dict(pos_weight=2.), dict(ignore_index=.5), dict(reduction='sums')], ids=str)
def test_bad_parameters(kwargs):
    with pytest.raises((TypeError, ValueError), match=next(iter(kwargs))): LabelSmoothingBCE(**kwargs)

# In fastai's own words

def as_image(i): return TensorImage(torch.eye(12)[i].view(1, 3, 4).expand(3, 3, 4).contiguous())
@pytest.mark.parametrize('several', [False, True], ids=['one', 'several'])
@pytest.mark.parametrize('thresh', [None, .5])
def test_fastai_shows_and_decodes(several, thresh):
    def label(i): return ['cat']*(i % 2) + ['dog']*(i % 3 == 0) if several else ['cat', 'cow', 'dog'][i % 3]
    block = DataBlock((TransformBlock, MultiCategoryBlock if several else CategoryBlock), get_items=noop, get_x=as_image, get_y=label,
        splitter=RandomSplitter(.5, seed=0))
    dls = block.dataloaders(list(range(12)), bs=4, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, len(dls.vocab)))
    learn = Learner(dls, model, LabelSmoothingBCE(.1, thresh=thresh if several else None), metrics=[] if several else accuracy,
        cbs=MixUp(1., labels=Union() if several else None))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        preds,y = learn.get_preds()
        _,decoded,probs = learn.predict(3)
        learn.show_results(max_n=2)
    close(preds.sum(1).clamp(0, 0), torch.zeros(6))
    assert ((preds >= 0) & (preds <= 1)).all() and probs.shape == (len(dls.vocab),)
    assert torch.equal(decoded, probs > .5 if several else probs.argmax())
