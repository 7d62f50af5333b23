"What all tests share: one thread for each process, since pytest runs one process for each core, and nothing left in torch's global tables"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import pytest
import torch
from life import datasets, learner
from torch.nn.modules import module

torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def no_global_hooks():
    "A test that leaves a hook for all modules behind fails"
    yield
    left = [name for name,o in vars(module).items() if name.startswith('_global_') and isinstance(o, dict) and o]
    for name in left: vars(module)[name].clear()
    assert not left

@pytest.fixture
def real(tmp_path):
    "Like `learner`, over fastai `DataLoaders`"
    return lambda kind, *args, **kwargs: learner(kind, *args, data=datasets(kind), path=tmp_path, **kwargs)

@pytest.fixture
def on_cpu(monkeypatch):
    "fastai's `MixedPrecision` asks for CUDA by name, or by default"
    from fastai.callback import fp16
    monkeypatch.setattr(fp16, 'autocast', lambda *device,dtype: torch.autocast('cpu', dtype))
    monkeypatch.setattr(fp16, 'GradScaler', lambda *device,**kwargs: torch.amp.GradScaler('cpu', **kwargs))
