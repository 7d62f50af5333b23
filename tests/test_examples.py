"The script of the Imagenette leaderboard, on a generated folder in the same layout"
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent/'examples/train_imagenette.py'
sys.path.insert(0, str(SCRIPT.parent))
from train_imagenette import main

pytestmark = pytest.mark.slow

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root,rng = tmp_path_factory.mktemp('nette'),np.random.default_rng(0)
    for part,n in ('train', 8), ('val', 4):
        for name in 'n01', 'n02', 'n03':
            (root/part/name).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(root/part/name/f'{i}.jpg')
    return root

def small(folder): return dict(data=str(folder), size=32, epochs=1, arch='xresnet18', bs=4, workers=0, seed=0)

@pytest.mark.parametrize('settings', [dict(), dict(mixup=.2, cutmix=1.), dict(manifold=.2, sa=True, act='ReLU', opt='sgd', smoothing=0.)],
    ids=['plain', 'mixed', 'manifold'])
def test_one_process(folder, settings, capsys):
    main(**small(folder), runs=2, **settings)
    out = capsys.readouterr().out
    assert 'Run 0: ' in out and '2 runs: ' in out

def test_two_processes(folder):
    options = [o for k,v in small(folder).items() for o in (f'--{k}', str(v))]
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', '2', SCRIPT, *options,
        '--mixup', '.2'],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('Run 0: ') == 1 and '/3 ' in done.stdout # 12 of the 24 images on each, four at a time

def test_by_accelerate(folder):
    options = [o for k,v in small(folder).items() for o in (f'--{k}', str(v))]
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1', SCRIPT,
        *options, '--cutmix', '1'],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count('Run 0: ') == 1, done.stderr[-2000:]

@pytest.mark.parametrize('settings,said', [
    (dict(data='nowhere'), "data must be a folder in Imagenette's layout"), (dict(arch='vgg'), 'arch must be one of xresnet18'),
    (dict(act='Linear'), 'act must be one of Mish'),
    (dict(pool='Pool'), 'pool must be one of AvgPool, MaxPool'), (dict(opt='lamb'), 'opt must be one of ranger'),
    (dict(manifold=.2, mixup=.2), 'manifold must be 0 together with --mixup'),
    *[({name: value}, f'{name} must be .*, got {value}') for name,
    value in dict(size=0, epochs=0, runs=0, mixup=-1., cutmix=-1., manifold=float('nan'), wd=-1., workers=-1,
                                                                              lr=-1., eps=0., mom=1., sqrmom=-.1, smoothing=2.).items()],
    (dict(bs=1), 'bs must be a whole number from 2 up'), (dict(bs=1000), 'bs must be at most the 24 images')],
    ids=lambda o: '-'.join(o) if isinstance(o, dict) else '')
def test_what_makes_no_sense_is_refused(folder, settings, said):
    with pytest.raises(SystemExit, match=f'^--{said}'): main(**(small(folder) | settings))

def test_folders_without_images(folder, tmp_path, capsys):
    root = tmp_path/'nette'
    shutil.copytree(folder, root)
    for name in 'empty', '.hidden': (root/'train'/name).mkdir()
    main(**small(root))
    assert 'Run 0: ' in capsys.readouterr().out
    (root/'val/n01').rename(root/'val/n09')
    with pytest.raises(SystemExit, match='^--data must be a folder in which all classes are in train/, which has no n09'):
        main(**small(root))
    for image in (root/'val').rglob('*.jpg'): image.unlink()
    with pytest.raises(SystemExit, match='with val/CLASS/IMAGE in it'): main(**small(root))
