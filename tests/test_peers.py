"Where a peer has the same method and is right, ours draws from the same distribution"
import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoaders, Learner, nn, set_seed
from mixup.methods import FMix as PeersFMix
from scipy import stats
from timm.data import Mixup as TimmMixup

from fastai_mixup.all import *
from fastai_mixup.methods.fmix import low_frequency_noise, top_mask

SIDE,N = 16,200

def edge(masks):
    "Share of neighbouring places of which only one is the item's own"
    return ((masks[:,1:] != masks[:,:-1]).float().mean((1,2)) + (masks[:,:,1:] != masks[:,:,:-1]).float().mean((1,2)))

def peers_mask(peer):
    "The mask that a peer laid over one-hot numbers of two items"
    own = torch.eye(2).view(2, 2, 1, 1).expand(2, 2, SIDE, SIDE).contiguous()
    while True:
        mixed = peer(own, torch.tensor([0, 1]))[0][0,0]
        if 0 < mixed.mean() < 1: return mixed

def alike(a, b): assert stats.ks_2samp(a, b).pvalue > 1e-3

@pytest.mark.parametrize('decay', [2., 3.])
def test_clouds_are_as_ragged_as_those_of_fmix(decay):
    set_seed(0) # the peer draws from numpy
    theirs = torch.stack([peers_mask(PeersFMix(1e4, decay_power=decay)) for _ in range(N)])
    share = theirs.mean((1,2))
    def clouds(decay): return top_mask(low_frequency_noise(N, (SIDE, SIDE), decay, 1), share).float()
    alike(edge(theirs), edge(clouds(decay)))
    with pytest.raises(AssertionError): alike(edge(theirs), edge(clouds(decay+1)))

class Masks(Callback):
    order,run_valid = 9,False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append(self.learn.xb[0].diagonal(dim1=0, dim2=1).permute(2, 0, 1))

@pytest.mark.parametrize('kwargs,theirs', [(dict(), dict()), (dict(minmax=(.2, .8)), dict(cutmix_minmax=(.2, .8)))])
def test_boxes_are_as_large_as_timms(kwargs, theirs):
    np.random.seed(0)
    torch.manual_seed(0)
    n,side = 10,64 # timm rounds the sides down
    own = torch.eye(n).view(n, n, 1, 1).expand(n, n, side, side).contiguous()
    peer = TimmMixup(mixup_alpha=0., cutmix_alpha=1., mode='elem', num_classes=2, label_smoothing=0., **theirs)
    mixed = torch.cat([peer(own.clone(), torch.zeros(n, dtype=torch.long))[0].diagonal(dim1=0, dim2=1).permute(2, 0, 1) for _ in range(30)])
    masks = Masks()
    learn = Learner(DataLoaders([(own, torch.arange(n))]*30, []), nn.Sequential(nn.Flatten(), nn.Linear(n*side**2, n)),
        CrossEntropyLossFlat(), SGD,
                    cbs=[CutMix(1., **kwargs), masks])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    ours = torch.cat(masks.seen)
    alike(ours.mean((1,2)), mixed.mean((1,2)))
    with pytest.raises(AssertionError): alike(ours.mean((1,2)), 1-mixed.mean((1,2)))
