"Models of other libraries, as compatibility/check.py checks them; and that check itself, which must find what is wrong."
import sys
from copy import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import Callback, nn

sys.path.insert(0, str(Path(__file__).parent.parent/'compatibility'))
import check as zoo

from fastai_mixup.all import ManifoldMixUp, MixUp
from fastai_mixup.batch import Method
from fastai_mixup.callback import MixCallback
from fastai_mixup.layers.cuts import Cut
from fastai_mixup.layers.hidden import RandomLayer
from models import ZOO, Entry, floats

pytestmark = pytest.mark.slow

CHOICE = {'timm': ['eva02_tiny_patch14_224', 'deit_tiny_distilled_patch16_224', 'mobilenetv3_small_050'],
    'torchvision': ['lraspp_mobilenet_v3_large', 'shufflenet_v2_x0_5'],
    'transformers': ['BertForSequenceClassification, ModelOutput', 'BertForTokenClassification',
    *(f'{kind}ForSequenceClassification' for kind in 'DistilBert Roberta Albert GPT2 T5 Bart Llama Wav2Vec2'.split()),
                     'SegformerForSemanticSegmentation', 'WhisperForAudioClassification'],
    'tsai': ['InceptionTimePlus, ts_learner', 'TST, ts_learner'], 'fastMONAI': ['MedImage, monai resnet10'],
    'fasterai': ['resnet18, SparsifyCallback']}
FOUND = {(e.library, e.name): e for e in ZOO}

@pytest.mark.parametrize('cb', zoo.CALLBACKS)
@pytest.mark.parametrize('library,name', [(library, name) for library,names in CHOICE.items() for name in names])
def test_model_is_checked(library, name, cb):
    pytest.importorskip(library)
    said,layers = zoo.outcome(FOUND[library,name], zoo.CALLBACKS[cb])
    assert said == 'checked' and (cb == 'MixUp' or layers)

def test_names_are_unique(): assert len(FOUND) == len(ZOO)

def block(): return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = block(),block(),nn.Linear(8, 4)
    def forward(self, x):
        x = self.a(x)
        return self.head(x + self.b(x))

SMALL = Entry('small', 'fastai_mixup', Residual, floats(8))

class Stub(Callback):
    "Mixes as fastai does, `lam` of the item itself, or three items; the loss says `said`"
    order,run_valid = 8,False
    def __init__(self, lam, said, three=False): self.lam,self.said,self.three,self.plan = lam,said,three,True
    def before_batch(self):
        other = self.x.roll(1, 0)
        self.learn.xb = torch.lerp(other, self.x, self.lam) + self.three*(self.x.roll(2, 0)-other)/9,
    def after_loss(self):
        own,partner = (F.cross_entropy(self.pred, y) for y in (self.y, self.y.roll(1, 0)))
        self.learn.loss_grad = torch.lerp(partner, own, self.said)
        self.learn.loss = self.learn.loss_grad.clone()

class Elsewhere(ManifoldMixUp):
    "Mixes hidden layers by other shares than it says"
    class make_layer(RandomLayer):
        def change(self, plan):
            plan = copy(plan)
            plan.lam = 1 - (1-plan.lam)/2
            return plan

class InsideBranch(ManifoldMixUp):
    "Mixes a layer that a part of the signal goes past"
    class make_layer(RandomLayer):
        def find(self, cb, learn, xb, n):
            self.branch = learn.model.b
            super().find(cb, learn, xb, n)
        def choose(self, cuts, holds): return [Cut('b', self.branch, [{(): 0}], ('bs', 8), .5)]

class Crashes(Method):
    def plan(self, batch, perm): raise ZeroDivisionError('of its own')

class Mixes(Method):
    def plan(self, batch, perm): return None

WRONG = dict(loss=(lambda: Stub(.7, .6), 'not close'), three=(lambda: Stub(.7, .7, three=True), 'no row is the average of two'),
    partner=(lambda: Stub(.2, .2), 'shares outside'),
    unmixed_input=(lambda: Stub(1., .7), 'not close'), hidden=(Elsewhere, 'not close'),
    path=(InsideBranch, 'depends on inputs past the layer'), crash=(lambda: MixCallback(Crashes()), 'ZeroDivisionError'),
    never=(lambda: MixCallback(Mixes()), 'not all layers were mixed'))

@pytest.mark.parametrize('name', WRONG)
def test_what_is_wrong_is_found(name):
    make,message = WRONG[name]
    said,_ = zoo.outcome(SMALL, make)
    assert said.startswith('WRONG') and message in said

@pytest.mark.parametrize('make', [lambda: Stub(.7, .7), MixUp, ManifoldMixUp], ids=['stub', 'MixUp', 'ManifoldMixUp'])
def test_what_is_right_is_said_so(make): assert zoo.outcome(SMALL, make)[0] == 'checked'

def test_refusals_are_told_from_crashes():
    wrapped = Entry('wrapped', 'fastai_mixup', lambda: nn.DataParallel(Residual()), floats(8))
    said,_ = zoo.outcome(wrapped, ManifoldMixUp)
    assert said.startswith('ValueError: ManifoldMixUp cannot mix in a DataParallel model')

def test_model_that_fails_anyway_is_said_so():
    row = zoo.row(Entry('broken', 'torch', lambda: nn.Linear(3, 4), floats(8)))
    assert row['MixUp'].startswith('does not train without mixing either: RuntimeError')

def test_rows_of_other_models_are_kept(tmp_path):
    first,second = (dict.fromkeys(zoo.COLUMNS, 'old') | dict(library=e.library, model=e.name) for e in ZOO[:2])
    path = tmp_path/'results'/'models.csv'
    zoo.save([second], path)
    zoo.save([first, first | dict(MixUp='new')], path)
    assert [(r['model'], r['MixUp']) for r in zoo.load(path)] == [(ZOO[0].name, 'new'), (ZOO[1].name, 'old')]
