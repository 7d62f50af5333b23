"A spy that sees from outside how each batch of a Learner is mixed, and the losses that follow from it, written out."
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from fastai.basics import Callback, Tensor, nn, noop
from fastai.callback.progress import ProgressCallback
from fastai.text.models.awdlstm import EmbeddingDropout

from fastai_mixup.layers.inputs import unwrapped
from fastai_mixup.methods.manifold_mixup import ManifoldMixUp
from fastai_mixup.ops import leaves, map_leaves
from fastai_mixup.probe import untouched

def close(a, b, tol=1e-4): torch.testing.assert_close(plain(a).double(), plain(b).double(), atol=tol, rtol=tol)
def layer_of(cb):
    "Where the running batch is mixed: 'input', 'output', or a module"
    name = getattr(cb.plan, 'layer', 'input')
    return name if name in ('input', 'output') else unwrapped(cb.learn.model).get_submodule(name)

def plain(o): return o.detach().as_subclass(Tensor) if isinstance(o, Tensor) else torch.tensor(o)
def floats(o): return [plain(v).clone() for v,_ in leaves(o) if isinstance(v, Tensor) and v.is_floating_point()]
def quiet(learn):
    learn.logger = noop
    learn.remove_cbs(learn._grab_cbs(ProgressCallback))
    return learn

def mixing_matrix(mixed, own, tol=1e-3):
    "The M of `mixed = M @ own`, whose rows hold a share of the item itself and the rest of one partner"
    mixed,own = (torch.cat([o.double().flatten(1) for o in os], 1) for os in (mixed, own))
    gap,moved = own[:,None]-own, mixed[:,None]-own
    lam = ((moved*gap).sum(-1) / gap.square().sum(-1)).nan_to_num(1.)
    err = (moved - lam[...,None]*gap).norm(dim=-1).fill_diagonal_(torch.inf)
    miss,partner = err.min(1)
    assert (miss < tol*gap.norm(dim=-1).amax(1)).all(), f'no row is the average of two: {miss.tolist()}'
    lam = lam.gather(1, partner[:,None])
    assert (lam > .5-tol).all() and (lam < 1+tol).all(), f'shares outside of [1/2, 1]: {lam.flatten().tolist()}'
    return torch.diag_embed(lam[:,0]).scatter_add(1, partner[:,None], 1-lam)

def mixed_ce(ignore_index=-100):
    def loss(pred, y, M):
        y = y.view(len(y), *pred.shape[2:]).long()
        ce = lambda i,j: F.cross_entropy(pred[i:i+1], y[j:j+1], reduction='sum', ignore_index=ignore_index)
        at = M.nonzero().tolist()
        return sum(M[i,j]*ce(i, j) for i,j in at) / sum(M[i,j]*(y[j] != ignore_index).sum() for i,j in at)
    return loss

def mixed_tokens(pred, y, M): return mixed_ce()(pred.transpose(1, 2), y, M)
def mixed_targets(loss_func):
    def loss(pred, y, M): return loss_func(pred.double(), torch.tensordot(M, y.double(), 1).view_as(pred))
    return loss

def _tap(model, names, seen):
    "Keep what the layers called `names` receive, or what they return if they are embeddings"
    for module in map(model.get_submodule, names):
        if isinstance(module, (nn.Embedding, EmbeddingDropout)): yield module.register_forward_hook(lambda m,i,o: seen.extend(floats(o)))
        else: yield module.register_forward_pre_hook(lambda m,i: seen.extend(floats(i)))

def _keep(forward, seen):
    "`forward`, keeping what it returns before any hook sees it"
    def kept(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.extend(floats(out))
        return out
    return kept

class Before(Callback):
    "Keeps a batch, and what the layers see of it, from before it is mixed"
    order = 7
    def before_batch(self):
        self.learn.unmixed = b = SimpleNamespace(xb=self.xb, yb=tuple(map(plain, self.yb)), n=len(self.y), training=self.training, own=[])
        if self.learn.spy.taps == ['']: b.own = floats(b.xb)
        else: self._look(b)

    def _look(self, b):
        with untouched(self.model), torch.no_grad():
            list(_tap(self.model.eval(), self.learn.spy.taps, b.own))
            self.model(*b.xb)

class Spy(Callback):
    "Writes down what each batch was, what the layers saw of it, and the loss"
    order = 9
    def __init__(self, taps): self.taps,self.batches = taps,[]

    def before_batch(self):
        b = self.learn.unmixed
        b.seen,b.before,b.after = [],{},{}
        self.batches.append(b)
        self.handles = list(_tap(self.model, self.taps, b.seen))
        cb = next((cb for cb in self.learn.cbs if isinstance(cb, ManifoldMixUp)), None)
        self.wrapped = cb.layers if cb and self.training else []
        for layer in self.wrapped:
            b.before[layer],b.after[layer] = [],[]
            layer.forward = _keep(layer.forward, b.before[layer])
            self.handles.append(layer.register_forward_hook(lambda m,i,o: b.after[m].extend(floats(o))))

    def after_pred(self): self.batches[-1].pred = map_leaves(lambda o,_: plain(o) if isinstance(o, Tensor) else o, self.pred)

    def after_loss(self):
        self.batches[-1].loss = plain(self.learn.loss)
        for h in self.handles: h.remove()
        for layer in self.wrapped: del layer.forward

def _rows_first(o, n):
    "`o` with its `n` items along the first dimension; `None` if it has them along none, or several"
    dims = [d for d,size in enumerate(o.shape) if size == n]
    return o if dims[:1] == [0] else o.movedim(dims[0], 0) if len(dims) == 1 else None

def places(b):
    "What each place held before mixing, and after it"
    whole = lambda os: [r for o in os for r in [_rows_first(o, b.n)] if r is not None]
    return {'input': (whole(b.own), whole(b.seen)), **{m: (whole(b.before[m]), whole(b.after[m])) for m in b.before}}

def was_mixed(place): return not all(torch.allclose(a, b, atol=1e-6) for a,b in zip(*place, strict=True))

def matrix(b):
    "How a batch was mixed, and where"
    (place,(own,mixed)), = [o for o in places(b).items() if was_mixed(o[1])]
    return place,mixing_matrix(mixed, own)
