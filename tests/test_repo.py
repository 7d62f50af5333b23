"Notebooks, package, README and configuration agree"
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastai.basics import DataLoaders, Learner, nn

root = Path(__file__).resolve().parent.parent


def run(*command, cwd): return subprocess.run(command, cwd=cwd, capture_output=True, text=True)
def tool(name): return str(Path(sys.executable).parent/name)


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A copy of what git knows, as it is in the working tree"
    pytest.importorskip('nbdev', reason='nbdev 3.3 needs fastcore 2.1, and fastai before 2.8.6 takes none after 1.8')
    dest = tmp_path_factory.mktemp('clone')
    files = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=root).stdout.split()
    for name in filter(lambda name: (root/name).is_file(), files):
        (dest/name).parent.mkdir(parents=True, exist_ok=True)
        (dest/name).write_bytes((root/name).read_bytes())
    return dest


def contents(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8') for p in sorted(folder.rglob(pattern))}


def test_package_is_exported_from_the_notebooks(clone):
    result = run(tool('nbdev-export'), cwd=clone)
    assert result.returncode == 0, result.stderr
    assert contents(clone/'fastai_mixup', '*.py') == contents(root/'fastai_mixup', '*.py')


def test_notebooks_are_clean(clone):
    assert run(tool('nbdev-clean'), cwd=clone).returncode == 0
    assert contents(clone/'nbs', '*.ipynb') == contents(root/'nbs', '*.ipynb')


def test_readme_is_written_from_the_index():
    result = run(sys.executable, '.ci/readme.py', '--check', cwd=root)
    assert result.returncode == 0, result.stderr


def test_readme_links_exist():
    links = re.findall(r'\]\((?!https?:)([^)#]+)\)', (root/'README.md').read_text(encoding='utf-8'))
    assert links and all((root/link).exists() for link in links)


def test_the_protocols_of_contributing_run():
    from fastai_mixup.callback import MixUp
    from fastai_mixup.tools.testing import check_method
    names = {}
    for code in re.findall('```python\n(.*?)```', (root/'CONTRIBUTING.md').read_text(encoding='utf-8'), re.S): exec(code, names)
    check_method(names['HalfMethod']())
    assert repr(names['Half']()) == 'Half(alpha=1)'
    x = torch.eye(6)
    for kwargs in dict(pairing=names['neighbour']), dict(labels=names['squared']):
        learn = Learner(DataLoaders([(x, torch.arange(6) % 3)], []), nn.Linear(6, 3), nn.CrossEntropyLoss(), cbs=MixUp(1., **kwargs))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_contributing_names_files_that_exist():
    text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    files = {p.stem for folder in ('nbs', 'tests') for p in (root/folder).rglob('*') if p.is_file()}
    named = re.findall(r'`((?:nbs/api/)?\d\d_\w+|test_\w+)`', text)
    assert len(named) > 30 and [name for name in named if Path(name).name not in files] == []

def test_notebooks_are_small():
    assert all(p.stat().st_size < 300_000 for p in (root/'nbs').rglob('*.ipynb'))


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    result = run(sys.executable, 'examples/digits.py', '--seeds', '2', '--epochs', '1', '--n-train', '50', '--out', str(tmp_path/'a.png'),
        cwd=root)
    assert result.returncode == 0, result.stderr
    assert 'ManifoldMixUp(1)' in result.stdout and (tmp_path/'a.png').stat().st_size > 10_000


def test_stored_outputs_are_no_warnings():
    cells = [cell for p in (root/'nbs').rglob('*.ipynb') for cell in json.loads(p.read_text(encoding='utf-8'))['cells']]
    assert not [o for cell in cells for o in cell.get('outputs', []) if o.get('name') == 'stderr']

def test_imports_have_cells_of_their_own():
    "What builds the documentation executes cells with imports, and no others that are not exported"
    for path in (root/'nbs').rglob('*.ipynb'):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] != 'code' or path.stem == 'index' or re.search(r'^#\|\s*(export|eval: *false)', source, re.M): continue
            body = ast.parse(source).body
            imports = [isinstance(o, (ast.Import, ast.ImportFrom)) for o in body]
            assert all(imports) or not any(imports), (path.stem, source[:200])
