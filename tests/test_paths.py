"The path law by value: a layer holds all that the prediction knows of the inputs, and what is mixed there is all that is mixed."
import random
from functools import partial

import numpy as np
import pytest
import torch
from apps import floats, layer_of, quiet
from fastai.basics import SGD, Callback, CancelBatchException, DataLoaders, Learner, Tensor, nn
from fastai.collab import EmbeddingDotBias
from nets import BS, NETS, Checkpointed, Encoder, blocks, build, ragged, steady, text_classifier, tokens, vectors
from paths import check_path, reset, run, same

from fastai_mixup.all import ManifoldMixUp
from fastai_mixup.layers.cuts import find_cuts
from fastai_mixup.ops import map_leaves

pytestmark = pytest.mark.slow

SMALL = '''resnet18 densenet121 googlenet deeplab unet timm_swin table awd_lstm language encoder lstm packed
    dicts twins tied checkpointed'''.split()

def mix(acts, plan):
    "Each floating tensor of `acts` mixed along the one dimension whose size is that of the batch"
    def mix_one(o, _):
        if not isinstance(o, Tensor) or not o.is_floating_point(): return o
        dim, = [d for d,n in enumerate(o.shape) if n == BS]
        lam = plan.lam.view([-1 if d == dim else 1 for d in range(o.ndim)])
        return lam*o + (1-lam)*o.index_select(dim, plan.index)
    return [map_leaves(mix_one, o) for o in acts]

def check_mixed(model, xb, other, plan, layer, pred):
    "Is `pred` what the rest of the model makes of activations that are mixed at `layer`?"
    if layer == 'input': return same(run(model, mix(xb, plan), model)[0], pred)
    acts = run(model, xb, layer)[1]
    same(run(model, other, layer, mix(acts, plan))[0], pred)

class Watch(Callback):
    "Makes the model steady and keeps how each batch was mixed, and the prediction; nothing is learned"
    order = 9
    def __init__(self): self.pages = []
    def before_batch(self):
        steady(self.model)
        reset(self.model)
    def after_pred(self):
        cb = self.manifold_mix_up
        if self.training: self.pages.append((cb.plan, layer_of(cb), map_leaves(lambda o,_: o.detach(), self.pred)))
    def after_loss(self): raise CancelBatchException

def loss(pred, y): return sum(o.mean() for o in floats(pred))*y.mean()

def learner(model, xb, *cbs, n=1, loss_func=loss, y=None):
    data = [(*xb, torch.arange(float(BS)) if y is None else y)]*n
    dls = DataLoaders(data, data[:1], device='cpu')
    dls.n_inp = len(xb)
    return quiet(Learner(dls, model, loss_func=loss_func, opt_func=SGD, cbs=cbs))

def default_cuts(model, xb):
    learner(model, xb, cb := ManifoldMixUp())
    layers = cb.layers
    return [c for c in cb.found().cuts if c.module in layers]

@pytest.mark.parametrize('name', NETS)
def test_defaults_hold_all_that_the_prediction_knows(name):
    model,xb,other = build(name)
    cuts = default_cuts(model, xb)
    assert cuts
    steady(model)
    for c in cuts: check_path(model, xb, other, c.module)

@pytest.mark.parametrize('name', SMALL)
def test_each_cut_holds_all_that_the_prediction_knows(name):
    model,xb,other = build(name)
    cuts = find_cuts(steady(model), xb, BS)
    assert cuts
    for c in cuts: check_path(model, xb, other, c.module)

@pytest.mark.parametrize('name', NETS)
def test_mixing_at_a_place_is_the_rest_of_the_model_on_mixed_activations(name):
    model,xb,other = build(name)
    cuts = default_cuts(model, xb)
    watch = Watch()
    learn = learner(model, xb, ManifoldMixUp(1., include_input=False), watch, n=8)
    torch.manual_seed(0)
    learn.fit(1)
    steady(model)
    assert {layer for _,layer,_ in watch.pages} == {c.module for c in cuts}
    for page in watch.pages[-3:]: check_mixed(model, xb, other, *page)

class Noisy(nn.Module):
    "Keeps state of all kinds, draws from all random streams, and can fail"
    def __init__(self, fails=False):
        super().__init__()
        self.fails,self.calls,self.seen,self.hidden,self.a,self.norm,self.b = fails,0,{},[None],nn.Linear(8,
            8),nn.BatchNorm1d(8),nn.Linear(8, 3)
        self.register_buffer('last', torch.zeros(8))
        nn.utils.parametrizations.spectral_norm(self.a)
        self.norm.eval()
    def forward(self, x):
        self.calls += 1
        self.seen[self.calls] = x
        self.hidden[0] = x
        self.last = x.detach().mean(0)
        x = self.a(x)*random.random()*float(np.random.rand())*torch.rand(())
        if self.fails: raise ArithmeticError
        return self.b(self.norm(x))

def state(model):
    "All that a forward pass could change"
    own = {f'{n}.{k}': v[:] if isinstance(v, list) else v for n,m in model.named_modules() for k,
        v in vars(m).items() if not isinstance(v, dict)}
    dicts = {f'{n}.{k}': dict(v) for n,m in model.named_modules() for k,v in vars(m).items() if isinstance(v, dict)}
    grads = {n: p.grad for n,p in model.named_parameters()}
    values = {k: v.clone() for k,v in model.state_dict().items()}
    return own,dicts,grads,values,random.getstate(),np.random.get_state(),torch.get_rng_state()

def is_equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)): return len(a) == len(b) and all(map(is_equal, a, b))
    if isinstance(a, (Tensor, np.ndarray)): return a is b or bool((a == b).all())
    return a is b or a == b

STATES = {**{name: partial(build, name) for name in 'resnet18 googlenet unet awd_lstm language table packed checkpointed timm_swin'.split(
    )},
    'noisy': lambda: (Noisy().train(), *vectors()), 'failing': lambda: (Noisy(fails=True).train(), *vectors())}

@pytest.mark.parametrize('name', STATES)
@pytest.mark.parametrize('what', range(7), ids='attributes dicts gradients values python numpy torch'.split())
def test_probe_leaves_no_trace(name, what):
    model,*xb = STATES[name]()
    xb = xb[0] if isinstance(xb[0], tuple) else (xb[0],)
    before = state(model)
    try: find_cuts(model, xb, BS)
    except ArithmeticError: assert name == 'failing'
    assert is_equal(before[what], state(model)[what])

class Masked(Encoder):
    "Its mask is a number that multiplies each layer"
    def forward(self, x, mask):
        h,mask = self.emb(x),mask[...,None].to(torch.float)
        for layer in self.layers.layers: h = layer(h)*mask
        return self.head(h.mean(1))

class Counted(nn.Module):
    "Takes a number that is to stay as it is"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Sequential(*blocks()),nn.Linear(8, 3)
    def forward(self, x, count): return self.head(self.body(x)/count.float()[:,None])

@pytest.mark.parametrize('dtype', [torch.long, torch.float, torch.bool])
def test_masks_are_no_path(dtype):
    mask = (torch.arange(9) < torch.arange(3, 3+BS)[:,None]).to(dtype)
    assert len(default_cuts(Masked(True), (*tokens(), mask))) == 2

@pytest.mark.parametrize('dtype', [torch.long, torch.float])
def test_inputs_that_are_left_out_are_no_path(dtype):
    xb = *vectors(), torch.arange(1, BS+1).to(dtype)
    learn = learner(Counted(), xb, ManifoldMixUp(inputs='x'), Watch())
    learn.fit(1)
    assert len(learn.manifold_mix_up.layers) == 2

class Around(nn.Module):
    "A part of the signal goes past the layers, hidden from the gradient"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c,self.head = (nn.Linear(8, 8) for _ in range(4))
    def forward(self, x): return self.head(self.b(self.a(x).relu()).relu() + self.c(x).detach())

class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Sequential(*blocks()),nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x):
        with torch.no_grad(): x = self.body(x)
        return self.head(x)

@pytest.mark.parametrize('cls', [Around, NoGrad])
@pytest.mark.filterwarnings('ignore:.*mixes at its input only')
def test_paths_without_gradient_count(cls):
    (xb,other),model = (vectors(), vectors()),cls()
    for c in default_cuts(model, xb): check_path(steady(model), xb, other, c.module)

class PastAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 3),nn.Linear(8, 3)
    def forward(self, x): return self.a(x) + self.b(x)

UNCUT = dict(past_all=(PastAll, vectors), collab=(lambda: EmbeddingDotBias(5, 40, 40), partial(tokens, 2)))

@pytest.mark.parametrize('name', UNCUT)
def test_no_cut_means_input_only(name):
    model,xb = (f() for f in UNCUT[name])
    learn = learner(model, xb, ManifoldMixUp(), watch := Watch(), n=5)
    with pytest.warns(UserWarning, match=f'{type(model).__name__} has no hidden layer.* mixes at its input only'): learn.fit(1)
    assert {layer for _,layer,_ in watch.pages} == {'input'} and not learn.manifold_mix_up.layers

@pytest.mark.parametrize('name', UNCUT)
def test_no_cut_and_no_input_is_an_error(name):
    model,xb = (f() for f in UNCUT[name])
    with pytest.raises(ValueError, match='no hidden layer'): learner(model, xb, ManifoldMixUp(include_input=False)).fit(1)

def test_layer_inside_a_residual_branch_is_refused():
    model,xb,_ = build('resnet18')
    with pytest.raises(ValueError, match='would leave part of the signal unmixed'):
        learner(model, xb, ManifoldMixUp(layers='layer1.0.conv1')).fit(1)

def chain(): return nn.Sequential(*blocks(), nn.Linear(8, 3))
def mixed_at(layer): return ManifoldMixUp(layers=layer, include_input=False)

class Later(Callback):
    "Changes the model in the second batch"
    order = 20
    def __init__(self, change): self.change = change
    def before_batch(self):
        if self.training and self.iter == 1: self.change(self.model)

class Repeat(nn.Module):
    "Calls its layer `calls` times, and gives each row `rows` times"
    calls = rows = 1
    def __init__(self):
        super().__init__()
        self.layer,self.head = nn.Linear(8, 8),nn.Linear(8, 3)
    def forward(self, x):
        x = x.repeat(self.rows, 1)
        for _ in range(self.calls): x = self.layer(x)
        return self.head(x)

ONCE = dict(replaced=(lambda m: setattr(m, 'layer', nn.Linear(8, 8)), r'was to be mixed in 1 call\(s\), but 0 came'),
    more_rows=(lambda m: setattr(m, 'rows', 2), 'gave 12 rows for a batch of 6'),
    more_calls=(lambda m: setattr(m, 'calls', 2), r'was to be mixed in 1 call\(s\), but 2 came'))

@pytest.mark.parametrize('name', ONCE)
def test_once_law(name):
    change,message = ONCE[name]
    with pytest.raises(RuntimeError, match=message): learner(Repeat(), vectors(), mixed_at('layer'), Later(change), Watch(), n=3).fit(1)

def compiled_in_place(model):
    model.compile(backend='eager')
    return model

@pytest.mark.parametrize('compiled', [lambda model: torch.compile(model, backend='eager'), compiled_in_place], ids=['wrapped', 'in place'])
def test_compiled_model_is_refused(compiled):
    with pytest.raises(ValueError, match='compiled model'): learner(compiled(chain()), vectors(), ManifoldMixUp()).fit(1)

def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match='DataParallel'): learner(nn.DataParallel(chain()), vectors(), ManifoldMixUp()).fit(1)

@pytest.mark.parametrize('layer', ['0', '1', '1.1', '2.0'])
def test_checkpointing_trains_the_same_weights(layer):
    xb,weights = vectors(),[]
    for on in True, False:
        torch.manual_seed(0)
        model = Checkpointed(*blocks(), nn.Linear(8, 3))
        model.on = on
        learner(model, xb, mixed_at(layer), n=4, loss_func=nn.CrossEntropyLoss(), y=torch.arange(BS)%3).fit(1, .1)
        weights.append(floats(model.state_dict()))
    same(*weights)

class FixedBatch(Encoder):
    "Keeps a hidden state of a fixed number of rows, as the language models of the fastai book do"
    def __init__(self):
        super().__init__(True)
        self.rnn,self.h = nn.GRU(16, 16, batch_first=True),torch.zeros(1, BS, 16)
    def forward(self, x):
        out,h = self.rnn(self.emb(x), self.h)
        self.h = h.detach()
        return self.head(out.mean(1))
    def reset(self): self.h = torch.zeros(1, BS, 16)

class FixedRows(nn.Module):
    "Adds what it has learned of each row"
    def __init__(self):
        super().__init__()
        self.rows,self.body,self.head = nn.Parameter(torch.zeros(BS, 8)),nn.Sequential(*blocks()),nn.Linear(8, 3)
    def forward(self, x): return self.head(self.body(x + self.rows))

@pytest.mark.parametrize('cls,inputs', [(FixedBatch, tokens), (FixedRows, vectors)])
def test_model_of_a_fixed_batch_size(cls, inputs):
    model,xb,other = cls(),inputs(),inputs()
    cuts = default_cuts(model, xb)
    assert cuts
    for c in cuts: check_path(steady(model), xb, other, c.module)

class Strict(nn.Module):
    "Takes numbers from 0 to 1 alone"
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Sequential(*blocks()),nn.Linear(8, 3)
    def forward(self, x):
        if x.min() < 0 or x.max() > 1: raise ValueError('out of range')
        return self.head(self.body(x))

def test_probe_uses_inputs_that_the_model_takes(): assert len(default_cuts(Strict(), (torch.rand(BS, 8),))) == 2

def test_places_hold_for_longer_texts_than_the_first():
    model,(short,),(long,) = text_classifier(),tokens(7),ragged()
    learn = learner(model, (short,), ManifoldMixUp(include_input=False), watch := Watch())
    y = torch.arange(float(BS))
    learn.dls.train = [(short, y)] + [(long, y)]*12
    learn.fit(1)
    assert len(watch.pages) == 13
