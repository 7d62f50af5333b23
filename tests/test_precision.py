"Other precisions, layouts and ways to run: what is mixed, and what it costs the model, are those of plain float32."
from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from apps import close, quiet
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, Recorder, nn, set_seed, to_device
from fastai.callback.all import ChannelsLast, GradientAccumulation, MixedPrecision
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer, resnet18

from fastai_mixup.all import AlignMixUp, CutMix, LabelSmoothingCE, ManifoldMixUp, MixUp, PuzzleMix, RegMixUp, SnapMix, TransMix

pytestmark = pytest.mark.slow

BS,N,CLASSES = 6,4,3
Y = torch.arange(BS*N).view(N, BS) % CLASSES

class Through(Callback):
    "Keeps how each batch was mixed, what the model said and the loss; the model stays as it is"
    order,run_valid = 90,False
    def __init__(self): self.pages = []
    def after_loss(self):
        plan = next(cb.plan for cb in self.learn.cbs if hasattr(cb, 'plan'))
        found = dict(lam=plan.lam, index=plan.index, weights=plan.label_weights, pred=self.learn.pred.detach(),
            loss=self.learn.loss.detach(), y=self.learn.yb[0], xb=self.learn.xb)
        self.pages.append(SimpleNamespace(layer=plan.layer, device=self.learn.pred.device.type, **to_device(found, 'cpu')))
    def after_backward(self):
        self.pages[-1].grads = [p.grad.float().clone().cpu() for p in self.model.parameters() if p.grad is not None]

class Checkpointed(nn.Module):
    "Runs each part a second time in the backward pass"
    def __init__(self, parts, again=True):
        super().__init__()
        self.parts,self.again = parts,again
    def forward(self, x):
        for part in self.parts: x = checkpoint(part, x, use_reentrant=False) if self.again else part(x)
        return x

def picture_net():
    "A small residual network, without dropout; statistics of its own"
    net = resnet18(num_classes=CLASSES)
    net.layer3,net.layer4,net.fc = nn.Identity(),nn.Identity(),nn.Linear(128, CLASSES)
    return net

def pictures(): return torch.randn(N, BS, 3, 32, 32, generator=torch.Generator().manual_seed(1))
def words(): return torch.randint(1, 20, (N, BS, 9), generator=torch.Generator().manual_seed(1))
KINDS = dict(
    inputs=(lambda: MixUp(1.), picture_net, pictures), boxes=(CutMix, picture_net, pictures), blocks=(PuzzleMix, picture_net, pictures),
    hidden=(lambda: ManifoldMixUp(1.), picture_net, pictures),
    embedded=(lambda: MixUp(1.), lambda: nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), nn.Linear(9*16, 16), nn.ReLU(),
    nn.Linear(16, CLASSES)), words))
each_net = pytest.mark.parametrize('kind', KINDS)

def fit(kind, *cbs, change=lambda net: net, dtype=None, layout=None, loss_func=None, lr=0., y=Y, device='cpu', **kwargs):
    "`kind` is a name in `KINDS`, or what stands there: a callback, a model, and inputs"
    mix,net,data = KINDS[kind] if isinstance(kind, str) else kind
    torch.manual_seed(0)
    net,x = change(net()),[*data()]
    if dtype: net,x = net.to(dtype),[o.to(dtype) if o.is_floating_point() else o for o in x]
    if layout: x = [o.to(memory_format=layout) for o in x]
    dls = DataLoaders(list(zip(x, y)), [])
    dls._device = torch.device(device) # lists have none
    learn = quiet(Learner(dls, net, CrossEntropyLossFlat() if loss_func is None else loss_func, SGD, lr=lr,
        cbs=[mix(), watch := Through(), *cbs], **kwargs))
    if dtype == torch.bfloat16: learn.remove_cb(Recorder) # which smooths losses in float32
    learn.fit(1)
    assert not _global_forward_hooks
    return watch.pages,net

def loss_of(page):
    "The mixed cross-entropy, written out in double precision"
    logp = page.pred.double().log_softmax(1)
    def ce(y): return -logp[range(len(y)), y]
    return (page.lam*ce(page.y) + (1-page.lam)*ce(page.y[page.index])).mean()

def apart(a, b):
    "How far two lists of gradients are from each other, in units of the first"
    a,b = (torch.cat([o.double().flatten() for o in grads]) for grads in (a, b))
    return ((a-b).norm()/a.norm()).item()

def check_against(plain, pages, tol, same=True):
    """The same partners and weights as in `plain`, a loss that follows from them, and predictions and gradients that are as close as the
    precision allows"""
    assert len(plain) == len(pages) == N
    for a,b in zip(plain, pages):
        assert torch.equal(a.lam, b.lam) and torch.equal(a.index, b.index) and (b.lam < 1).any()
        close(b.loss.float(), loss_of(b), 1e-5 if b.pred.dtype == torch.float32 else tol)
        if same:
            close(a.pred, b.pred.float(), tol)
            assert apart(a.grads, b.grads) < 3*tol

@pytest.fixture(scope='module')
def plain(): return {kind: fit(kind)[0] for kind in KINDS}

@each_net
def test_channels_last(kind, plain):
    if kind == 'embedded': pytest.skip('words have no channels')
    pages,net = fit(kind, ChannelsLast(), layout=torch.channels_last)
    check_against(plain[kind], pages, 1e-2)
    for p in pages: assert p.xb[0].is_contiguous(memory_format=torch.channels_last)

@each_net
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_mixed_precision(mode, kind, plain, on_cpu):
    pages,net = fit(kind, MixedPrecision(mode, init_scale=1.))
    check_against(plain[kind], pages, .1, same=kind != 'blocks') # whose mask is decided by rounded gradients
    assert {p.dtype for p in net.parameters()} == {torch.float32}

@each_net
@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, .1), (torch.float64, 1e-2)], ids=['bfloat16', 'float64'])
def test_models_of_another_dtype(dtype, tol, kind, plain):
    pages,net = fit(kind, dtype=dtype)
    check_against(plain[kind], pages, tol, same=kind != 'blocks' or dtype == torch.float64)
    for p in pages:
        assert p.pred.dtype == dtype and p.loss.dtype == CrossEntropyLossFlat()(p.pred, p.y).dtype
        if kind != 'embedded': assert p.xb[0].dtype == dtype

@each_net
def test_accumulated_gradients(kind, plain):
    pages,_ = fit(kind, GradientAccumulation(BS*N))
    sums = [sum(g) for g in zip(*(p.grads for p in plain[kind]))]
    assert apart([o/N for o in sums], pages[-1].grads) < 1e-4

def check_checkpointing(kind, **kwargs):
    "What is run again in the backward pass is mixed again, in the same way"
    def parts(net):
        if not hasattr(net, 'fc'): return net
        *stem,one,two,_,_,pool,head = net.children()
        return nn.Sequential(nn.Sequential(*stem), one, two, nn.Sequential(pool, nn.Flatten(), head))
    again,once = (fit(kind, change=lambda net: Checkpointed(parts(net), on), **kwargs)[0] for on in (True, False))
    for a,b in zip(once, again, strict=True):
        close(b.loss.float(), loss_of(b), 1e-5)
        close(a.pred, b.pred)
        assert apart(a.grads, b.grads) < 1e-4 and torch.equal(a.lam, b.lam)

@each_net
def test_checkpointing(kind): check_checkpointing(kind)

def check_scaler(kind, **kwargs):
    "A step that overflows is skipped, and the next batches are mixed as before"
    pages,net = fit(kind, MixedPrecision('fp16', init_scale=2.**40, backoff_factor=2.**-36), lr=1e-3, **kwargs)
    assert not all(o.isfinite().all() for o in pages[0].grads) and all(o.isfinite().all() for o in pages[-1].grads)
    assert len(pages) == N and all(p.isfinite().all() for p in net.parameters())
    for p in pages: close(p.loss.float(), loss_of(p), 6e-2)

@each_net
def test_gradient_scaler(kind, on_cpu): check_scaler(kind)

def in_place(loss, **kwargs):
    loss.compile(**kwargs)
    return loss

LOSSES = dict(ce=nn.CrossEntropyLoss, function=lambda: F.cross_entropy,
    bound=lambda: partial(F.cross_entropy, weight=torch.tensor([1., 2, 3]), ignore_index=1), smoothed=partial(LabelSmoothingCE, .1),
    weighted=partial(nn.CrossEntropyLoss, weight=torch.tensor([1., 2, 3])),
              summed=partial(nn.CrossEntropyLoss, reduction='sum'), margin=nn.MultiMarginLoss)

@pytest.mark.parametrize('compiled', [torch.compile, in_place], ids=['wrapped', 'in place'])
@pytest.mark.parametrize('name', LOSSES)
def test_compiled_loss(name, compiled):
    if name in ('function', 'bound') and compiled is in_place: pytest.skip('functions are wrapped')
    torch._dynamo.reset()
    plain,_ = fit('embedded', loss_func=LOSSES[name]())
    pages,_ = fit('embedded', loss_func=(loss := compiled(LOSSES[name](), backend='eager')))
    assert getattr(loss, 'reduction', None) == getattr(LOSSES[name](), 'reduction', None)
    for a,b in zip(plain, pages, strict=True):
        assert torch.equal(a.lam, b.lam) and len(a.lam.unique()) > 1
        close(a.loss, b.loss, 1e-5)
        assert apart(a.grads, b.grads) < 1e-5

def test_compiled_function_with_bound_options():
    weighted = dict(weight=torch.tensor([1., 2, 3]), ignore_index=1)
    plain,_ = fit('embedded', loss_func=partial(F.cross_entropy, **weighted))
    pages,_ = fit('embedded', loss_func=partial(torch.compile(F.cross_entropy, backend='eager'), **weighted))
    for a,b in zip(plain, pages, strict=True): close(a.loss, b.loss, 1e-5)

def test_a_decorator_does_not_pass_for_what_it_decorates():
    @wraps(F.cross_entropy)
    def doubled(pred, y): return 2*F.cross_entropy(pred, y)
    pages,_ = fit('embedded', loss_func=doubled)
    for p in pages:
        lam = p.lam.unique()
        assert len(lam) == 1
        close(p.loss, 2*loss_of(p), 1e-5)

@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@pytest.mark.parametrize('kind', ['inputs', 'boxes'])
def test_compiled_model(kind, backend, plain):
    torch._dynamo.reset()
    pages,_ = fit(kind, change=partial(torch.compile, backend=backend))
    check_against(plain[kind], pages, 1e-2)

def patches():
    "A small vision transformer"
    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=CLASSES)
KINDS_INSIDE = dict(snap=(SnapMix, picture_net, pictures), trans=(TransMix, patches, pictures), hidden=KINDS['hidden'],
    align=(AlignMixUp, picture_net, pictures))

def whole_and_part(net):
    "A compiled layer inside of a model that is not"
    net.layer1 = torch.compile(net.layer1, backend='eager')
    return net

def test_snapmix_looks_into_the_model_that_was_compiled(monkeypatch):
    monkeypatch.setitem(KINDS, 'snap', KINDS_INSIDE['snap'])
    torch._dynamo.reset()
    ran = []
    def backend(graph, inputs):
        def run(*args): ran.append(len(args)); return graph(*args)
        return run
    plain,compiled = fit('snap')[0],fit('snap', change=partial(torch.compile, backend=backend))[0]
    assert len(ran) == N
    for a,b in zip(plain, compiled, strict=True):
        close(a.pred, b.pred)
        close(a.loss, b.loss, 1e-5)

@pytest.mark.parametrize('kind,who,change', [
    ('snap', 'SnapMix', in_place), ('snap', 'SnapMix', whole_and_part), ('trans', 'TransMix', torch.compile),
    ('hidden', 'ManifoldMixUp', torch.compile), ('hidden', 'ManifoldMixUp', whole_and_part), ('align', 'AlignMixUp', torch.compile)])
def test_methods_that_look_into_the_model_refuse_a_compiled_one(kind, who, change, monkeypatch):
    monkeypatch.setitem(KINDS, kind, KINDS_INSIDE[kind])
    with pytest.raises(ValueError, match=f'{who} cannot look into a compiled model'): fit(kind, change=change)

class Thrice(nn.Module):
    def __init__(self, again, **kwargs):
        super().__init__()
        self.stem,self.mid,self.end,self.head = nn.Linear(27, 8),nn.Linear(8, 8),nn.Linear(8, 8),nn.Linear(8, CLASSES)
        self.again,self.kwargs = again,kwargs
    def part(self, x): return self.end(self.mid(x).tanh()).sigmoid()
    def forward(self, x):
        x = self.stem(x.flatten(1)).tanh()
        return self.head(checkpoint(self.part, x, use_reentrant=False, **self.kwargs) if self.again else self.part(x))

class OwnCall(Callback):
    "Adds a loss of its own call of the model (or of `part` of it), made in `event`"
    run_valid = False
    def __init__(self, event, order, grad=True, part=None):
        self.event,self.order,self.grad,self.part = event,order,grad,part
        setattr(self, event, self.call)
        if event != 'after_loss': self.after_loss = self.add
    def call(self):
        with torch.set_grad_enabled(self.grad):
            self.own = (self.part(self.model) if self.part else self.model)(self.x*.5 if not self.part
                else self.x.flatten(1)[:,:8]).pow(2).mean()
        if self.event == 'after_loss': self.add()
    def add(self): self.learn.loss_grad = self.learn.loss_grad + self.own

def grads_beside(own, layer, again, **kwargs):
    torch.manual_seed(0)
    batches,seen = [(torch.randn(6, 3, 3, 3), y) for y in Y],[]
    class Keep(Callback):
        def before_step(self): seen.append([p.grad.clone() for p in self.model.parameters()])
    model = Thrice(again, **kwargs)
    cbs = [ManifoldMixUp(1., layers=layer, include_input=False), *own, Keep()]
    quiet(Learner(DataLoaders(batches, [], device='cpu'), model, CrossEntropyLossFlat(), SGD, lr=.1, cbs=cbs)).fit(1)
    return seen

@pytest.mark.parametrize('kwargs', [{}, dict(determinism_check='none')], ids=str)
@pytest.mark.parametrize('layer', ['mid', 'end'])
@pytest.mark.parametrize('calls', [
    [('before_batch', 0)], [('before_batch', 95)], [('after_pred', 0)], [('after_loss', 0)], [('after_loss', 50)],
    [('after_loss', 50, False)],
    [('before_batch', 0), ('before_batch', 95), ('after_pred', 50), ('after_loss', 50)],
    [('after_loss', 50, True, lambda m: m.mid)], [('before_batch', 0, True, lambda m: m.mid)]])
def test_only_the_pass_of_the_batch_is_mixed_again(calls, layer, kwargs):
    """A callback's own call of the model is not mixed; where it keeps gradients, the repeated pass of the batch cannot be told from its
    own, which raises an error"""
    plain = grads_beside([OwnCall(*c) for c in calls], layer, False, **kwargs)
    def repeated(): return grads_beside([OwnCall(*c) for c in calls], layer, True, **kwargs)
    if any(len(c) == 2 or c[2] for c in calls) and (layer == 'mid' or not any(len(c) == 4 for c in calls)):
        with pytest.raises(RuntimeError, match='runs again in the backward pass.*torch.no_grad'): repeated()
        return
    for a,b in zip(plain, repeated(), strict=True):
        for u,v in zip(a, b, strict=True): close(u, v)

def test_reentrant_checkpoints_are_named():
    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem,self.inside,self.head = nn.Linear(27, 8),nn.Linear(8, 8),nn.Linear(8, CLASSES)
        def forward(self, x): return self.head(checkpoint(self.inside, self.stem(x.flatten(1)), use_reentrant=True))
    learn = quiet(Learner(DataLoaders([(torch.randn(6, 3, 3, 3), Y[0])], [], device='cpu'), Reentrant(), CrossEntropyLossFlat(), SGD,
        cbs=ManifoldMixUp(include_input=False)))
    with pytest.warns(UserWarning, match='use_reentrant=True'): learn.fit(1)
    assert learn.manifold_mix_up.layers == [learn.model.stem]

def compiled_with(backend, net): return torch.compile(net, backend=backend)
def compiled_in_place(backend, net):
    net.compile(backend=backend)
    return net
def compiled_in_part(backend, net):
    name,child = next(net.named_children())
    setattr(net, name, torch.compile(child, backend=backend))
    return net

@pytest.mark.parametrize('compiled', [compiled_with, compiled_in_place, compiled_in_part])
def test_clean_and_mixed_in_a_compiled_model(compiled):
    "The same losses as without compiling, and compiled once"
    def losses(change):
        set_seed(0)
        net = change(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
        dls = DataLoaders([(torch.randn(8, 6), torch.arange(8) % 3)]*12, [])
        learn = Learner(dls, net, CrossEntropyLossFlat(), SGD, cbs=RegMixUp())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
        assert not net._forward_hooks and not net._forward_pre_hooks
        return torch.stack(list(learn.recorder.losses))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    close(losses(partial(compiled, counter)), losses(lambda net: net))
    assert counter.frame_count <= 3
