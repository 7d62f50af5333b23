"What is published: the wheel and the source distribution, each installed where nothing of the repository is to be seen"
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastai_mixup

root = Path(__file__).resolve().parent.parent

def run(*command, cwd, **kwargs):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout

def test_the_version_stands_in_one_place():
    version = fastai_mixup.__version__
    assert re.search(rf'^## {re.escape(version)}$', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    for name in 'setup.cfg', 'setup.py', 'settings.ini', 'pyproject.toml', 'CITATION.cff', 'README.md', 'docs/conf.py':
        assert version not in (root/name).read_text(encoding='utf-8'), name

@pytest.mark.parametrize('path', sorted((root/'.github').rglob('*.y*ml')), ids=lambda p: p.name)
def test_files_for_github_are_yaml(path):
    yaml = pytest.importorskip('yaml')
    assert isinstance(yaml.safe_load(path.read_text(encoding='utf-8')), dict)

def test_the_citation():
    yaml = pytest.importorskip('yaml')
    cited = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors', 'license'} <= set(cited)
    bibtex = re.search('```bibtex\n(.*?)```', (root/'README.md').read_text(encoding='utf-8'), re.S)[1]
    assert cited['title'] in bibtex and cited['repository-code'] in bibtex and cited['authors'][0]['name'] in bibtex

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "Both, built from a copy of what git knows"
    pytest.importorskip('build')
    folder = tmp_path_factory.mktemp('source')
    files = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=root).split()
    for name in filter(lambda name: (root/name).is_file(), files):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes((root/name).read_bytes())
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', 'dist', cwd=folder)
    return folder/'dist'

@pytest.mark.slow
def test_the_wheel_holds_the_package_only(dist):
    wheel, = dist.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names} == {'fastai_mixup', f'fastai_mixup-{fastai_mixup.__version__}.dist-info'}
    modules = {p.relative_to(root).as_posix() for p in (root/'fastai_mixup').rglob('*.py')}
    assert modules == {name for name in names if name.endswith('.py')}

@pytest.mark.slow
def test_twine_has_nothing_to_say(dist):
    pytest.importorskip('twine')
    run(sys.executable, '-m', 'twine', 'check', '--strict', *map(str, dist.iterdir()), cwd=dist)

@pytest.mark.slow
@pytest.mark.parametrize('kind', ['*.whl', '*.tar.gz'])
def test_what_is_published_imports(dist, kind, tmp_path):
    "In an environment of its own, which sees the dependencies that are installed here, after its own packages"
    run(sys.executable, '-m', 'venv', 'env', cwd=tmp_path)
    python = str(tmp_path/'env/bin/python')
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=tmp_path).strip())
    (site/'dependencies.pth').write_text(sysconfig.get_path('purelib'))
    published, = dist.glob(kind)
    run(python, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--force-reinstall', str(published), cwd=tmp_path)
    said = run(python, '-W', 'ignore', str(root/'tests/import_all.py'), cwd=tmp_path, env={'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path)})
    number,version,path = said.split()
    assert int(number) > 30 and version == fastai_mixup.__version__ and Path(path).is_relative_to(tmp_path)
