"The path law by value: what a layer returned decides the prediction, whatever the inputs are."
import torch
from apps import close, floats, plain
from fastai.basics import Tensor, set_seed
from torch.nn.modules.module import register_module_forward_hook

from fastai_mixup.ops import map_leaves
from fastai_mixup.probe import untouched

def reset(model): getattr(model, 'reset', lambda: None)()

def run(model, xb, layer, to=None):
    "The prediction, and what each call of `layer` returned; with `to`, each call returns the next of these instead"
    given,seen = iter(to or []),[]
    def hook(m, args, out):
        if m is not layer: return
        seen.append(map_leaves(lambda o,_: o.detach().clone() if isinstance(o, Tensor) else o, out))
        return next(given) if to else None
    handle = register_module_forward_hook(hook) # before the hooks of the model's own
    with untouched(model), torch.no_grad():
        set_seed(0)
        reset(model)
        pred = model(*xb)
    handle.remove()
    return pred,seen

def same(a, b):
    a,b = floats(a),floats(b)
    assert a
    for o,p in zip(a, b, strict=True): close(o, p, 1e-3)

def _distance(a, b): return max((plain(o)-plain(p)).abs().max().item() for o,p in zip(a, b, strict=True))

def check_path(model, xb, other, layer, said=floats):
    "What `layer` returned for `xb` decides what is `said` in the prediction, whatever the inputs are"
    pred,acts = run(model, xb, layer)
    held,free = (_distance(said(run(model, other, layer, to)[0]), said(pred)) for to in (acts, None))
    assert free > 1e-6, 'the prediction does not depend on the inputs'
    assert held <= 1e-3*free, f'the prediction depends on inputs past the layer: by {held:.2g}, of {free:.2g} in all'
