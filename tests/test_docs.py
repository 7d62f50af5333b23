"The website: what is changed in the notebooks on their way, and that all of them get there"
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('nbdev')
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'docs'))

@pytest.fixture(scope='module')
def build():
    spec = importlib.util.spec_from_file_location('build', root/'docs/build.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_every_notebook_has_a_place(build):
    names = [p.relative_to(root/'nbs').with_suffix('').as_posix() for p in (root/'nbs').rglob('*.ipynb')]
    text = build.contents(names)
    assert sorted(re.findall(r'^(?!#|```|:)(?:.+ <)?([^\s>]+)>?$', text, re.M)) == sorted(names)
    with pytest.raises(SystemExit, match='in no part of the table of contents: elsewhere/new'): build.contents([*names, 'elsewhere/new'])

def test_idioms(build):
    assert build.as_markdown('x - y [a](b.ipynb){target="_blank"} [c](../examples/d.py)') == (
        'x - y [a](b.ipynb) [c](https://github.com/fastai-mixup/fastai_mixup/blob/main/examples/d.py)')

def test_second_names_lead_to_their_page(build):
    page = 'https://fastai-mixup.github.io/fastai_mixup/api/callback.html#mixup'
    assert build.linked('# `MixUpCallback`\n`MixUpCallback` and `Plan`, [`MixUpCallback`](there)') == (
        f'# `MixUpCallback`\n[`MixUpCallback`]({page}) and `Plan`, [`MixUpCallback`](there)')

def test_published_links_stay_inside(build, tmp_path):
    (tmp_path/'api').mkdir()
    (tmp_path/'api/20_callback.html').write_text('<p id="draw-plans">')
    (tmp_path/'index.html').write_text('<a href="https://fastai-mixup.github.io/fastai_mixup/api/callback.html#draw_plans">')
    build.keep_inside(tmp_path)
    assert (tmp_path/'index.html').read_text() == '<a href="api/20_callback.html#draw-plans">'
    (tmp_path/'index.html').write_text('<a href="https://fastai-mixup.github.io/fastai_mixup/api/callback.html#gone">')
    with pytest.raises(SystemExit, match='lead nowhere: .*api/callback.html#gone'): build.keep_inside(tmp_path)

def test_cells(build):
    code = dict(cell_type='code', id='a', source='#| echo: false\n1+1', outputs=[], metadata={})
    assert build.page(code)['source'] == '1+1' and build.page(code)['metadata'] == dict(tags=['remove-input'])
    assert build.page(dict(cell_type='raw', source='---\ntitle: x\n---')) is None
    with pytest.raises(SystemExit, match='holds an error: ValueError: no'):
        build.page(code | dict(outputs=[dict(output_type='error', ename='ValueError', evalue='no')]))

def cells():
    for path in (root/'nbs').rglob('*.ipynb'): yield from json.loads(path.read_text(encoding='utf-8'))['cells']

def test_no_stored_output_is_an_error():
    for cell in cells(): assert not any(o['output_type'] == 'error' for o in cell.get('outputs', []))

def test_no_heading_ends_with_a_dash_at_which_nbdev_leaves_its_cell_out():
    for cell in cells():
        assert cell['cell_type'] != 'markdown' or not re.search(r'^#+ .* -$', ''.join(cell['source']), re.M), cell['source']

def test_entries():
    from entries import Entry, call

    from fastai_mixup.all import MixUp
    from fastai_mixup.batch import draw_lam
    from fastai_mixup.callback import MixCallback
    said = Entry(MixUp)._repr_markdown_()
    assert '### MixUp' in said and "MixUp(alpha=0.4, p=1.0, fold=True, per='item'" in said and '# Param' not in said
    assert "\n\n|  | type | default |  |\n| --- | --- | --- | --- |\n| `alpha` | `float \\| Callable` | `0.4` | Of Beta" in said
    assert 'common to all mixing callbacks' in said and '`spatial_dims`' not in said
    said = Entry(MixCallback)._repr_markdown_()
    assert r'`bool \| None`' in said and 'NoneType' not in said and '`spatial_dims`' in said
    assert '| `minmax` |' in Entry(type('CutMix', (MixCallback,), {}))._repr_markdown_(), 'a class without source, as in a notebook'
    said = Entry(draw_lam)._repr_markdown_()
    assert '|  | type | default |  |\n' in said and '| *returns* | `Tensor` |  | ' in said
    assert max(map(len, call('f', {f'argument{i}': dict(default=i) for i in range(20)}).split('\n'))) < 96
    def bare(a, *b, **c): "Bare"
    assert 'bare(a, *b, **c)\n```\n\nBare' in Entry(bare)._repr_markdown_() and '|' not in Entry(bare)._repr_markdown_()

def look(site): return subprocess.run([sys.executable, root/'docs/look.py', site], capture_output=True, text=True, timeout=550)

@pytest.mark.slow
def test_website(tmp_path):
    for package in 'sphinx', 'myst_nb', 'furo', 'latex2mathml': pytest.importorskip(package)
    done = subprocess.run([sys.executable, root/'docs/build.py', '--out', tmp_path], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in (root/'nbs').rglob('*.ipynb'): assert (tmp_path/path.relative_to(root/'nbs').with_suffix('.html')).exists()
    assert 'ManifoldMixUp'.lower() in (tmp_path/'searchindex.js').read_text(encoding='utf-8')
    for page in tmp_path.rglob('*.html'):
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', page.read_text(encoding='utf-8')), page
    if shutil.which('chromium') is None: return
    seen = look(tmp_path)
    assert seen.returncode == 0 and 'ManifoldMixUp is found on' in seen.stdout, seen.stderr[-3000:]
    (tmp_path/'index.html').write_text('<!doctype html><img src="none.png"><script>nothing()</script><p style="width: 500px">x')
    seen = look(tmp_path)
    for what in 'index.html at 390 px: wider than the screen', 'index.html at 1280 px: no picture', 'nothing is not defined':
        assert what in seen.stderr, seen.stderr[-3000:]
