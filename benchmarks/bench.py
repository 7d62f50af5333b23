"What the benchmarks share: Learners with a stopwatch, run in turns; tables and plots of the ratios"
import argparse
import json
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, nn, to_device

RESULTS = Path(__file__).parent/'results'
PACKAGES = 'torch', 'torchvision', 'fastai', 'timm'


class Logits(torch.autograd.Function):
    "Hands out `logits`, and drops the gradient that comes back, as a model does after it has used it"
    @staticmethod
    def forward(ctx, anchor, logits): return logits.view_as(logits)
    @staticmethod
    def backward(ctx, grad): return grad.new_zeros(()), None


class GivenPredictions(nn.Module):
    "A model that costs nothing, so that what remains is the callback"
    def __init__(self, logits):
        super().__init__()
        self.anchor,self.logits = nn.Parameter(torch.zeros(())),logits

    def forward(self, *xb): return Logits.apply(self.anchor, self.logits)


def now(device):
    "The time, or on a GPU an event that will know it"
    if torch.device(device).type != 'cuda': return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    if isinstance(start, float): return end-start
    end.synchronize()
    return start.elapsed_time(end)/1e3


class TimedLearner(Learner):
    "Notes when `before_batch`, the loss (from `after_pred` to the end of backward) and the whole batch begin and end"
    def timed(self, what, f, *args):
        start = now(self.dls.device)
        f(*args)
        self.moments[what].append((start, now(self.dls.device)))

    def _call_one(self, event_name):
        if event_name == 'after_pred': self.predicted = now(self.dls.device)
        if event_name == 'before_batch': self.timed('inputs', super()._call_one, event_name)
        else: super()._call_one(event_name)

    def _backward(self):
        super()._backward()
        self.moments['loss'].append((self.predicted, now(self.dls.device)))

    def one_batch(self, i, b): self.timed('step', super().one_batch, i, b)


def learner(batch, model, cbs=None, loss_func=None, batches=12, device=None, **kwargs):
    "A Learner that trains on the same `batch` again and again; without a `device` on the CPU, whatever else there is"
    device = torch.device(device or 'cpu')
    dls = DataLoaders([to_device(batch, device)]*batches, [])
    dls._device = device # lists have none
    learn = TimedLearner(dls, model, loss_func or CrossEntropyLossFlat(), cbs=cbs, **kwargs)
    learn.moments = defaultdict(list)
    return learn


def in_turns(
    learners:dict, # Name: Learner
    what:str, # 'inputs', 'loss' or 'step'
    rounds:int, # How often each of them has its turn, of one epoch
    warm_up:int=2, # Batches of each turn that do not count
    average=median, # Of the batches of a turn; `mean` where some of the work is done for several batches at once
    until:float=float('inf'), # When to end, by `perf_counter`, after two rounds at least
)->dict: # Name: list of seconds, one for each turn
    "Train all `learners` by turns, so that what else the machine does falls on all of them alike"
    seconds = {name: [] for name in learners}
    for turn in range(rounds + 1):
        if turn > 1 and perf_counter() > until: break
        for name,learn in learners.items():
            learn.moments.clear()
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
            seconds[name].append(average(seconds_between(*o) for o in learn.moments[what][warm_up:]))
    return {name: s[1:] for name,s in seconds.items()}


def ratio(seconds, others):
    "Median, first and third quartile of the ratios, turn by turn"
    ratios = [a/b for a,b in zip(seconds, others)]
    low,_,high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios*3
    return median(ratios), low, high


def compare(seconds, against, **setting):
    "One row for each contestant"
    row = lambda name,s: {**setting, 'contestant': name, 'ms': 1e3*median(s),
                          **{f'x {other}': ratio(s, seconds[other]) for other in against if other in seconds}}
    return [row(name, s) for name,s in seconds.items()]


def cells(rows):
    "`rows` as lists of texts, the names of the columns first"
    def text(v):
        if isinstance(v, (tuple, list)): return f'{v[0]:.3g} ({v[1]:.3g} to {v[2]:.3g})'
        return f'{v:.4g}' if isinstance(v, float) else str(v)
    columns = list(dict.fromkeys(c for r in rows for c in r))
    return [columns, *([text(r.get(c, '')) for c in columns] for r in rows)]


def show(rows):
    "Print `rows` as a table"
    table = cells(rows)
    widths = [max(map(len, col)) for col in zip(*table)]
    for line in table: print('  '.join(cell.ljust(w) for cell,w in zip(line, widths)).rstrip())


def cpu_name():
    try: return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def machine():
    "Where the numbers come from"
    return dict(cpu=cpu_name(), threads=torch.get_num_threads(), system=platform.system(), python=platform.python_version(),
                **{p: version(p) for p in PACKAGES})


def save(name, rows, folder):
    "Write the table and its plot, a file for each number of threads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder/f'{name}_{torch.get_num_threads()}.json'
    path.write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + '\n')
    plot(rows, path.with_suffix('.png'))
    print(f'\n{machine()}\nwritten to {folder.name}: {path.name} and {path.stem}.png')


def plot(rows, path):
    "Bars of the ratio that the table names first, a group for each setting"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    against = next(c for c in rows[0] if c.startswith('x '))
    groups = defaultdict(dict)
    rows = [r for r in rows if against in r]
    for r in rows: groups[str(r['size'])][r['contestant']] = r[against]
    names = [n for n in dict.fromkeys(r['contestant'] for r in rows)]
    named = len(names) > 10 # more than there are colours
    _,ax = plt.subplots(figsize=(8, .5 + .22*len(rows)), layout='constrained')
    for g,(size,bars) in enumerate(groups.items()):
        for i,n in enumerate(n for n in names if n in bars):
            mid,low,high = bars[n]
            y = g + .8*(i+.5)/len(bars) - .4
            first = not any(n in o for o in list(groups.values())[:g])
            ax.barh(y, mid, .8/len(bars), color=f'C{names.index(n)}', xerr=[[mid-low], [high-mid]], label=n if first else None)
            text = f'{mid:.2f}  {n}' if named else f'{mid:.2f}'
            ax.annotate(text, (high, y), xytext=(3, 0), textcoords='offset points', va='center', fontsize=8)
    ax.set_yticks(range(len(groups)), groups)
    ax.invert_yaxis()
    ax.margins(x=.4 if named else .1)
    ax.axvline(1, color='grey', lw=.8)
    ax.set_xlabel(f'time, {against}')
    if not named: ax.legend(loc='center left', bbox_to_anchor=(1, .5), frameon=False)
    plt.savefig(path, dpi=110)
    plt.close()


def positive(text):
    if int(text) < 1: raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text}')
    return int(text)


def arguments(description, rounds=15, **options):
    "The command line that all benchmarks share; `options` are name=(default, help)"
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--rounds', type=positive, default=rounds, help='turns of each contestant; the table gives medians over them')
    parser.add_argument('--threads', type=positive, nargs='+', default=[1, 2], help='numbers of threads, one table for each')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder for the tables and plots')
    for name,(default,text) in options.items():
        parser.add_argument(f'--{name}', nargs='+', default=default, help=text)
    return parser.parse_args()


def run(name, args, rows):
    "Call `rows()` for each number of threads; print and save what it returns"
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f'\n{name}, {threads} thread(s); in brackets the quartiles over the turns')
        torch.manual_seed(0)
        table = rows()
        show(table)
        save(name, table, args.results)
