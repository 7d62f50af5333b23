"""The tests on each row of the workflow's matrix that this machine can run: every Python with the newest fastai and torch, one with the
oldest that settings.ini claims.

    python compatibility/versions.py --pythons ~/.pyenv/versions --quick

Each row gets a virtual environment of its own, where the project is installed as the workflow installs it: with what its development
needs, or with pins (`oldest.txt`) and what its tests need, since nbdev wants a newer fastcore than the oldest fastai takes. There the
tests of the notebooks and those of `tests/` run, and what came out is appended to `results/versions.csv`. A Python that is not on the
machine is named. Other versions than those of the matrix are tried with another file of pins: `--only 3.10-oldest --pins FILE`.
"""
import csv
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

import yaml
from fastcore.script import call_parse, store_true

root = Path(__file__).resolve().parent.parent
RESULTS = root/'compatibility/results/versions.csv'
COLUMNS = 'python', 'torch', 'fastai', 'torchvision', 'tests', 'passed', 'failed', 'skipped', 'notebooks', 'seconds'
PACKAGES = COLUMNS[1:4]
# lean most on the insides of torch, fastai and Python
QUICK = 'life', 'losses', 'inputs', 'draws', 'schedules', 'other_callbacks', 'memory', 'labels', 'saving', 'metrics'


def matrix():
    "The rows of the workflow by name: Python, and the file of pins, which is empty for the newest of all"
    rows = yaml.safe_load((root/'.github/workflows/test.yaml').read_text(encoding='utf-8'))['jobs']['test']['strategy']['matrix']
    pinned = {f"{row['python']}-{Path(row['pins']).stem}": (row['python'], row['pins']) for row in rows['include']}
    return {python: (python, pins) for python in rows['python'] for pins in rows['pins']} | pinned


def run(*command, **env):
    "Code and output of a command"
    done = subprocess.run(command, cwd=root, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode,done.stdout


def interpreter(python, folder):
    "The path of this version, in `folder` or else on PATH; `None` if it is in neither"
    paths = [*sorted(Path(folder).expanduser().glob(f'{python}.*/bin/python{python}')), shutil.which(f'python{python}')]
    return next((str(p) for p in paths if p and run(str(p), '--version')[0] == 0), None)


def build(python, venv, pins):
    "Make the environment; what pip says, if it fails"
    run(python, '-m', 'venv', str(venv))
    failed,said = run(str(venv/'bin/python'), '-m', 'pip', 'install', '-q', '-e', '.[test]' if pins else '.[dev]', PIP_CONSTRAINT=pins)
    if failed: shutil.rmtree(venv)
    return said if failed else ''


def notebooks(venv):
    "The tests of the notebooks: `passed`, which failed, or `not run`"
    command = venv/'bin/nbdev-test'
    if not command.exists(): return 'not run',[]
    failed,said = run(str(command))
    if not failed: return 'passed',[]
    return ' '.join(sorted(set(re.findall(r'\w+\.ipynb', said)))) or 'failed',said.splitlines()[-20:]


def tests(venv, quick):
    "What pytest counts in `tests/`, and what it says of failures"
    said = run(str(venv/'bin/python'), '-m', 'pytest', *(f'tests/test_{name}.py' for name in QUICK if quick))[1].splitlines()
    found = {what: int(n) for n,what in re.findall(r'(\d+) (passed|failed|skipped|error)', said[-1])}
    count = lambda *names: sum(found.get(name, 0) for name in names)
    if not found: return dict(passed=0, failed=1, skipped=0),said[-20:]
    return dict(passed=count('passed'), failed=count('failed', 'error'),
        skipped=count('skipped')),[s for s in said if s.startswith(('FAILED', 'ERROR'))]


def installed(venv):
    "Versions of Python and the packages"
    ask = f'import platform; from importlib.metadata import version; print(platform.python_version(), *map(version, {PACKAGES}))'
    return dict(zip(COLUMNS, run(str(venv/'bin/python'), '-c', ask)[1].split()))


def scored(venv, quick):
    "Run the tests in `venv`; the row of the table, and what was said of failures"
    start = perf_counter()
    (nbs,complaints),(counts,failures) = notebooks(venv),tests(venv, quick)
    return installed(venv) | counts | dict(tests='quick' if quick else 'all', notebooks=nbs,
        seconds=round(perf_counter()-start)),complaints+failures


def append(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open('a', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        if new: writer.writeheader()
        writer.writerow(row)


@call_parse
def main(
    pythons:str='~/.pyenv/versions', # Folder of interpreters, one folder for each version; what it has not is looked for on PATH
    only:str='', # Some of the rows, separated by commas, such as '3.12,3.10-oldest'; all by default
    pins:str='', # A file of pins instead of those of the matrix
    quick:store_true=False, # Only the tests that lean most on the insides of torch, fastai and Python?
    venvs:str='', # Folder in which the environments stay, and are used if they are there; a temporary one by default
    results:str=str(RESULTS), # Table
):
    "Install and test"
    rows = matrix()
    names = only.split(',') if only else [*rows]
    if unknown := set(names)-set(rows): raise SystemExit(f"--only must be some of {', '.join(rows)}, got {', '.join(sorted(unknown))}")
    bad = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            venv,(python,pinned) = Path(venvs or temporary).resolve()/name,rows[name]
            if (found := interpreter(python, pythons)) is None:
                print(f'{name}: not run, there is no Python {python} here')
                continue
            said = '' if venv.exists() else build(found, venv, str(Path(pins).resolve()) if pins else pinned)
            row,failures = ({}, ['cannot be installed', said]) if said else scored(venv, quick)
            print(f'{name}:', ', '.join(f'{k} {v}' for k,v in row.items()), *failures, sep='\n  ', flush=True)
            if row: append(Path(results), row)
            if failures: bad.append(name)
            if not venvs: shutil.rmtree(venv, ignore_errors=True)
    if bad: raise SystemExit(f"Failed: {', '.join(bad)}")
