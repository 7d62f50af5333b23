"The README's table of which method to use when, from the committed results: `python experiments/which.py`"
from collections import namedtuple

import fashion
from common import Table, paired
from scipy.stats import t
from tables import CLASSES, NUMBERS

Interval = namedtuple('Interval', 'mean low high n')
CALLS = {'MixUp(1)': 'MixUp(1.)', 'CutMix(1)': 'CutMix(1.)', 'ManifoldMixUp(1)': 'ManifoldMixUp(1.)', 'RegMixUp': 'RegMixUp()',
    'MixUp(.4)': 'MixUp(.4)', 'ManifoldMixUp(.4)': 'ManifoldMixUp(.4)', 'CutMix': 'CutMix()'}
IMAGES = {'2,000 images': dict(), '500 images, 60 epochs': dict(n=500, epochs=60), '500 images, 15 epochs': dict(n=500, epochs=15),
    '40% wrong labels': dict(noise=.4), 'augmented': dict(augment=True), 'augmented, 40% wrong labels': dict(noise=.4, augment=True)}
OTHERS = {'BBC, bag': 'texts, bag of words', 'BBC, GRU': 'texts, GRU', 'ItalyPowerDemand': 'time series, power',
    'JapaneseVowels': 'time series, vowels', 'brain': 'masks of one brain'}
OFF = 'leave it off'


def interval(d):
    "Mean and 95% interval by Student's t of differences that are paired by seed"
    half = t.ppf(.975, len(d)-1)*d.std(ddof=1)/len(d)**.5
    return Interval(d.mean(), d.mean()-half, d.mean()+half, len(d))


def gains(rows, score='accuracy', better=1):
    "The interval of the gain of each method of `CALLS` over plain training"
    there = {r['method'] for r in rows}
    return {m: interval(better*paired(rows, m, 'none', 'method', score)) for m in CALLS if m in there}


def best(found):
    "The method whose interval begins highest; `None` if all of them begin at 0 or below"
    name = max(found, key=lambda m: found[m].low)
    return name if found[name].low > 0 else None


def text(o): return f'{o.mean:+.1f} [{o.low:+.1f}, {o.high:+.1f}]'.replace('-', '−')


def line(what, rows):
    "What to use, its gain and that of `MixUp`, in points of accuracy, and the number of seeds"
    found,name = gains(rows),best(gains(rows))
    mixup = next(m for m in found if m.startswith('MixUp'))
    return what,f'`{CALLS[name]}`' if name else OFF,text(found[name]) if name else '',text(found[mixup]),found[name or mixup].n


def counted(what, rows, names, better):
    "For several tables: significant gains and losses of `MixUp(.4)`, and whether any method has a gain without a loss"
    of = {name: gains([r for r in rows if r['data'] == name], 'test', better) for name in names}
    def count(m): return [int(sum(signs)) for signs in zip(*((o[m].low > 0, o[m].high < 0) for o in of.values()))]
    found = {m: count(m) for m in next(iter(of.values()))}
    sure = [m for m,(up,down) in found.items() if up and not down]
    advice = f'`{CALLS[sure[0]]}`' if sure else 'compare' if any(up for up,_ in found.values()) else OFF
    up,down = found['MixUp(.4)']
    return what,advice,'',f'gains: {up}, losses: {down}',next(iter(of.values()))['MixUp(.4)'].n


def lines():
    images,others,tables = (Table(name).rows for name in ('fashion', 'others', 'tables'))
    yield from (line(what, fashion.rows_of(images, **setting)) for what,setting in IMAGES.items())
    yield from (line(what, [r for r in others if r['data'] == name]) for name,what in OTHERS.items())
    yield counted(f'{len(CLASSES)} tables, classes', tables, CLASSES, 1)
    yield counted(f'{len(NUMBERS)} tables, numbers', tables, NUMBERS, -1)


def table():
    "As markdown"
    head = 'data','use','gain','gain of `MixUp`','seeds'
    return '\n'.join('|'.join(['', *map(str, cells), '']) for cells in (head, ['---']*len(head), *lines()))


if __name__ == '__main__': print(table())
