"The mixing of other libraries, each as its own documentation applies it, behind a fastai callback"
import torch
from fastai.basics import Callback, Tensor
from fastai.callback.mixup import MixUp as FastaiMixUp  # noqa: F401, for the others
from timm.data import Mixup as TimmMixup
from torchvision.transforms.v2 import MixUp as TorchvisionMixUp

class OneMemoryPass(Callback):
    "Copies the batch into memory that is kept: what reading and writing it once takes at least"
    run_valid = False

    def before_batch(self):
        if not hasattr(self, 'memory'): self.memory = torch.empty_like(self.x)
        self.memory.copy_(self.x)


class Torchvision(Callback):
    "torchvision's transform for batches; one lam for the batch, dense targets"
    run_valid = False
    def __init__(self, classes, alpha=.4): self.mix = TorchvisionMixUp(alpha=alpha, num_classes=classes)

    def before_batch(self):
        x,y = self.mix(self.x.as_subclass(Tensor), self.y.as_subclass(Tensor))
        self.learn.xb,self.learn.yb = (x,),(y,)


class Timm(Callback):
    "timm's `Mixup`; writes into the batch, which is why it gets a copy (made outside of the time that counts)"
    run_valid = False
    def __init__(self, classes, mode='batch', alpha=.4):
        self.mix = TimmMixup(mixup_alpha=alpha, num_classes=classes, mode=mode, label_smoothing=0.)

    def before_batch(self):
        x,y = self.mix(self.x.as_subclass(Tensor), self.y.as_subclass(Tensor))
        self.learn.xb,self.learn.yb = (x,),(y,)
