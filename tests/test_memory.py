"Whose memory: the caller's tensors are never written to, what somebody holds does not change, and mixed inputs look like the own ones."
from collections import UserDict
from functools import partial

import pytest
import torch
from fastai.vision.all import TensorImage
from oracle import Callback, N, Net, batches, close, fit, learner
from test_inputs import EYE, FLOATS, INTS, Embed, check_all, run
from torch import Tensor, nn

from fastai_mixup.all import *

IMAGES = torch.randn(N, 3, 4, 5)
LAYOUTS = {str(d)[6:]: IMAGES.to(d) for d in (torch.float16, torch.bfloat16, torch.float64, torch.complex64)} | dict(
    channels_last=IMAGES.to(memory_format=torch.channels_last),
    channels_last_3d=torch.randn(N, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    image=TensorImage(IMAGES), gradient=IMAGES.clone().to(memory_format=torch.channels_last).requires_grad_())

class Look(Callback):
    "What the mixed inputs are, before they are cast for the model"
    order,run_valid,seen = 8.5,False,None
    def before_batch(self): self.seen = [*(self.seen or []), self.learn.xb[1]]

@pytest.mark.parametrize('name', LAYOUTS)
def test_kept_layout(name):
    x,look = LAYOUTS[name],Look()
    for page,got in zip(run((EYE, x), cbs=[look]), look.seen):
        own,wide = x[page.ids],torch.complex128 if x.is_complex() else torch.float64
        assert (type(got), got.dtype, got.stride(), got.device) == (type(own), own.dtype, own.stride(), own.device)
        close(got.to(wide), torch.tensordot(page.M.to(wide), x.detach().as_subclass(Tensor).to(wide), 1),
            1e-2 if x.element_size() == 2 else 1e-5)

def clone(o):
    if isinstance(o, Tensor): return o.clone()
    if isinstance(o, (dict, UserDict)): return {k: clone(v) for k,v in o.items()}
    return [clone(v) for v in o] if isinstance(o, (tuple, list)) else o

@pytest.mark.parametrize('xb,encode', [*FLOATS.values(), *((xb, Embed(f)) for xb,f in INTS.values())], ids=[*FLOATS, *INTS])
def test_data_is_not_written_to(xb, encode):
    data = batches(xb, (EYE[:,:5],))
    before = clone(data)
    fit(learner(data, nn.CrossEntropyLoss(), Net(encode=encode), MixUp(1.), n_inp=len(xb)))
    torch.testing.assert_close(clone(data), before, rtol=0, atol=0)

def later(o): return lambda: torch.as_tensor(o)
def stored(storage): return torch.tensor(storage.tolist())
def graph(x):
    w = torch.ones(N, requires_grad=True)
    y = (x*w).sum()
    return lambda: torch.autograd.grad(y, w)[0]

HOLDS = dict(nothing=lambda x: later(0), itself=later, view=lambda x: later(x.T), part=lambda x: later(x[:1,:1]),
    detached=lambda x: later(x.detach()),
             numpy=lambda x: later(x.numpy()), storage=lambda x: partial(stored, x.untyped_storage()), graph=graph)

class Holding(Net):
    "Holds on to something of its inputs, and to nothing else"
    def __init__(self, hold):
        super().__init__()
        self.hold,self.held = hold,[]
    def forward(self, x):
        self.args,self.M = (),x.clone()
        self.held.append((self.hold(x), self.hold(self.M)))
        return self.head(x)

@pytest.mark.parametrize('hold', HOLDS)
def test_held_inputs_do_not_change(hold):
    net = Holding(HOLDS[hold])
    check_all(run((EYE,), net=net, n=3))
    for held,copied in net.held: close(held(), copied(), 0)
