"The oracle law for any input: whatever the items come as, what reaches the head of the model is the mixing matrix of the loss."
import re
from collections import UserDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.all import TensorBBox, TensorPoint
from oracle import BS, Callback, N, Net, batches, check, close, fit, learner, mixed_losses
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastai_mixup.all import *

EYE,IDS,Y = torch.eye(N),torch.arange(N),torch.arange(N) % 5
REFUSED = TypeError,ValueError,RuntimeError
def tokens(n): return IDS[:,None].repeat(1, n)
def want(y=Y): return mixed_losses(partial(F.cross_entropy, reduction='none'), y)

def run(xb, encode=lambda x, *_: x, mix=None, net=None, n=1, bs=BS, y=Y, cls=Net, **kw):
    torch.manual_seed(0)
    mix = mix or MixUp(1., fold=False)
    return fit(learner(batches(xb, (y,), bs), CrossEntropyLossFlat(), net or cls(encode=encode), mix, n_inp=len(xb), lr=0, bs=bs, **kw), n)

def check_all(pages):
    for page in pages: check(page, want())

def check_kept(pages, x, read=lambda args: args[1]):
    for page in pages: assert torch.equal(read(page.args), x[page.ids])

FLOATS = dict(
    one=((EYE,), lambda x: x),
    several=((EYE, 2*EYE, EYE), lambda a,b,c: (a+b+c)/4),
    nested=(((EYE, (EYE, [EYE])),), lambda x: (x[0] + x[1][0] + x[1][1][0])/3),
    dict=((dict(a=EYE, b=dict(c=EYE)),), lambda x: (x['a'] + x['b']['c'])/2),
    user_dict=((UserDict(a=EYE, b=EYE),), lambda x: (x['a'] + x['b'])/2),
    constants=((EYE, None, True, 2), lambda x,*_: x),
    empty_ints=((torch.empty(N, 0, dtype=torch.long), EYE), lambda _,x: x),
    empty_floats=((EYE, torch.empty(N, 0)), lambda x,_: x),
    volume=((EYE.view(N, 1, 1, N, 1),), lambda x: x.flatten(1)),
    strided=((EYE.repeat_interleave(2, 1)[:,::2],), lambda x: x),
    expanded=((EYE[:,None].expand(-1, 3, -1),), lambda x: x[:,2]),
    written_to=((EYE/2,), lambda x: x.mul_(2)),
    complex=((EYE*1j,), lambda x: x.imag))

@pytest.mark.parametrize('name', FLOATS)
def test_floats(name): check_all(run(*FLOATS[name]))

class Embed(nn.Module):
    "`f` of an embedding that gives each item its one-hot row and others zeros, and of the inputs"
    def __init__(self, f, cls=nn.Embedding, **kw):
        super().__init__()
        self.f,self.table = f,cls.from_pretrained(torch.eye(2*N, N), freeze=False, **kw)
    def forward(self, *xb): return self.f(self.table, *xb)

def positions(t, x, pos): return t(x).mean(1) + (F.embedding(pos, t.weight) - t.weight[:x.shape[1]]).sum(-2).view(-1, N)
def setitem(t, x):
    x = x.clone()
    x[x < 0] = 5
    return t(x)

T,COLUMN,UNKNOWN = tokens(BS),IDS[:,None],IDS.where(IDS != 5, -1)
INTS = dict(
    one_each=((IDS,), lambda t,x: t(x)),
    one_column=((COLUMN,), lambda t,x: t(x)[:,0]),
    sequence=((T,), lambda t,x: t(x).mean(1)),
    int32=((T.int(),), lambda t,x: t(x).mean(1)),
    cast=((T.short(),), lambda t,x: t(x.long()).mean(1)),
    transposed=((T,), lambda t,x: t(x.T).mean(0)),
    contiguous=((tokens(3),), lambda t,x: t(x.t().contiguous()).mean(0)),
    permuted=((T[:,:,None],), lambda t,x: t(x.permute(2, 1, 0)).mean((0, 1))),
    flattened=((T,), lambda t,x: t(x.flatten()).view(len(x), -1, N).mean(1)),
    sliced=((T,), lambda t,x: t(x[:,1:]).mean(1)),
    halves=((T,), lambda t,x: sum(t(c).mean(1) for c in x.chunk(2, 1))/2),
    columns=((T,), lambda t,x: sum(t(x[:,i]) for i in range(x.shape[1]))/x.shape[1]),
    unbound=((T,), lambda t,x: sum(map(t, x.unbind(1)))/x.shape[1]),
    iterated=((T,), lambda t,x: sum(t(c) for c in x.T)/x.shape[1]),
    reversed=((T,), lambda t,x: t(x.flip(0)).mean(1).flip(0)),
    cat=((T,), lambda t,x: t(torch.cat([x.new_full((len(x), 1), N), x], 1))[:,1:].mean(1)),
    cat_keyword=((T,), lambda t,x: t(torch.cat(tensors=[x, x], dim=1)).mean(1)),
    padded=((T,), lambda t,x: t(F.pad(x, (0, 2), value=N)).sum(1)/x.shape[1]),
    offsets=((tokens(2),), lambda t,x: t(x + torch.tensor([0, N])).sum(1)),
    broadcast=((COLUMN,), lambda t,x: t(x + torch.tensor([0, N, N])).sum(1)),
    broadcast_too=((COLUMN,), lambda t,x: (t(x)[:,0] + t(x + torch.tensor([0, N, N])).sum(1))/2),
    sorted=((T,), lambda t,x: t(x.sort(1).values).mean(1)),
    cat_inputs=((IDS, T), lambda t,a,b: t(torch.cat([a[:,None], b], 1)).mean(1)),
    modulo=((IDS + 7*N,), lambda t,x: t(x % N)),
    clamp=((IDS-1,), lambda t,x: t((x + 1).clamp(0, N))),
    masked_fill=((UNKNOWN,), lambda t,x: t(x.masked_fill(x < 0, 5))),
    where=((UNKNOWN,), lambda t,x: t(torch.where(x < 0, 5, x))),
    setitem=((UNKNOWN,), setitem),
    weight=((T,), lambda t,x: t.weight[x].mean(1)),
    weight_in_tuple=((T,), lambda t,x: t.weight[x,].mean(1)),
    index_select=((IDS,), lambda t,x: t.weight.index_select(0, x)),
    index_select_keyword=((IDS,), lambda t,x: torch.index_select(input=t.weight, dim=0, index=x)),
    functional=((T,), lambda t,x: F.embedding(input=x, weight=t.weight).mean(1)),
    one_hot=((T,), lambda t,x: (F.one_hot(x, 2*N).float() @ t.weight).mean(1)),
    twice=((T,), lambda t,x: (t(x) + t(x)).mean(1)/2),
    two=((IDS, T), lambda t,a,b: (t(a) + t(b).mean(1))/2),
    with_floats=((IDS, EYE), lambda t,i,x: (t(i) + x)/2),
    lengths=((T,), lambda t,x: t(x).sum(1)/(x >= 0).sum(1, keepdim=True)),
    positions=((T,), lambda t,x: positions(t, x, torch.arange(x.shape[1]))),
    positions_cast=((T,), lambda t,x: positions(t, x, torch.arange(x.shape[1]).type_as(x))),
    positions_expanded=((T,), lambda t,x: positions(t, x, torch.arange(x.shape[1]).expand_as(x))))
each_per = pytest.mark.parametrize('per', ['item', 'batch'])

@each_per
@pytest.mark.parametrize('name', INTS)
def test_ints(name, per):
    xb,f = INTS[name]
    check_all(run(xb, Embed(f), MixUp(1., fold=False, per=per)))

@each_per
@pytest.mark.parametrize('mode', ['sum', 'mean', 'max'])
def test_embedding_bag(mode, per):
    encode = Embed(lambda t,x: t(x)/(x.shape[1] if mode == 'sum' else 1), nn.EmbeddingBag, mode=mode)
    check_all(run((T,), encode, MixUp(1., fold=False, per=per)))

TEXT = torch.cat([COLUMN, tokens(3) % 3 + N], 1)
OPTIONS = dict(plain={}, padding=dict(padding_idx=N), max_norm=dict(max_norm=.5, norm_type=1.), sparse=dict(sparse=True),
    by_freq=dict(scale_grad_by_freq=True))
LOOKUPS = dict(module=lambda t,x: t(x), transposed=lambda t,x: t(x.T).transpose(0, 1), flat=lambda t,x: t(x.flatten()).view(*x.shape, N),
               checkpoint=lambda t,x: checkpoint(t, x, use_reentrant=False),
               reentrant=lambda t,x: checkpoint(lambda i,_: t(i), x, torch.ones(1, requires_grad=True), use_reentrant=True))

class Grads(Callback):
    "Keeps the gradients of `weight`"
    def __init__(self, weight): self.weight,self.grads = weight,[]
    def after_backward(self): self.grads.append(self.weight.grad.to_dense().clone())

@each_per
@pytest.mark.parametrize('lookup', LOOKUPS)
@pytest.mark.parametrize('option', OPTIONS)
def test_embedding_gradient(option, lookup, per):
    encode = Embed(lambda t,x: LOOKUPS[lookup](t, x).sum(1), **OPTIONS[option])
    cb = Grads(encode.table.weight)
    for page,grad in zip(run((TEXT,), encode, MixUp(1., fold=False, per=per), cbs=[cb]), cb.grads):
        weight,M = torch.eye(2*N, N).requires_grad_(),page.M / page.M.sum(1, keepdim=True)
        x = M[:,page.ids] @ F.embedding(TEXT[page.ids], weight, **OPTIONS[option]).sum(1)
        close(page.M, x)
        close(grad, torch.autograd.grad(want()(M, page.head(x), page.ids), weight)[0].to_dense())

def test_tied_weights():
    embed,out = nn.Embedding.from_pretrained(EYE.clone(), freeze=False),nn.Linear(N, N)
    out.weight = embed.weight
    cb = Grads(embed.weight)
    for page,grad in zip(run((IDS,), net=Net(out, embed), y=IDS, cbs=[cb]), cb.grads):
        weight = EYE.clone().requires_grad_()
        loss = want(IDS)(page.M, page.M @ weight @ weight.T + out.bias, page.ids)
        close(page.loss, loss)
        close(grad, torch.autograd.grad(loss, weight)[0])

class Bert(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.words,self.positions,self.types = nn.Embedding.from_pretrained(EYE.clone(), freeze=False),nn.Embedding(length,
            N),nn.Embedding(2, N)
        self.register_buffer('position_ids', torch.arange(length)[None])

    def forward(self, b):
        ids,mask = b['input_ids'],b['attention_mask']
        position = self.positions(self.position_ids[:,:ids.size(1)]) - self.positions.weight[:ids.size(1)]
        kind = self.types(b['token_type_ids'])
        return ((self.words(ids) + position + kind - kind)*mask.unsqueeze(-1)).sum(1)/mask.sum(1, keepdim=True)

@pytest.mark.parametrize('kind', [dict, UserDict])
def test_hugging_face(kind):
    mask = (torch.arange(BS) <= COLUMN % BS).long()
    pages = run((kind(input_ids=T, attention_mask=mask, token_type_ids=T % 2),), Bert(BS))
    check_all(pages)
    check_kept(pages, mask, lambda args: args[0]['attention_mask'])

LATER = torch.zeros(N, 3).masked_fill((COLUMN > 6) & (torch.arange(3) > 0), -torch.inf)
MASKS = dict(bool=LATER == 0, additive=LATER.roll(7, 0), additive_later=LATER, square=LATER.roll(7, 0)[:,None,None].expand(-1, 1, 3, 3))
@pytest.mark.parametrize('name', MASKS)
def test_masks_are_kept(name):
    pages = run((EYE, MASKS[name]))
    check_kept(pages, MASKS[name])
    check_all(pages)

class Named(Net):
    def forward(self, image, attention_mask=None, masked_image=None): return super().forward(image, attention_mask, masked_image)

@pytest.mark.parametrize('dtype', [torch.long, torch.float, torch.bool])
def test_named_mask_is_kept(dtype): check_kept(run((EYE, (T > 3).to(dtype)), cls=Named), (T > 3).to(dtype))

def test_masked_image_is_no_mask(): check_all(run((EYE, None, EYE), lambda x,_,i: (x+i)/2, cls=Named))

class Two(Net):
    def forward(self, image, ids): return super().forward(image, ids)

@pytest.mark.parametrize('inputs', [0, 'image', [0], ('image',), {'image'}], ids=str)
def test_selected_inputs(inputs):
    pages = run((EYE, EYE), mix=MixUp(1., inputs=inputs), cls=Two)
    check_all(pages)
    check_kept(pages, EYE)

def test_selected_key():
    pages = run((dict(a=EYE, b=dict(c=EYE)),), lambda x: x['b']['c'], MixUp(1., inputs='c'))
    check_all(pages)
    check_kept(pages, EYE, lambda args: args[0]['a'])

def test_unselected_may_be_anything(): check_all(run((EYE, list('abcdefghijk')), mix=MixUp(1., inputs=0)))

@pytest.mark.parametrize('inputs,error,match', [('c', ValueError, "'c'.*'ids', 'image'"), (2, ValueError, '2'), ([], TypeError, 'inputs'),
    (1.5, TypeError, '1.5'),
                                                (True, TypeError, 'True')], ids=str)
def test_refused_selection(inputs, error, match):
    with pytest.raises(error, match=match): run((EYE, EYE), mix=MixUp(1., inputs=inputs), cls=Two)

RAGGED = [torch.ones(i+1) for i in range(BS)]
BAD_INPUTS = dict(
    unused=(T[:BS], lambda x,i: x), only_its_shape=(T[:BS], lambda x,i: x + 0*F.embedding(torch.arange(BS).expand_as(i), EYE).sum()),
    to_float=(T[:BS], lambda x,i: x + 0*i.float().sum()), divided=(T[:BS], lambda x,i: x + 0*(i/255).sum()),
    scaled=(T[:BS], lambda x,i: x + 0*(i*.5).sum()),
    strings=(list('abcd'), None), ragged=(RAGGED, None), boxes=(TensorBBox(torch.rand(BS, 4)), None),
    points=(TensorPoint(torch.rand(BS, 2)), None),
    other_rows=(torch.rand(2, BS), None), sparse=(torch.eye(BS).to_sparse(), None))

def train_on(x, y, encode=lambda x,_: x):
    return fit(learner([(EYE[:BS], x, y)], CrossEntropyLossFlat(), Two(encode=encode), MixUp(1.), n_inp=2))

@pytest.mark.parametrize('name', BAD_INPUTS)
def test_refused_input(name):
    x,encode = BAD_INPUTS[name]
    with pytest.raises(REFUSED, match="Input 'ids'.*`inputs=`"): train_on(x, Y[:BS], encode)

@pytest.mark.parametrize('y', [TensorBBox(torch.rand(BS, 4)), TensorPoint(torch.rand(BS, 2)), list('abcd'), RAGGED, torch.rand(3, 2),
    torch.tensor(1)],
                         ids=['boxes', 'points', 'strings', 'ragged', 'rows', 'scalar'])
def test_refused_target(y):
    with pytest.raises(REFUSED, match="Target 0|Input 'image'.*for each of the 3 items"): train_on(EYE[:BS], y)

def test_nothing_to_mix():
    with pytest.raises(REFUSED, match='Input'): run((EYE.bool(),), lambda x: x.float())

REMAP = torch.arange(2*N)
DEVIOUS = dict(
    ngrams=lambda t,x: t(x.unfold(1, 2, 1).sum(-1)//2),
    largest=lambda t,x: t(x.max(1).values)[:,None],
    remapped=lambda t,x: t(REMAP[x]),
    remapped_by_gather=lambda t,x: t(REMAP.expand(len(x), -1).gather(1, x)),
    remapped_by_embedding=lambda t,x: t(F.embedding(x, REMAP[:,None])[...,0]),
    weight_slice=lambda t,x: t.weight[x,:],
    weight_gather=lambda t,x: t.weight.expand(len(x), -1, -1).gather(1, x[:,:1,None].expand(-1, -1, N)))

@pytest.mark.parametrize('name', DEVIOUS)
def test_half_mixed_is_refused_or_right(name):
    try: pages = run((T,), Embed(lambda t,x: (t(x).mean(1) + DEVIOUS[name](t, x).mean(1))/2))
    except REFUSED as e: assert re.search('Input 0.*`inputs=`', str(e))
    else: check_all(pages)

def test_bag_with_offsets_is_refused():
    with pytest.raises(REFUSED, match='(?i)embedding.?bag'): run((IDS, IDS % BS), Embed(lambda t,x,o: t(x, o), nn.EmbeddingBag))

@pytest.mark.parametrize('bs', [1, 2, 5, N])
def test_batch_sizes(bs): check_all(run((EYE,), bs=bs))
