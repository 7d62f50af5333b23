"What is claimed, what the workflow runs, the pins of the oldest and the table of what ran agree"
import csv
import importlib.util
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def number(version): return [int(n) for n in re.findall(r'\d+', version.split('+')[0])]
def named(requirements, sep): return dict(r.split(sep) for r in requirements if sep in r)


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('versions', root/'compatibility/versions.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def claimed():
    config = ConfigParser()
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


@pytest.fixture(scope='module')
def pins(): return named((root/'compatibility/oldest.txt').read_text(encoding='utf-8').split('\n'), '==')


@pytest.fixture(scope='module')
def ran(script):
    with script.RESULTS.open(encoding='utf-8') as f: return list(csv.DictReader(f))


def is_oldest(row, pins): return all(number(row[p]) == number(v) for p,v in pins.items())


def test_the_oldest_pins_are_the_lower_bounds(claimed, pins):
    bounds = named(claimed['requirements'].split(), '>=')
    assert set(pins) == {*bounds, 'torchvision'}
    for package,bound in bounds.items():
        assert number(pins[package])[:len(number(bound))] == number(bound) and not any(number(pins[package])[len(number(bound)):])


def test_the_workflow_runs_every_python_and_the_oldest_row(script, claimed):
    newest = [python for python,pins in script.matrix().values() if not pins]
    first = number(claimed['min_python'])
    assert [number(python) for python in newest] == [[3, minor] for minor in range(first[1], first[1]+len(newest))]
    assert [row for row in script.matrix().values() if row[1]] == [(claimed['min_python'], 'compatibility/oldest.txt')]


def test_every_row_of_the_workflow_ran(script, pins, ran):
    for python,pinned in script.matrix().values():
        rows = [row for row in ran if number(row['python'])[:2] == number(python) and is_oldest(row, pins) == bool(pinned)]
        assert rows and rows[-1]['failed'] == '0' and int(rows[-1]['passed']) > 500, (python, pinned)
        assert pinned or rows[-1]['notebooks'] == 'passed'


def test_a_python_that_is_not_there_is_none(script, tmp_path): assert script.interpreter('3.99', tmp_path) is None
