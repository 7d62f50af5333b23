"The path law by value: a place holds all that the prediction knows of the inputs, and what is mixed there is all that is mixed."
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.models as tv
from fastai.basics import Callback, CancelBatchException, DataLoaders, Learner, SGD, Tensor, nn
from fastai.collab import EmbeddingDotBias, EmbeddingNN
from fastai.tabular.all import TabularModel
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, get_language_model, get_text_classifier
from fastai.text.models.awdlstm import EmbeddingDropout, WeightDropout
from fastai.vision.all import DynamicUnet, create_body, xresnet18
from torch.utils.checkpoint import checkpoint

from apps import close, floats, quiet
from fastai_mixup.all import ManifoldMixUp
from fastai_mixup.core import leaves, map_leaves
from fastai_mixup.cuts import find_cuts

BS = 6
def images(size=64): return torch.randn(BS, 3, size, size),
def tokens(n=9): return torch.randint(2, 40, (BS, n)),
def vectors(n=8): return torch.randn(BS, n),

def classifier(arch, **kwargs): return arch(weights=None, num_classes=4, **kwargs)

class Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.batch_first,self.emb,self.head = batch_first,nn.Embedding(40, 16),nn.Linear(16, 3)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0., batch_first=batch_first), 3, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.layers(self.emb(x if self.batch_first else x.T)).mean(int(self.batch_first)))

class Recurrent(nn.Module):
    "What it says depends on the outputs and on the hidden state"
    def __init__(self, cls):
        super().__init__()
        self.emb,self.rnn,self.head = nn.Embedding(40, 16),cls(16, 12, 2),nn.Linear(24, 3)
    def forward(self, x):
        out,h = self.rnn(self.emb(x).transpose(0, 1))
        return self.head(torch.cat([out.mean(0), (h[0] if isinstance(h, tuple) else h)[0]], 1))

class Packed(Recurrent):
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.emb(x), torch.arange(len(x))+2, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0].transpose(0, 1).flatten(1))

class AsDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 8)
    def forward(self, x): return dict(twice=[self.a(x), self.b(x)], mask=x[:,0] > -9, n=3)

class DictNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.block,self.head = AsDict(),nn.Linear(8, 3)
    def forward(self, x):
        o = self.block(x)
        return self.head((o['twice'][0]*o['twice'][1]).where(o['mask'][:,None], 0)/o['n'])

class Twins(nn.Module):
    "One encoder called twice, each on half of the input"
    def __init__(self):
        super().__init__()
        self.encoder,self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)),nn.Linear(10, 3)
    def forward(self, x): return self.head(torch.cat([self.encoder(x[:,:4]), self.encoder(x[:,4:]).relu_()], 1))

class Tied(nn.Module):
    "One activation and one layer that come again and again, in place, and the output tied to the embedding"
    def __init__(self):
        super().__init__()
        self.emb,self.a,self.again,self.act,self.out = nn.Embedding(40, 8),nn.Linear(8, 8),nn.Linear(8, 8),nn.ReLU(inplace=True),nn.Linear(8, 40)
        self.out.weight = self.emb.weight
    def forward(self, x):
        x = self.act(self.a(self.emb(x)))
        for _ in range(2): x = self.act(self.again(x)).add_(x)
        return self.out(x)

class Checkpointed(nn.Sequential):
    on = True
    def forward(self, x):
        for block in self[:-1]: x = checkpoint(block, x, use_reentrant=False) if self.on and self.training else block(x)
        return self[-1](x)

def blocks(): return [nn.Sequential(nn.Linear(8, 8), nn.Dropout(.3), nn.ReLU(inplace=True), nn.Linear(8, 8)) for _ in range(3)]
def frozen(model):
    for p in list(model.parameters())[:-2]: p.requires_grad_(False)
    return model
def text_classifier():
    return get_text_classifier(AWD_LSTM, 40, 3, seq_len=8, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2})
def ragged():
    x, = tokens(20)
    for i,n in (2, 8), (3, 8), (5, 16): x[i,:n] = 1
    return x[[0, 1, 4, 2, 3, 5]],
def language_model(): return get_language_model(AWD_LSTM, 40, config={**awd_lstm_lm_config, 'emb_sz': 8, 'n_hid': 10, 'n_layers': 2})
def timm_model(name, **kwargs): return pytest.importorskip('timm').create_model(name, num_classes=4, **kwargs)

NETS = dict(
    resnet18=(partial(classifier, tv.resnet18), images), xresnet18=(partial(xresnet18, n_out=4), images), densenet121=(partial(classifier, tv.densenet121), images),
    vit_b_16=(partial(classifier, tv.vit_b_16, image_size=32), partial(images, 32)), convnext_tiny=(partial(classifier, tv.convnext_tiny), images),
    efficientnet_b0=(partial(classifier, tv.efficientnet_b0), images),
    googlenet=(partial(classifier, tv.googlenet, aux_logits=True, init_weights=False), images),
    deeplab=(partial(tv.segmentation.deeplabv3_mobilenet_v3_large, weights=None, weights_backbone=None, num_classes=4, aux_loss=True), images),
    unet=(lambda: DynamicUnet(create_body(tv.resnet18(), pretrained=False), 3, (64, 64)), images),
    timm_vit=(partial(timm_model, 'vit_tiny_patch16_224', img_size=64), images),
    timm_swin=(partial(timm_model, 'swin_tiny_patch4_window7_224', img_size=64, window_size=2, embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 2)), images),
    timm_mixer=(partial(timm_model, 'mixer_s32_224'), partial(images, 224)), timm_convnext=(partial(timm_model, 'convnext_atto'), images),
    table=(lambda: TabularModel([(40, 4), (40, 3)], 8, 2, [20, 10]), lambda: (*tokens(2), *vectors())),
    table_cat=(lambda: TabularModel([(40, 4), (40, 3)], 0, 2, [20, 10]), lambda: (*tokens(2), torch.empty(BS, 0))),
    collab_nn=(lambda: EmbeddingNN([(40, 5), (40, 4)], [20]), partial(tokens, 2)),
    awd_lstm=(text_classifier, ragged), awd_lstm_short=(text_classifier, partial(tokens, 7)), language=(language_model, tokens),
    encoder=(partial(Encoder, True), tokens), encoder_steps_first=(partial(Encoder, False), tokens),
    gru=(partial(Recurrent, nn.GRU), tokens), lstm=(partial(Recurrent, nn.LSTM), tokens), packed=(partial(Packed, nn.LSTM), tokens),
    dicts=(DictNet, vectors), twins=(Twins, vectors), tied=(Tied, tokens), checkpointed=(lambda: Checkpointed(*blocks(), nn.Linear(8, 3)), vectors),
    frozen=(lambda: frozen(classifier(tv.resnet18)), images), frozen_table=(lambda: frozen(TabularModel([(40, 4)], 8, 2, [20, 10])), lambda: (*tokens(1), *vectors())))
SMALL = 'resnet18 densenet121 googlenet deeplab unet timm_swin table awd_lstm language encoder lstm packed dicts twins tied checkpointed'.split()

def steady(model):
    "Training mode, in which batch norm and dropout do nothing that depends on other items or on chance"
    model.train()
    for m in model.modules():
        if not any(m.children()) or isinstance(m, (EmbeddingDropout, WeightDropout)): m.eval()
    return model

def build(name):
    torch.manual_seed(0)
    net,inputs = NETS[name]
    model,xb = net(),inputs()
    for p in model.parameters():
        if p.ndim > 1 and not p.any(): nn.init.normal_(p)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms: m.momentum = 1.
    if norms:
        with torch.no_grad(): model.train()(*xb)
    return model,xb,inputs()

def reset(model): getattr(model, 'reset', lambda: None)()

def run(model, xb, layer, to=None):
    "The prediction, and what each call of `layer` returned; with `to`, each call returns the next of these instead"
    given,seen = iter(to or []),[]
    def hook(m, args, out):
        seen.append(map_leaves(lambda o,_: o.detach().clone() if isinstance(o, Tensor) else o, out))
        return next(given) if to else None
    handle = layer.register_forward_hook(hook)
    reset(model)
    with torch.no_grad(): pred = model(*xb)
    handle.remove()
    return pred,seen

def same(a, b):
    a,b = floats(a),floats(b)
    assert a
    for o,p in zip(a, b, strict=True): close(o, p, 1e-3)

def check_path(model, xb, other, layer):
    "What `layer` returned for `xb` decides the prediction, whatever the inputs are"
    pred,acts = run(model, xb, layer)
    same(run(model, other, layer, acts)[0], pred)
    away,_ = run(model, other, layer)
    assert not torch.allclose(floats(pred)[0], floats(away)[0], atol=1e-5)

def mix(acts, plan):
    "Each floating tensor of `acts` mixed along the one dimension whose size is that of the batch"
    def mix_one(o, _):
        if not isinstance(o, Tensor) or not o.is_floating_point(): return o
        dim, = [d for d,n in enumerate(o.shape) if n == BS]
        lam = plan.lam.view([-1 if d == dim else 1 for d in range(o.ndim)])
        return lam*o + (1-lam)*o.index_select(dim, plan.index)
    return [map_leaves(mix_one, o) for o in acts]

class Watch(Callback):
    "Makes the model steady and keeps how each batch was mixed, and the prediction; nothing is learned"
    order = 9
    def __init__(self): self.pages = []
    def before_batch(self):
        steady(self.model)
        reset(self.model)
    def after_pred(self):
        cb = self.manifold_mix_up
        if self.training: self.pages.append((cb.plan, cb.place, map_leaves(lambda o,_: o.detach(), self.pred)))
    def after_loss(self): raise CancelBatchException

def loss(pred, y): return sum(o.mean() for o in floats(pred))*y.mean()

def learner(model, xb, *cbs, n=1, loss_func=loss, y=None):
    data = [(*xb, torch.arange(float(BS)) if y is None else y)]*n
    dls = DataLoaders(data, data[:1], device='cpu')
    dls.n_inp = len(xb)
    return quiet(Learner(dls, model, loss_func=loss_func, opt_func=SGD, cbs=cbs))

def default_cuts(model, xb):
    learn = learner(model, xb, cb := ManifoldMixUp())
    return [c for c in cb.cuts if c.module in cb.layers] if cb.layers else []

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
    learn.fit(1)
    steady(model)
    assert {place.module for _,place,_ in watch.pages} == {c.module for c in cuts}
    for plan,place,pred in watch.pages[-3:]:
        acts = run(model, xb, place.module)[1]
        same(run(model, other, place.module, mix(acts, plan))[0], pred)

class Noisy(nn.Module):
    "Keeps state of all kinds, draws from all random streams, and can fail"
    def __init__(self, fails=False):
        super().__init__()
        self.fails,self.calls,self.seen,self.hidden,self.a,self.norm,self.b = fails,0,{},[None],nn.Linear(8, 8),nn.BatchNorm1d(8),nn.Linear(8, 3)
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
    own = {f'{n}.{k}': v[:] if isinstance(v, list) else v for n,m in model.named_modules() for k,v in vars(m).items() if not isinstance(v, dict)}
    dicts = {f'{n}.{k}': dict(v) for n,m in model.named_modules() for k,v in vars(m).items() if isinstance(v, dict)}
    grads = {n: p.grad for n,p in model.named_parameters()}
    values = {k: v.clone() for k,v in model.state_dict().items()}
    return own,dicts,grads,values,random.getstate(),np.random.get_state(),torch.get_rng_state()

def is_equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)): return len(a) == len(b) and all(map(is_equal, a, b))
    if isinstance(a, (Tensor, np.ndarray)): return a is b or bool((a == b).all())
    return a is b or a == b

STATES = {**{name: partial(build, name) for name in 'resnet18 googlenet unet awd_lstm language table packed checkpointed timm_swin'.split()},
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
    assert {place for _,place,_ in watch.pages} == {'input'} and not learn.manifold_mix_up.layers

@pytest.mark.parametrize('name', UNCUT)
def test_no_cut_and_no_input_is_an_error(name):
    model,xb = (f() for f in UNCUT[name])
    with pytest.raises(ValueError, match='no hidden layer'): learner(model, xb, ManifoldMixUp(include_input=False)).fit(1)

def test_layer_inside_a_residual_branch_is_refused():
    model,xb,_ = build('resnet18')
    with pytest.raises(ValueError, match='would leave part of the signal unmixed'): learner(model, xb, ManifoldMixUp(layers='layer1.0.conv1')).fit(1)

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

@pytest.mark.filterwarnings('ignore')
def test_compiled_model_is_mixed_or_refused():
    (xb,other),model = (vectors(), vectors()),steady(chain())
    learn = learner(torch.compile(model, backend='eager'), xb, mixed_at('0'), watch := Watch(), n=4)
    try: learn.fit(1)
    except RuntimeError as e: assert 'compiled' in str(e)
    for plan,place,pred in watch.pages:
        acts = run(model, xb, place.module)[1]
        same(run(model, other, place.module, mix(acts, plan))[0], pred)

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

def test_places_hold_for_longer_texts_than_the_first():
    model,(short,),(long,) = text_classifier(),tokens(7),ragged()
    learn = learner(model, (short,), ManifoldMixUp(include_input=False), watch := Watch())
    y = torch.arange(float(BS))
    learn.dls.train = [(short, y)] + [(long, y)]*12
    learn.fit(1)
    assert len(watch.pages) == 13
