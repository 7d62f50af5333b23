"What the experiments share: a table of results that a stopped run goes on with, scores, and statistics paired by seed"
import csv
from pathlib import Path
from time import perf_counter

import numpy as np
import torch.nn.functional as F
from fastprogress.fastprogress import progress_bar
from scipy.stats import t

RESULTS = Path(__file__).parent/'results'


def calibration_error(prob, y, bins=15):
    "Expected calibration error: mean distance of confidence and accuracy over equal intervals of confidence"
    confidence,guess = prob.max(1)
    right,at = (guess == y).float(),(confidence*bins).long().clamp_max(bins-1)
    return sum((right[at == b].mean()-confidence[at == b].mean()).abs().item()*(at == b).float().mean().item() for b in at.unique())


def class_scores(logits, y):
    "Accuracy in %, negative log-likelihood and calibration error"
    return dict(accuracy=(logits.argmax(1) == y).float().mean().item()*100, nll=F.cross_entropy(logits, y).item(),
        ece=calibration_error(logits.softmax(1), y))


def text(value): return f'{value:.6g}' if isinstance(value, float) else str(value)


class Table:
    "Rows of a CSV file, one for each run; several processes can fill it"
    def __init__(self, name, folder=RESULTS):
        self.path = Path(folder)/f'{name}.csv'
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self):
        "Those that were written whole, each once"
        if not self.path.exists(): return []
        whole = [r for r in csv.DictReader(self.path.open()) if None not in r.values()]
        return list({tuple(v for k,v in r.items() if k != 'seconds'): r for r in whole}.values())

    def done(self, **key): return any(all(r[k] == text(v) for k,v in key.items()) for r in self.rows)

    def add(self, **row):
        row = {k: text(v) for k,v in row.items()}
        new = not self.path.exists() or '\n' not in self.path.read_text()
        with self.path.open('w' if new else 'a', newline='') as f:
            writer = csv.DictWriter(f, row)
            if new: writer.writeheader()
            elif not self.path.read_text().endswith('\n'): f.write('\n') # a run was stopped while it wrote
            writer.writerow(row)


def check_positive(**numbers):
    "Leave with a message that names the first that is below 1"
    for name,value in numbers.items():
        if value < 1: raise SystemExit(f"--{name} must be a whole number from 1 up, got {value}")


def names(text, separator):
    "The names in an option"
    return [name.strip() for name in text.split(separator) if name.strip()]


def run_all(table, jobs, run):
    "Run each of `jobs`, (key, arguments of `run`), that is not in `table` yet; `run` returns the scores"
    left = [(key, args) for key,args in jobs if not table.done(**key)]
    if len(left) < len(jobs):
        print(f"{len(jobs)-len(left)} of {len(jobs)} trainings are in {table.path} already; --results FOLDER begins a table of your own")
    for key,args in progress_bar(left):
        if table.done(**key): continue # by another process
        start = perf_counter()
        scores = run(*args)
        table.add(**key, **scores, seconds=perf_counter()-start)


def mean_sd(values, digits=2, sign=''):
    "As text, with the sample standard deviation if there is one"
    values = np.array(values, dtype=float)
    mean = f'{values.mean():{sign}.{digits}f}'
    return f'{mean} ± {values.std(ddof=1):.{digits}f}' if len(values) > 1 else mean


def paired(rows, name, base, by, score):
    "The differences of `score` between two methods, seed by seed"
    of = lambda n: {r['seed']: float(r[score]) for r in rows if r[by] == n}
    ours,theirs = of(name),of(base)
    return np.array([ours[s]-theirs[s] for s in sorted(ours.keys() & theirs.keys())])


def is_clear(differences):
    "Does the 95% interval of the mean, by Student's t, leave out 0?"
    n = len(differences)
    return n > 2 and abs(differences.mean()) > t.ppf(.975, n-1)*differences.std(ddof=1)/n**.5


def report(rows, by='method', base='none', scores=('accuracy', 'nll', 'ece'), digits=3):
    "Mean ± sd of each score for each method, and the gain of the first score over `base`, paired by seed"
    lines = [f"{by:30}" + ''.join(f'{s:>18}' for s in scores) + f"{'gain':>18}{'better in':>12}"]
    for name in dict.fromkeys(r[by] for r in rows):
        mine = [r for r in rows if r[by] == name]
        line = f'{name:30}'
        for s in scores: line += f"{mean_sd([r[s] for r in mine], digits):>18}"
        if name != base and (d := paired(rows, name, base, by, scores[0])).size:
            line += f"{mean_sd(d, sign='+'):>17}{'*' if is_clear(d) else ' '}{f'{(d > 0).sum()} of {len(d)}':>12}"
        lines.append(line.rstrip())
    return '\n'.join([*lines, '', '* the 95% interval of the mean paired gain leaves out 0'])
