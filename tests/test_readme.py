"README and pages say what the code and the committed results say, and their snippets run when pasted"
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root/'experiments'), str(root/'docs')]

def text_of(path): return (root/path).read_text(encoding='utf-8')
def cells(path): return json.loads(text_of(path))['cells']
def prose(path): return '\n'.join(''.join(cell['source']) for cell in cells(path) if cell['cell_type'] == 'markdown')
def shown(path):
    "The markdown that the cells of a notebook show"
    return '\n'.join(''.join(o['data']['text/markdown']) for cell in cells(path) for o in cell.get('outputs', [])
        if 'text/markdown' in o.get('data', {}))

def test_the_readme_is_short():
    readme = text_of('README.md')
    assert len(readme.splitlines()) <= 120 and len(readme.split()) <= 900

# Numbers

def test_which_method_is_computed_from_the_committed_results():
    import which
    assert which.table() in text_of('README.md') and which.table() in shown('nbs/explanations/which.ipynb')

def test_intervals_and_choice():
    import which
    d = np.array([1., 2., 3.])
    assert which.interval(d) == pytest.approx((2, 2-4.303/3**.5, 2+4.303/3**.5, 3), abs=1e-3) # t with two degrees of freedom
    runs = {'none': (1, 2, 3), 'MixUp(1)': (2, 3, 5), 'CutMix(1)': (9, 2, 4)}
    rows = [dict(method=m, seed=str(s), accuracy=str(a)) for m,accs in runs.items() for s,a in enumerate(accs)]
    assert which.best(which.gains(rows)) is None
    rows += [dict(method='RegMixUp', seed=str(s), accuracy=str(a)) for s,a in enumerate((2, 3, 4.1))]
    what,use,gain,mixup,n = which.line('x', rows)
    assert (use, gain, n) == ('`RegMixUp()`', '+1.0 [+0.9, +1.2]', 3) and mixup == '+1.3 [−0.1, +2.8]'

def test_costs_are_the_committed_ones():
    def measured(name, threads, size, unit):
        rows = json.loads(text_of(f'benchmarks/results/{name}_{threads}.json'))['rows']
        ours = 'MixUp' if name == 'steps' else 'fastai_mixup'
        return next(f'{row[unit][0]:.2f}' for row in rows if (row['size'], row['contestant']) == (size, ours))
    rows = [('inputs', '64x3x224x224', 'x fastai'), ('inputs', '64x3x224x224', 'x one memory pass'), ('inputs', '128x1x28x28', 'x fastai'),
        ('losses', '1024x32000', 'x fastai'), ('losses', '1024x32000', 'x plain'), ('losses', '64x10', 'x fastai'),
        ('losses', '64x10', 'x plain'), ('steps', '64x3x64x64', 'x plain')]
    table = [[cell.strip() for cell in line.split('|')[3:5]] for line in shown('nbs/explanations/speed.ipynb').split('\n')[2:]]
    assert table == [[measured(name, threads, size, unit) for threads in (1, 2)] for name,size,unit in rows]

# Names and words

def test_all_methods_are_in_the_table():
    from fastai_mixup import registry
    table = prose('nbs/explanations/methods.ipynb')
    for o in (*registry.METHODS, *registry.AROUND, *registry.LOSSES): assert re.search(rf'\| \[`{o.__name__}\b', table), o
    for kind,os in (('pairing', registry.PAIRINGS), ('labels', registry.LABEL_RULES)):
        for o in os: assert f'[`{kind}={o.__name__}(' in table, o

def test_the_gallery_has_all_that_need_no_model():
    pytest.importorskip('matplotlib')
    from pictures import drawn_without_model, of_name
    pictures = shown('nbs/explanations/gallery.ipynb')
    for cls in drawn_without_model():
        assert (root/'nbs/images/gallery'/of_name(cls)).exists(), 'python docs/pictures.py draws it'
        assert of_name(cls) in pictures, 'python docs/execute.py nbs/explanations/gallery.ipynb shows it'

def test_messages_of_the_page_on_troubleshooting_are_those_of_the_code():
    def parts(node):
        "The text of a string, whose fields are cut out"
        values = node.values if isinstance(node, ast.JoinedStr) else [node]
        return '\0'.join(v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))
    said = '\n'.join(parts(node) for p in (root/'fastai_mixup').rglob('*.py') for node in ast.walk(ast.parse(p.read_text(encoding='utf-8')))
        if isinstance(node, (ast.JoinedStr, ast.Constant)))
    quoted = re.findall('“(.+?)”', ''.join(re.findall('^###.*$', prose('nbs/explanations/troubleshooting.ipynb'), re.M)))
    assert len(quoted) > 25 and [message for message in quoted if message not in said] == []

REPLACED = re.compile(r'\b(dials?|doses?|told|settled?|lent|lender|borrow\w*|armed|kin|beside|alike|refused|weigh(?:s|ed)|path law|once law'
    r'|at its place|which places|clear gain|clear loss)\b', re.I)
PAGES = ['nbs/index.ipynb', *(str(p.relative_to(root)) for kind in ('tutorials', 'explanations')
    for p in sorted((root/'nbs'/kind).glob('*.ipynb')))]

@pytest.mark.parametrize('page', PAGES)
def test_words_are_those_of_the_glossary(page):
    text = re.sub('```.*?```|`[^`\n]+`', '', prose(page), flags=re.S)
    assert sorted({m.group() for m in REPLACED.finditer(text)}) == []

# Snippets

PRELUDE = '''
import sys, torchvision
from pathlib import Path
import numpy as np
from PIL import Image
import matplotlib; matplotlib.use('Agg')
import torchvision.models._api as api
api.load_state_dict_from_url = lambda url, **kw: getattr(torchvision.models, url.split('/')[-1].split('-')[0])().state_dict()
import fastai.data.external
fastai.data.external.untar_data = lambda *args, **kwargs: Path('data')
'''

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Photographs in the layout of Imagenette"
    path,rng = tmp_path_factory.mktemp('readme'),np.random.default_rng(0)
    for part,n in ('train', 16), ('val', 4):
        for name in 'church', 'dog':
            (path/'data'/part/name).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path/'data'/part/name/f'{i}.jpg')
    return path

def run(code, folder):
    (folder/'snippet.py').write_text(PRELUDE + code, encoding='utf-8')
    done = subprocess.run([sys.executable, '-W', 'ignore', 'snippet.py'], cwd=folder, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]

def snippets(path): return re.findall('```python\n(.*?)```', text_of(path), re.S)

@pytest.mark.slow
def test_the_quick_start_runs_when_pasted(folder):
    quick = snippets('README.md')[0]
    assert 'vision_learner(' in quick
    run(quick.replace('Resize(128)', 'Resize(32)').replace("item_tfms", "bs=8, num_workers=0, device='cpu', item_tfms"), folder)

OTHER_DATA = '''
from fastai.text.all import *
from fastai.tabular.all import *
from fastai.vision.all import *
from fastai_mixup.all import *
from functools import partial
cpu = dict(num_workers=0, device='cpu')
mask = (torch.rand(8, 32, 32) > .5).long()
class Masks(list): loss_func = CrossEntropyLossFlat(axis=1)
masks = DataLoaders.from_dsets(Masks((TensorImage(torch.rand(3, 32, 32)), TensorMask(m)) for m in mask), [], bs=4, **cpu)
masks.c = 2
df = pd.DataFrame(dict(kind=['a', 'b']*20, size=np.random.randn(40), label=['yes', 'no', 'no', 'yes']*10))
df['text'] = ['one two three', 'four five']*20
rows = TabularDataLoaders.from_df(df, cat_names=['kind'], cont_names=['size'], y_names='label', procs=[Categorify, Normalize], bs=8,
    device='cpu')
vocab = ['xxunk', 'xxpad', *'one two three four five'.split()]
texts = TextDataLoaders.from_df(df, text_col='text', label_col='label', bs=8, text_vocab=vocab, **cpu)
text_classifier_learner = partial(text_classifier_learner, pretrained=False)
model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
tiny = DataLoaders.from_dsets([(torch.rand(3, 4, 4), i % 3) for i in range(12)], [], bs=6, **cpu)
'''

@pytest.mark.slow
def test_the_calls_for_other_data_run(folder):
    lines = [line.split('#')[0].strip() for line in snippets('README.md')[1].strip().split('\n')]
    assert len(lines) == 4
    code = OTHER_DATA
    for line,dls in zip(lines, ('masks', 'rows', 'texts', 'tiny'), strict=True):
        code += f'dls = {dls}\nlearn = {line}\nwith learn.no_bar(), learn.no_logging(): learn.fit(1)\n'
    run(code, folder)

IMAGES = '''
import timm, torchvision
from fastai.vision.all import *
create = timm.create_model
timm.create_model = lambda *args, pretrained=False, **kwargs: create(*args, **kwargs)
class Items(list): loss_func = CrossEntropyLossFlat()
class Masks(list): loss_func = CrossEntropyLossFlat(axis=1)
def images(side): return loaders(Items((TensorImage(torch.rand(3, side, side)), TensorCategory(i % 2)) for i in range(8)))
def masks(side):
    return loaders(Masks((TensorImage(torch.rand(3, side, side)), TensorMask(torch.randint(2, (side, side)))) for i in range(8)))
def loaders(items):
    dls = DataLoaders.from_dsets(items, [], bs=4, num_workers=0, device='cpu')
    dls.c,dls.vocab = 2,['a', 'b']
    return dls
def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
'''

@pytest.mark.slow
def test_the_calls_on_the_pages_of_methods_run(folder):
    pages = [p for p in sorted((root/'nbs/api').glob('*.ipynb')) if re.match('20|21|3[1-9]|4', p.name)]
    code,n = IMAGES,0
    for page in pages:
        for snippet in re.findall('```python\n(from.*?|import.*?)```', prose(page.relative_to(root)), re.S)[:1]:
            side,snippet = 224 if 'vit' in snippet else 32,snippet.replace('resnet34', 'resnet18').replace('vit_small', 'vit_tiny')
            code += f"dls = {'masks' if 'unet' in snippet else 'images'}({side})\n"
            code += f'{snippet}fit(learn)\n'
            n += 1
    assert n == len(pages)
    run(code, folder)
