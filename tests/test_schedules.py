"What callbacks say of themselves, and what they refuse at once"
import inspect

import pytest
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoaders, Learner, nn
from fastai.callback.schedule import SchedCos

from fastai_mixup.all import *
from fastai_mixup.batch import Batch, Draws, Method
from fastai_mixup.masks import MaskPlan

@pytest.mark.parametrize('cb,text', [
    (MixUp(), 'MixUp(alpha=0.4)'), (MixUp(1, p=.5, pairing=SameClass()), 'MixUp(alpha=1, p=0.5, pairing=SameClass())'),
    (MixUp(SchedCos(1, .1), labels=ReMix()), 'MixUp(alpha=SchedCos(1, 0.1), labels=ReMix(kappa=3, tau=0.5))'), (SmoothMix(), 'SmoothMix()'),
    (ResizeMix(side=(.2, .4), stop=.5), 'ResizeMix(side=(0.2, 0.4), stop=0.5)'), (CutMix(minmax=(.2, .8)), 'CutMix(minmax=(0.2, 0.8))'),
    (ManifoldMixUp(), 'ManifoldMixUp(alpha=0.4)'), (ManifoldMixUp(layers='output'), "ManifoldMixUp(alpha=0.4, layers=['output'])"),
    (ManifoldMixUp(method=CutMix(), include_input=False), 'ManifoldMixUp(include_input=False, method=CutMix(alpha=1))'),
    (RegMixUp(), 'RegMixUp(alpha=10)'), (AlignMixUp(), 'AlignMixUp(alpha=2)'), (SnapMix(), 'SnapMix(alpha=5)'),
    (RandomMix([MixUp(), CutMix()]), 'RandomMix(methods=[MixUp(alpha=0.4), CutMix(alpha=1)])'),
    (RandomMix([MixUp()], [.5], per='item'), "RandomMix(methods=[MixUp(alpha=0.4)], weights=[0.5], per='item')")],
    ids=lambda o: o if isinstance(o, str) else '')
def test_callbacks_say_what_they_are(cb, text): assert repr(cb) == text

@pytest.mark.parametrize('cls', [CutMix, FMix, GridMix, SmoothMix, ResizeMix, PuzzleMix, SnapMix, RandomMix, RegMixUp, ManifoldMixUp,
    AlignMixUp])
def test_signatures_name_all_dials(cls):
    names = inspect.signature(cls.__init__).parameters
    assert {'p', 'inputs', 'start', 'stop', 'pairing', 'generator'} <= set(names) and 'kwargs' not in names

@pytest.mark.parametrize('make,said', [
    (lambda: MixUp(labels=SnapMix()), 'labels must be None or an object such as'),
    (lambda: MixUp(pairing=CutMix()), 'pairing must be None or an object such as'),
    (lambda: SnapMix(labels=ReMix()), 'which weights the labels itself'),
    (lambda: TransMix(labels=ReMix()), 'which weights the labels itself'),
    (lambda: RandomMix([MixUp(), SnapMix()], labels=ReMix()), 'which weights the labels itself'),
    (lambda: RandomMix([CutMix(), ManifoldMixUp()]), 'at 1. Let it hold the choice'),
    (lambda: RandomMix([RandomMix([MixUp()])]), 'each in one way'), (lambda: ReMix(counts={0: 1}), 'counts must be a list'),
    (lambda: ReMix(counts='ab'), 'counts must be a list')])
def test_contradictions_are_refused_at_construction(make, said):
    with pytest.raises((TypeError, ValueError), match=said): make()

def trained(cb, x=torch.eye(6), y=torch.arange(6) % 3, model=None, batches=1):
    torch.manual_seed(0)
    learn = Learner(DataLoaders([(x, y)]*batches, []), model or nn.Linear(6, 3), CrossEntropyLossFlat(), SGD, lr=.1, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

@pytest.mark.parametrize('wrong,said', [(lambda batch: [0]*batch.n, 'must return the index'),
    (lambda batch: torch.arange(batch.n)*1., 'must return the index'),
                                        (lambda batch: torch.arange(batch.n-1), 'must return the index'),
                                        (lambda batch: torch.arange(batch.n)+1, 'must return indices from 0 to 5')])
def test_own_pairings_are_checked(wrong, said):
    with pytest.raises((TypeError, ValueError), match=said): trained(MixUp(pairing=wrong))

@pytest.mark.parametrize('wrong', [lambda batch,plan: .5, lambda batch,plan: torch.ones(5), lambda batch,
    plan: torch.ones(6, dtype=torch.long)])
def test_own_label_rules_are_checked(wrong):
    with pytest.raises(TypeError, match="must return the weight of each item's own label"): trained(MixUp(labels=wrong))

def test_counts_for_other_classes_are_refused():
    with pytest.raises(ValueError, match='one number for each of the 3 classes, got 2'): trained(MixUp(labels=ReMix(counts=[1, 2])))

def test_alignment_is_refused_where_nothing_can_be_aligned():
    pictures,masks = torch.randn(6, 3, 8, 8),torch.randint(3, (6, 8, 8))
    with pytest.raises(ValueError, match='nothing that AlignMixUp could align'): trained(AlignMixUp())
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    with pytest.raises(ValueError, match='which its target of shape .* would not follow'):
        learn = Learner(DataLoaders([(pictures, masks)], []), body, CrossEntropyLossFlat(axis=1), SGD, cbs=AlignMixUp())
        with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_a_choice_of_methods_that_are_off_is_plain_training():
    off,plain = (trained(cb, batches=5).model.weight for cb in (RandomMix([MixUp(0), MixUp(p=0.)], per='item'), None))
    assert torch.equal(off, plain)

class StripeMixMethod(Method):
    def plan(self, batch, perm):
        width = batch.uniform(1, low=.1, high=.5)
        def mask(size):
            own = (torch.arange(size[-1], device=width.device)/size[-1] // width) % 2 == 0
            return own.view(batch.n, *[1]*(len(size)-1), -1).expand(batch.n, *size)
        return MaskPlan(batch, perm, mask)

# (FMix has no generator for noise on meta)
@pytest.mark.parametrize('method', [StripeMixMethod(), *(cls().method for cls in (CutMix, GridMix, SmoothMix))], ids=lambda o: o.name)
def test_masks_are_made_on_the_device_of_the_batch(method):
    plan = method.plan(Batch((), (), 4, 'meta', draws=Draws(torch.Generator().manual_seed(0))), 1)
    assert plan.mask((6, 8)).device.type == 'meta'

def test_a_dose_is_not_searched_where_it_has_no_effect():
    learn = Learner(DataLoaders([(torch.eye(6), torch.arange(6) % 3)], [(torch.eye(6), torch.arange(6) % 3)]), nn.Linear(6, 3),
        CrossEntropyLossFlat(), SGD, cbs=RegMixUp(method=MixUp()))
    with learn.no_bar(), pytest.raises(TypeError, match='takes no alpha'): learn.mix_find([.1, .4], epochs=1, repeats=2, show=False)
