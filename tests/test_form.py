"The shape of the code: short cells, short functions, the field's words, and nothing private outside of `compat`."
import ast
import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from statistics import median

import pytest
from fastai.callback.schedule import SchedCos

import fastai_mixup
from fastai_mixup import registry
from fastai_mixup.all import *
from fastai_mixup.batch import Method
from fastai_mixup.callback import MixCallback

root = Path(__file__).parent.parent
modules = {p: p.read_text(encoding='utf-8') for p in sorted((root/'fastai_mixup').rglob('*.py'))
    if p.name not in ('_modidx.py', '__init__.py')}
names = {p: str(p.relative_to(root/'fastai_mixup')) for p in modules}
def tree(p): return ast.walk(ast.parse(modules[p]))
def module_of(p): return import_module('fastai_mixup.' + names[p].removesuffix('.py').replace('/', '.'))

def export_cells():
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        for cell in json.loads(p.read_text(encoding='utf-8'))['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'code' and re.search(r'^#\|\s*export', source, re.M): yield p.stem,source.count('\n')+1

def test_export_cells_are_short():
    cells = list(export_cells())
    assert [o for o in cells if o[1] > 40] == [] and median(n for _,n in cells) <= 12

def test_lines_are_short():
    assert [(names[p], i) for p,text in modules.items() for i,line in enumerate(text.split('\n'), 1) if len(line) > 140] == []

def body_lines(f):
    body = f.body[1:] if ast.get_docstring(f) and len(f.body) > 1 else f.body
    return body[-1].end_lineno - body[0].lineno + 1
def test_functions_are_short():
    assert [(names[p], f.name) for p in modules for f in tree(p) if isinstance(f, ast.FunctionDef) and body_lines(f) > 20] == []
def test_classes_are_short():
    assert [(names[p], c.name) for p in modules for c in tree(p) if isinstance(c, ast.ClassDef) and c.end_lineno-c.lineno >= 150] == []

PRIVATE = re.compile(r'_getframe|currentframe|walk_stack|\btraceback\b|f_locals|f_back|f_code'
    r'|\b_(?:wrapped_)?call_impl\b|torch\._|_cdata\b|_storage_Use_Count|sequence_nr'
    r'|graph_task_id|_current_autograd_node|_DummyThread|_global_(?:forward|backward)|_compiled_call_impl|_torchdynamo|_orig_mod\b|_BatchNorm\b|\binner_loop\b')
def test_private_parts_are_in_compat():
    assert [(names[p], m.group()) for p,text in modules.items() if p.name != 'compat.py' for m in PRIVATE.finditer(text)] == []

FORMER = re.compile(r'\b(told|lender|lent|borrow\w*|armed|settled?|_asked|_answering|held|dials?|doses?|beside|alike|refused'
    r'|weigh(?:s|ed))\b',
    re.I)
def test_words_are_those_of_the_field():
    found = [(names[p], i, m.group()) for p,text in modules.items()
        for i,line in enumerate(text.split('\n'), 1) for m in FORMER.finditer(line)]
    assert found == []

def test_no_callback_changes_its_order(): assert [names[p] for p,text in modules.items() if re.search(r'\.order\s*=[^=]', text)] == []

def test_all_holds_what_others_use():
    "Another module, or a user: what `all` and the registry hold, methods and their docs"
    users = set(fastai_mixup.all.__all__)
    for p,text in modules.items():
        if p.name == 'all.py': continue
        for name in getattr(module_of(p), '__all__', []):
            elsewhere = any(re.search(rf'\b{name}\b', other) for q,other in modules.items() if q != p)
            public = name in users or p.name in ('registry.py', 'testing.py') or name.endswith('Method') or name in ('draw_lam',)
            assert elsewhere or public, f'{names[p]}: {name} is used nowhere else; `#| exporti` leaves it out of `__all__`'

def test_imports_go_one_way():
    "No module imports one that imports it"
    imports = {names[p]: {m for node in tree(p) if isinstance(node, ast.ImportFrom) and node.level for m in [_target(p, node)]}
        for p in modules}
    def reach(name, seen=()):
        for o in imports.get(name, ()):
            assert o not in seen, f'{" -> ".join((*seen, o))}'
            reach(o, (*seen, o))
    for name in imports: reach(name, (name,))
def _target(p, node):
    base = p.parent if node.level == 1 else p.parent.parent
    return str((base/(node.module or '').replace('.', '/')).relative_to(root/'fastai_mixup')) + '.py'

# The registry

def test_every_method_is_in_the_registry():
    "A method in a module that the registry does not hold would be in no table, no benchmark and no test"
    found = {o for p in modules for o in vars(module_of(p)).values() if inspect.isclass(o) and issubclass(o, MixCallback)
        and o is not MixCallback and o.__module__ == module_of(p).__name__}
    assert found == {*registry.METHODS, *registry.AROUND}

def test_all_is_the_registry():
    listed = [*registry.METHODS, *registry.AROUND, *registry.PAIRINGS, *registry.LABEL_RULES, *registry.LOSSES, *registry.TOOLS]
    assert fastai_mixup.all.__all__ == [o.__name__ for o in listed] + list(registry.TWINS)
    assert all(o.__doc__ and o.__doc__.strip() for o in listed)

def test_twins():
    "The names that are promised, and that which tells ours from fastai's"
    assert registry.TWINS == dict(MixUpCallback=MixUp, ManifoldMixUpCallback=ManifoldMixUp, CutMixCallback=CutMix)

# repr

def squared(batch, plan): return plan.lam**2
REPR = [MixUp(labels=Union()), CutMix(labels=Union(above=.2)), TransMix(attention='progressive'),
    MixUp(), MixUp(.2, p=.5, fold=False), MixUp(1., per='batch', inputs=['a', 1], stateful=True, start=.1, stop=3),
    MixUp(SchedCos(1., .1)), MixUp(pairing=DifferentClass(), labels=ReMix(kappa=2, counts=[3, 1])), MixUp(targets='losses'),
        CutMix(minmax=(.1, .5), correct=False), CutMix(1., pairing=NearTarget(sigma=.2), spatial_dims=2, channels_last=True),
        FMix(decay=2, soft=.1), GridMix(grid=3), SmoothMix((.1, .2)), ResizeMix((.2, .4)), SaliencyMix(.5),
        PuzzleMix(grid=4, travel=None, exact=False), SnapMix(2.), TransMix(attention=1), SpecMix(.2, bands=3),
        ClassMix(share=.3, background=[0, 255]), GuidedMixup(gradients=True, pairing=LeastOverlap()),
        CatchUpMix(.5, layers=['a'], pairing=DifferentClass()),
        RandomMix([MixUp(.2), CutMix()], weights=[.3, .7], per='item', p=.5, pairing=SameClass(), labels=ReMix(), start=1),
        RandomMix([MixUp(.2, p=.5), CutMix(minmax=(.1, .2))]), RegMixUp(5., eta=.5), RegMixUp(method=CutMix(.3), eta=2),
        RegMixUp(method=RandomMix([MixUp(), CutMix()])),
        ManifoldMixUp(.3, layers=['body', 'output'], include_input=False, p=.3), ManifoldMixUp(method=CutMix(.5), layers='stem'),
        ManifoldMixUp(method=RandomMix([MixUp(.1), CutMix()], weights=[.2, .3])), AlignMixUp(1., epsilon=.2),
        AlignMixUp(layers=['a'], fold=True)]
@pytest.mark.parametrize('cb', REPR, ids=repr)
def test_repr_can_be_pasted_back(cb):
    again = eval(repr(cb))
    assert type(again) is type(cb) and repr(again) == repr(cb)

@pytest.mark.parametrize('make', [lambda **kw: MixUp(**kw), lambda **kw: RandomMix([MixUp()], **kw), lambda **kw: ManifoldMixUp(**kw),
    lambda **kw: RegMixUp(**kw), lambda **kw: CutMix(**kw)])
@pytest.mark.parametrize('kwargs', [dict(p=.3), dict(pairing=DifferentClass()), dict(labels=squared), dict(start=.2), dict(stop=7),
    dict(inputs=['x']), dict(stateful=False), dict(targets='average'), dict(spatial_dims=2), dict(channels_last=True), dict(per='batch')],
    ids=lambda o: next(iter(o)))
def test_repr_shows_what_was_given(make, kwargs):
    if make(**kwargs).per != 'batch' and 'per' in kwargs: pytest.skip()
    (name,value), = kwargs.items()
    shown = repr(make(**kwargs))
    if repr(make()).endswith(')') and name == 'per' and isinstance(make(), RandomMix): return
    assert f'{name}=' in shown and (not callable(value) or 'DifferentClass()' in shown or 'squared' in shown)

@pytest.mark.parametrize('kwargs', [dict(p=.5), dict(stop=1), dict(stop=1.), dict(stop=0), dict(start=1), dict(start=1.), dict(start=0.),
    dict(start=1_000_000), dict(start=.5), dict(per='batch')], ids=str)
@pytest.mark.parametrize('make', [MixUp, lambda **kw: ManifoldMixUp(method=MixUp(.3), **kw),
    lambda **kw: RegMixUp(method=CutMix(p=.25), **kw), lambda **kw: RandomMix([MixUp(start=2), CutMix(p=.5)], **kw)])
def test_what_is_pasted_is_the_same(make, kwargs):
    "Also where one callback is given to another"
    cb = make(**kwargs)
    again = eval(repr(cb))
    for name in 'p','start','stop','per':
        for a,b in zip([cb.recipe, *cb.recipe.recipes], [again.recipe, *again.recipe.recipes]):
            ours,theirs = getattr(a, name),getattr(b, name)
            assert ours == theirs and (type(ours) is type(theirs) or ours == 0)

def test_pairing_of_the_method_inside():
    cb = ManifoldMixUp(method=MixUp(pairing=SameClass()))
    assert repr(eval(repr(cb)).recipe.method.pairing) == 'SameClass()'

def test_pairings_show_all_that_was_given():
    def near(batch): return batch.yb[0]
    assert repr(NearTarget(.2, by=near)) == 'NearTarget(sigma=0.2, by=near)' and repr(ReMix(2, .3,
        [1, 2])) == 'ReMix(kappa=2, tau=0.3, counts=[1, 2])'

@pytest.mark.parametrize('cls', [c for c in registry.METHODS])
def test_methods_are_dataclasses_with_one_method(cls):
    method = cls().method
    assert isinstance(method, Method) and hasattr(type(method), '__dataclass_fields__') and type(method).plan is not Method.plan
    for name in type(method).__dataclass_fields__: assert getattr(cls(), name) == getattr(method, name)
    assert cls.__doc__ and list(inspect.signature(cls).parameters)[:1] != ['args']
