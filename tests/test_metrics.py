"The metrics of mixing against counts by hand, in trainings of every kind"
import copy
from types import SimpleNamespace

import pytest
import torch
from fastai.basics import (
    SGD,
    BCEWithLogitsLossFlat,
    Callback,
    CancelBatchException,
    CrossEntropyLossFlat,
    DataLoaders,
    FocalLossFlat,
    LabelSmoothingCrossEntropyFlat,
    Learner,
    MSELossFlat,
    nn,
)
from fastai.callback.training import GradientAccumulation
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, set_seed
from torch.utils.data import DataLoader, TensorDataset

from fastai_mixup.batch import Plan
from fastai_mixup.callback import MixCallback, MixUp
from fastai_mixup.losses.label_smoothing import LabelSmoothingCE
from fastai_mixup.methods.cutmix import CutMix
from fastai_mixup.methods.fmix import FMix
from fastai_mixup.methods.gridmix import GridMix
from fastai_mixup.methods.manifold_mixup import ManifoldMixUp
from fastai_mixup.methods.random_mix import RandomMix
from fastai_mixup.methods.regmixup import RegMixUp
from fastai_mixup.methods.smoothmix import SmoothMix
from fastai_mixup.pairing import PreviousBatch
from fastai_mixup.tools.metrics import *

N,CLASSES,SIZE = 22,3,(6, 7)


class Net(nn.Module):
    "What `seen` sees are the shares of all items in each item, if the channels of the inputs are one-hot numbers"
    def __init__(self, masks):
        super().__init__()
        self.body,self.seen,self.head,self.masks = nn.Identity(),nn.Identity(),nn.Conv2d(N, CLASSES, 1),masks
    def forward(self, x):
        out = self.head(self.seen(self.body(x)))
        return out if self.masks else out.mean((2, 3))

class ByHand(Callback):
    "Counts each batch item by item, place by place, from what the model saw; `ids` are the items of the batch before mixing"
    order,run_valid = -5,False
    def __init__(self, ignore=-100): self.ignore = ignore
    def before_fit(self): self.hook = self.model.seen.register_forward_hook(lambda m,args,out: setattr(self, 'M', out.detach()))
    def after_fit(self): self.hook.remove()
    def before_train(self): self.hits = self.weight = self.items = self.mixed = self.lam = 0.
    def before_batch(self): self.ids,self.targets = self.x.mean((2, 3)).argmax(1),self.y

    def after_pred(self):
        share,n = self.M[:,self.ids],len(self.M)
        for i in range(n):
            own = share[i,i].mean().item()
            self.items += 1
            self.mixed += own < 1-1e-6
            self.lam += own if own < 1-1e-6 else 0
            for j in range(n): self.count(self.learn.pred[i].argmax(0), share[i,j], self.targets[j])

    def count(self, classes, share, y):
        weight = share if y.ndim and self.by_place else share.mean().expand(y.shape) if y.ndim else share.mean()
        valid = (y != self.ignore).float()
        self.weight += (weight*valid).sum().item()
        self.hits += (weight*valid*(classes == y)).sum().item()

    @property
    def by_place(self): return isinstance(next((cb for cb in self.learn.cbs if isinstance(cb, MixCallback)), None), CutMix)

    @property
    def values(self): return [self.hits/self.weight, self.lam/self.mixed if self.mixed else float('nan'), self.mixed/self.items]

def learner(*cbs, masks=False, bs=8, ignore=None, metrics=None):
    set_seed(0)
    x = torch.eye(N).view(N, N, 1, 1).expand(N, N, *SIZE).contiguous()
    y = torch.randint(CLASSES, (N, *SIZE) if masks else (N,))
    if ignore is not None: y[::3] = ignore
    dl = DataLoader(TensorDataset(x, y), bs, shuffle=True)
    ignored = -100 if ignore is None else ignore
    metrics = metrics or [MixedAccuracy(axis=1 if masks else -1, ignore_index=ignored), MeanLam(), MixedShare()]
    loss_func = nn.CrossEntropyLoss(ignore_index=ignored)
    learn = Learner(DataLoaders(dl, dl, device='cpu'), Net(masks), loss_func, SGD, lr=5., metrics=metrics, cbs=[ByHand(ignored), *cbs])
    learn.recorder.train_metrics = True
    return learn

def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)
    return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))

def check(learn, fits=2):
    "Do the columns of the last epoch hold what was counted by hand?"
    for _ in range(fits):
        row = fit(learn)
        assert [row[f'train_{o}'] for o in ('mixed_accuracy', 'lam', 'mixed')] == pytest.approx(learn.by_hand.values, abs=1e-5, nan_ok=True)
    return row


KINDS = dict(
    plain=lambda: [], mixup=lambda: [MixUp(1.)], unfolded=lambda: [MixUp(1., fold=False)], half=lambda: [MixUp(1., p=.5)],
    cutmix=lambda: [CutMix()],
    fmix=lambda: [FMix()], gridmix=lambda: [GridMix()], smoothmix=lambda: [SmoothMix()],
    batchwise=lambda: [RandomMix([MixUp(1.), CutMix()])], itemwise=lambda: [RandomMix([MixUp(1.), CutMix()], [.4, .4], per='item')],
    hidden=lambda: [ManifoldMixUp(1., layers='body')],
    accumulated=lambda: [MixUp(1.), GradientAccumulation(20)], accumulated_cutmix=lambda: [CutMix(), GradientAccumulation(11)])

@pytest.mark.parametrize('bs', [8, 5, 22, 7, 1])
@pytest.mark.parametrize('kind', KINDS)
def test_columns_are_those_by_hand(kind, bs): check(learner(*KINDS[kind](), bs=bs))

@pytest.mark.parametrize('ignore', [None, 1, -100])
@pytest.mark.parametrize('kind', ['plain', 'mixup', 'cutmix', 'accumulated_cutmix', 'hidden'])
def test_masks(kind, ignore): check(learner(*KINDS[kind](), masks=True, ignore=ignore))

@pytest.mark.parametrize('kind', ['plain', 'mixup', 'cutmix', 'itemwise'])
def test_ignored_classes(kind): check(learner(*KINDS[kind](), ignore=1))

def test_pasted_masks_have_one_class_at_each_place():
    "CutMix in numbers that can be read: what the plan pastes is what is compared"
    learn,pasted = learner(CutMix(), masks=True, metrics=MixedAccuracy(axis=1)),[]
    class Paste(Callback):
        run_valid = False
        def after_batch(self):
            y = self.learn.cut_mix.plan.paste(self.y)
            pasted.append((self.learn.pred.argmax(1) == y).float().sum())
    learn.add_cb(Paste())
    assert fit(learn)['train_mixed_accuracy'] == pytest.approx(sum(pasted).item()/(N*SIZE[0]*SIZE[1]), abs=1e-6)

@pytest.mark.parametrize('kind', KINDS)
def test_validation_is_plain(kind):
    learn = learner(*KINDS[kind](), metrics=[accuracy, MixedAccuracy(), MeanLam(), MixedShare()])
    row = fit(learn)
    assert row['valid_mixed_accuracy'] == pytest.approx(row['valid_accuracy'], abs=1e-6)
    assert row['valid_mixed'] == 0 and row['valid_lam'] != row['valid_lam']
    assert list(learn.validate())[2] == pytest.approx(row['valid_mixed_accuracy'], abs=1e-6)

def test_without_mixing_all_is_plain():
    row = fit(learner(metrics=[accuracy, MixedAccuracy(), MeanLam(), MixedShare()]))
    assert row['train_mixed_accuracy'] == pytest.approx(row['train_accuracy'], abs=1e-6)
    assert row['train_mixed'] == 0 and row['train_lam'] != row['train_lam']

@pytest.mark.parametrize('order', [-20, 9, 50, 1000])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix', 'hidden', 'accumulated'])
def test_the_order_of_the_recorder_does_not_matter(kind, order):
    learn = learner(*KINDS[kind]())
    learn.recorder.order = order
    check(learn, fits=1)

def test_a_batch_cancelled_after_its_predictions_counts_as_mixed():
    class Cancel(Callback):
        run_valid = False
        def before_backward(self): raise CancelBatchException
    check(learner(MixUp(1.), Cancel()))

def test_each_epoch_counts_for_itself():
    learn = learner(MixUp(1., stop=1))
    rows = []
    class Keep(Callback):
        def after_epoch(self): rows.append(dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1])))
    learn.recorder.order = -1
    learn.add_cb(Keep())
    fit(learn, 2)
    assert [row['train_mixed'] for row in rows] == [1., 0.] and rows[1]['train_lam'] != rows[1]['train_lam']


class Batch:
    "What a metric looks at in a Learner"
    def __init__(self, pred, y, plan=None, training=True):
        self.cbs,self.pred,self.y,self.yb,self.training,self.loss_func = [],pred,y,(y,),training,nn.CrossEntropyLoss()
        if plan is not None:
            self.cbs.append(MixUp())
            self.cbs[0].running = SimpleNamespace(plan=plan)

class Reweighted(Plan):
    "Labels that weigh otherwise than the items, and not 1 in sum"
    @property
    def label_weights(self): return 2*self.lam**2,2*(1-self.lam)

def test_weights_of_labels_are_those_of_the_plan():
    metric,y,lam = MixedAccuracy(),torch.tensor([0, 1]),torch.tensor([.9, .5])
    metric.accumulate(Batch(torch.eye(2), y, Reweighted(lam, 1)))
    assert metric.value == pytest.approx((.81/(.81+.1) + .25/(.25+.5))/2)

def test_a_plan_that_was_left_means_nothing_in_validation():
    values = []
    for metric in MixedAccuracy(), MixedShare():
        metric.accumulate(Batch(torch.eye(3), torch.arange(3), Plan(torch.tensor([.9, .8, .7]), 1), training=False))
        values.append(metric.value)
    assert values == [1., 0.]

def test_targets_as_they_come():
    pred,plan = torch.eye(3),Plan(torch.tensor([.9, .8, .7]), 1)
    for y in torch.arange(3), torch.arange(3)[:,None], TensorCategory(torch.arange(3)), torch.arange(3, dtype=torch.uint8):
        metric = MixedAccuracy()
        metric.accumulate(Batch(pred.half(), y, plan))
        assert metric.value == pytest.approx(.8)

def test_words_one_by_one():
    "Targets with places that the plan does not know are weighted by item"
    metric,plan,y = MixedAccuracy(),Plan(torch.tensor([.9, .6]), 1),torch.tensor([[0, 1, 2], [0, 2, 2]])
    metric.accumulate(Batch(torch.eye(3)[y], y, plan))
    assert metric.value == pytest.approx((1+.9+1+1+.6+1)/6)

@pytest.mark.parametrize('plan', [None, Plan(torch.ones(4, device='meta')*.7, 2)], ids=['plain', 'mixed'])
@pytest.mark.parametrize('metric', [MixedAccuracy, MeanLam, MixedShare, ExpectedCalibrationError])
def test_batches_are_not_read(metric, plan):
    "There is nothing to read on the meta device"
    metric,batch = metric(),Batch(torch.randn(4, 3, device='meta'), torch.zeros(4, dtype=torch.long, device='meta'), plan)
    for _ in range(3): metric.accumulate(batch)

def test_names_and_copies():
    assert [o().name for o in (MixedAccuracy, ExpectedCalibrationError, MeanLam, MixedShare)] == ['mixed_accuracy', 'ece', 'lam', 'mixed']
    metric = MixedAccuracy()
    metric.accumulate(Batch(torch.eye(2), torch.tensor([0, 0])))
    assert copy.deepcopy(metric).value == .5
    metric.reset()
    assert metric.value != metric.value

@pytest.mark.parametrize('y, pred, kwargs, error, said', [
    (torch.rand(2), torch.eye(2), {}, TypeError, 'needs class indices as targets.*got torch.float32'),
    (torch.zeros(2).long(), (torch.eye(2),), {}, TypeError, 'needs one tensor as prediction, got a tuple'),
    ((torch.zeros(2).long(),)*2, torch.eye(2), {}, TypeError, 'needs one tensor as target, got a tuple'),
    (torch.zeros(2, 4, 4).long(), torch.rand(2, 3, 4, 4), {}, ValueError, 'classes of masks are often at axis=1'),
    (torch.zeros(2).long(), torch.eye(2), dict(axis=-3), ValueError, 'axis must be one of the 2 dimensions')])
def test_errors(y, pred, kwargs, error, said):
    with pytest.raises(error, match=said): MixedAccuracy(**kwargs).accumulate(Batch(pred, y))

def test_regmixup_shows_clean_predictions():
    torch.manual_seed(0)
    x,y = torch.eye(6),torch.arange(6) % 3
    learn = Learner(DataLoaders([(x, y)], []), nn.Linear(6, 3), CrossEntropyLossFlat(), SGD, metrics=MixedAccuracy(), cbs=RegMixUp())
    learn.recorder.train_metrics = True
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    assert learn.recorder.values[0][1] == pytest.approx((learn.model(x).argmax(1) == y).float().mean().item())

# One logit, several labels, and masks: what the model saw is how much of each label there was

TARGETS = dict(one=(1,), several=(4,), masks=SIZE, masks_with_channel=(1, *SIZE), masks_of_several=(2, *SIZE))
MIXES = dict(plain=lambda: [], mixup=lambda: [MixUp(1.)], cutmix=lambda: [CutMix()], fmix=lambda: [FMix(soft=.5)],
    smooth=lambda: [SmoothMix()], previous=lambda: [MixUp(1., pairing=PreviousBatch())],
    cut_previous=lambda: [CutMix(pairing=PreviousBatch())], itemwise=lambda: [RandomMix([MixUp(1.), CutMix()], per='item')],
    hidden=lambda: [ManifoldMixUp(1., layers='body')], average=lambda: [CutMix(targets='average')])
LOGITS = dict(torch=nn.BCEWithLogitsLoss, fastai=BCEWithLogitsLossFlat, soft=nn.MultiLabelSoftMarginLoss, probabilities=nn.BCELoss)

class LabelNet(nn.Module):
    "A logit, or a probability, for each label of an item, or of each of its pixels"
    def __init__(self, shape, probabilities=False):
        super().__init__()
        self.shape,self.probabilities = shape,probabilities
        self.body,self.seen = nn.Identity(),nn.Identity()
        self.head = nn.Conv2d(N, shape[0] if len(shape) != 2 else 1, 1)
    def forward(self, x):
        out = self.head(self.seen(self.body(x)))
        out = out.mean((2, 3)) if len(self.shape) == 1 else out.view(-1, *self.shape)
        return out.sigmoid() if self.probabilities else out

class Shares(Callback):
    "How much of label 1 there is in each target of each batch, and what is predicted with which probability"
    order,run_valid = 30,False
    def __init__(self, y, by_item): self.targets,self.by_item = y,by_item
    def before_fit(self):
        self.parts = []
        self.hook = self.model.seen.register_forward_hook(lambda m,args,out: setattr(self, 'M', out.detach()))
    def after_fit(self): self.hook.remove()
    def after_pred(self):
        y,share = self.targets,self.M
        if y.ndim == 2 or self.by_item: share = share.mean((2, 3), keepdim=True)
        if y.ndim < 4: t = (share*y.view(N, *SIZE)).sum(1) if y.ndim == 3 else share.flatten(1) @ y
        else: t = torch.einsum('njhw,jchw->nchw', share.expand(-1, -1, *SIZE), y)
        pred = self.learn.pred.detach()
        self.parts.append((t, pred if self.model.probabilities else pred.sigmoid()))

def labels_fit(loss, target, cbs, by_item=False):
    set_seed(0)
    shape = TARGETS[target]
    x,y = torch.eye(N).view(N, N, 1, 1).expand(N, N, *SIZE).contiguous(),torch.randint(2, (N, *shape)).float()
    dl = DataLoader(TensorDataset(x, y), 8, shuffle=True)
    metrics = [MixedAccuracy(axis=1), ExpectedCalibrationError(n_bins=7, axis=1), MixedAccuracy(axis=1, thresh=.45)]
    model = LabelNet(shape, loss == 'probabilities')
    learn = Learner(DataLoaders(dl, dl, device='cpu'), model, LOGITS[loss](), SGD, lr=2., metrics=metrics, cbs=[*cbs, Shares(y, by_item)])
    learn.recorder.train_metrics = True
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    found = learn.recorder.values[-1][1:4]
    t,p = (torch.cat([o[i].flatten() for o in learn.shares.parts[-3:]]) for i in (0, 1))
    return found,t,p

def error_by_hand(right, confidence, weight, n_bins):
    "Bin by bin, in double precision"
    right,confidence,weight = (torch.as_tensor(o).flatten().double().numpy() for o in (right, confidence, weight))
    total = 0.
    for b in range(n_bins):
        here = (confidence >= b/n_bins) & ((confidence < (b+1)/n_bins) | (b == n_bins-1))
        total += abs((weight*(right-confidence))[here].sum())
    return total/weight.sum()

@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('loss,target', [*[(loss, 'several') for loss in LOGITS], *[('fastai', target) for target in TARGETS]])
def test_labels_on_their_own(loss, target, mix):
    found,t,p = labels_fit(loss, target, MIXES[mix](), by_item=mix == 'average')
    for value,thresh in (found[0], .5), (found[2], .45):
        assert value == pytest.approx((t*(p >= thresh) + (1-t)*(p < thresh)).mean().item(), abs=1e-5)
    assert found[1] == pytest.approx(error_by_hand(t, p, torch.ones_like(t), 7), abs=1e-5)

# Calibration

LOSSES = dict(torch=(nn.CrossEntropyLoss(), lambda p: p.log()), fastai=(CrossEntropyLossFlat(), lambda p: p.log()+3),
    smoothed=(LabelSmoothingCE(), lambda p: p.log()), fastai_smoothed=(LabelSmoothingCrossEntropyFlat(), lambda p: p.log()),
    focal=(FocalLossFlat(), lambda p: p.log()), nll=(nn.NLLLoss(), lambda p: p.log()),
    function=(torch.nn.functional.cross_entropy, lambda p: p.log()))

def calibration(pred, y, loss_func=None, sizes=None, **kwargs):
    metric = ExpectedCalibrationError(**kwargs)
    for p,t in zip(pred.split(sizes or len(pred)), y.split(sizes or len(y))):
        batch = Batch(p, t)
        batch.loss_func = loss_func or nn.CrossEntropyLoss()
        metric.accumulate(batch)
    return metric.value

@pytest.mark.parametrize('n_bins', [1, 10, 15, 1000])
@pytest.mark.parametrize('loss', LOSSES)
def test_calibration_by_hand(loss, n_bins):
    torch.manual_seed(0)
    loss_func,logits = LOSSES[loss]
    p,y = (torch.randn(500, 5)*3).softmax(1),torch.randint(5, (500,))
    confidence,said = p.max(1)
    want = error_by_hand(said == y, confidence, torch.ones(500), n_bins)
    for sizes in None, 1, 99: assert calibration(logits(p), y, loss_func, sizes, n_bins=n_bins) == pytest.approx(want, abs=2e-5)

def test_calibration_of_another_library():
    classification = pytest.importorskip('torchmetrics.functional.classification')
    torch.manual_seed(0)
    for p,y in [(torch.randn(900, 4).softmax(1), torch.randint(4, (900,))), ((torch.randn(900, 4)*4).softmax(1), torch.randint(4, (900,)))]:
        for n_bins in 10, 15:
            want = classification.multiclass_calibration_error(p, y, num_classes=4, n_bins=n_bins).item()
            assert calibration(p.log(), y, n_bins=n_bins) == pytest.approx(want, abs=1e-5)
            want = classification.binary_calibration_error(p[:,0], y % 2, n_bins=n_bins).item()
            assert calibration(p[:,0].logit(), (y % 2).float(), nn.BCEWithLogitsLoss(), n_bins=n_bins) == pytest.approx(want, abs=1e-5)
    masks = torch.randn(3, 4, 6, 7).softmax(1),torch.randint(4, (3, 6, 7))
    want = classification.multiclass_calibration_error(*masks, num_classes=4, n_bins=15, ignore_index=2).item()
    assert calibration(masks[0].log(), masks[1], axis=1, ignore_index=2) == pytest.approx(want, abs=1e-5)

@pytest.mark.parametrize('kind', ['mixup', 'cutmix', 'itemwise', 'hidden', 'half'])
def test_calibration_of_mixed_batches(kind):
    "Both labels of an item count by their weights"
    class Parts(Callback):
        order,run_valid = 31,False
        def before_train(self): self.parts = []
        def after_pred(self):
            M,p = self.learn.by_hand.M.flatten(2).mean(2)[:,self.learn.by_hand.ids],self.pred.detach().softmax(1)
            self.parts.append(((M*(p.argmax(1)[:,None] == self.learn.y)).sum(1), p.amax(1)))
    learn = learner(*KINDS[kind](), metrics=[ExpectedCalibrationError(n_bins=5)])
    learn.add_cb(Parts())
    row = fit(learn)
    right,confidence = (torch.cat(o) for o in zip(*learn.parts.parts))
    assert row['train_ece'] == pytest.approx(error_by_hand(right, confidence, torch.ones(N), 5), abs=1e-5)
    learn.remove_cbs(learn.cbs.filter(lambda cb: isinstance(cb, MixCallback)))
    assert learn.validate()[1] == pytest.approx(row['valid_ece'], abs=1e-6)

def test_calibration_at_the_edges():
    y = torch.tensor([0, 0])
    assert calibration(torch.tensor([[100., 0.], [100., 0.]]), y) == 0 # sure, and right: the last bin has its upper edge
    assert calibration(torch.tensor([[100., 0.], [100., 0.]]), 1-y) == 1
    assert calibration(torch.tensor([[100., 0.], [100., 0.]]), torch.tensor([-100, 0])) == 0
    for empty in calibration(torch.tensor([[1., 0.]]), torch.tensor([-100])), ExpectedCalibrationError().value: assert empty != empty
    assert calibration(torch.full((2, 2), torch.nan), y) != 0 # no error, and nothing that looks like one that is small
    half = calibration(torch.tensor([[2., 0.], [0., 1.]], dtype=torch.bfloat16), y)
    assert half == pytest.approx(calibration(torch.tensor([[2., 0.], [0., 1.]]), y), abs=1e-6)

@pytest.mark.slow
def test_calibration_counts_many_pixels():
    "More than a float can count one by one"
    metric,n = ExpectedCalibrationError(n_bins=1, axis=1),3000
    batch = Batch(torch.tensor([1.1, -1.1]).view(1, 2, 1, 1).expand(4, 2, n, n), torch.zeros(4, n, n, dtype=torch.long))
    metric.accumulate(batch)
    assert metric.sums[2].item() == 4*n*n

@pytest.mark.parametrize('loss_func', [nn.MultiMarginLoss(), MSELossFlat(), lambda p,y: p.sum()], ids=['margin', 'mse', 'own'])
def test_calibration_needs_probabilities(loss_func):
    with pytest.raises(TypeError, match='ExpectedCalibrationError cannot know how the predictions.*method `activation`'):
        calibration(torch.randn(4, 3), torch.zeros(4).long(), loss_func)
    class Own:
        def __call__(self, p, y): return loss_func(p, y)
        def activation(self, x): return x.softmax(-1)
    y = torch.zeros(4).long()
    assert calibration(torch.eye(4), y, Own()) == pytest.approx(calibration(torch.eye(4), y), abs=1e-6)
