"""Execute notebooks and store what they show: `python docs/execute.py nbs/api/31_cutmix.ipynb`, or `nbs` for all of them.

A notebook is written only if all of its cells run, none of them warns, and it stays small enough to be read in a browser. Pictures have
the resolution that their cell asks for; one thread, so that small models train as fast while others use the machine.
"""
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false')

from execnb.shell import CaptureShell
from fastcore.nbio import read_nb, write_nb
from fastcore.script import call_parse
from fastcore.xtras import working_directory
from nbdev.clean import nbdev_clean

root = Path(__file__).resolve().parent.parent
LARGEST = 300_000 # bytes

def is_skipped(cell): return cell.cell_type == 'code' and bool(re.search(r'^#\| *eval: *false', cell.source, re.M))

def check(nb, path):
    "Raise an error that names the cell at fault"
    for cell in nb.cells:
        for o in cell.get('outputs', []):
            if o.output_type == 'error': raise SystemExit(f"{path}: {o.ename}: {o.evalue}, in the cell\n{cell.source}")
            if o.get('name') == 'stderr': raise SystemExit(f"{path}: {''.join(o.text)}, from the cell\n{cell.source}")

def execute(path):
    "Run the notebook in its folder, and store its outputs"
    warnings.filterwarnings('ignore', '.*torch.jit.script. is deprecated') # by what fastai imports
    path = Path(path).resolve()
    nb,before = read_nb(path),path.read_bytes()
    with working_directory(path.parent): CaptureShell(path, mpl_format='png').run_all(nb, exc_stop=False, preproc=is_skipped)
    check(nb, path.name)
    write_nb(nb, path)
    nbdev_clean(fname=str(path))
    if path.stat().st_size < LARGEST: return
    path.write_bytes(before)
    raise SystemExit(f"{path.name} must be smaller than {LARGEST:,} bytes: give its figures a smaller `figsize` or `dpi`")

@call_parse
def main(
    path:str, # Notebook, or folder of notebooks
):
    "Each in a process of its own"
    if Path(path).is_file(): return execute(path)
    failed = []
    for notebook in sorted(Path(path).rglob('*.ipynb')):
        print(notebook, flush=True)
        if subprocess.run([sys.executable, __file__, str(notebook)]).returncode: failed.append(notebook.name)
    if failed: raise SystemExit(f"Not executed: {', '.join(failed)}")
