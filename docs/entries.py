"How the website shows a function or a class: its call, what it does, and a table of its parameters"
import re
import textwrap
from importlib import import_module
from inspect import Parameter, formatannotation, signature

from fastcore.docments import DocmentText, docments
from nbdev.showdoc import BasicMarkdownRenderer

from fastai_mixup._modidx import d
from fastai_mixup.callback import MixCallback

STARS = {Parameter.VAR_POSITIONAL: '*', Parameter.VAR_KEYWORD: '**'}


def type_text(annotation):
    "Without the modules; nothing for what only says that the default is None"
    if annotation in (Parameter.empty, type(None)): return ''
    return re.sub(r'\b(?:\w+\.)+(?=\w)', '', formatannotation(annotation)).strip("'")


def default_text(default):
    if default is Parameter.empty: return ''
    return getattr(default, '__name__', None) or repr(default)


def call(name, parameters):
    "As one would write it, with the defaults"
    args = [STARS.get(p.get('kind'), '') + k + (f'={d}' if (d := default_text(p.get('default', Parameter.empty))) else '') for k,
        p in parameters.items()]
    lines = textwrap.wrap(', '.join(a.replace(' ', '\0') for a in args), 92-len(name), break_long_words=False, break_on_hyphens=False)
    between = '\n' + ' '*(len(name)+1)
    return f'{name}({between.join(lines)})'.replace('\0', ' ')


def row(*cells): return '| ' + ' | '.join(c.replace('|', '\\|').replace('\n', ' ') for c in cells) + ' |'


def code(text): return text and f'`{text}`'


def table(parameters, returned):
    "Of what is said of them, without columns that would be empty; nothing if that is nothing"
    def line(name, p):
        return name,code(type_text(p.get('anno', Parameter.empty))),code(default_text(p.get('default', Parameter.empty))),p['docment']
    rows = [line(name, p) for name,p in [*((code(k), p) for k,p in parameters.items()), ('*returns*', returned)] if p.get('docment')]
    shown = [i for i,column in enumerate(zip(*rows)) if any(column)]
    def pick(cells): return row(*(cells[i] for i in shown))
    return '\n'.join([pick(('', 'type', 'default', '')), pick(['---']*4), *map(pick, rows)]) if rows else ''


COMMON = 'The other parameters are [common to all mixing callbacks](../explanations/parameters.html).'
SHARED = set(signature(MixCallback.__init__).parameters) - {'self', 'method', 'layer'}


def published():
    "The classes of the package by name; their source can be read, unlike that of what a notebook has just executed"
    found = (getattr(import_module(module), name.split('.')[-1], None) for module,names in d['syms'].items() for name in names)
    return {o.__name__: o for o in found if isinstance(o, type)}


def said_of(sym):
    "What is said of each parameter of a class of the package; `None` of anything else"
    if not isinstance(sym, type) or sym.__name__ not in published(): return
    return {k: p for k,p in docments(published()[sym.__name__], full=True).items() if k != 'self'}


def is_method(sym): return isinstance(sym, type) and issubclass(sym, MixCallback) and sym is not MixCallback


class Entry(BasicMarkdownRenderer):
    "What nbdev renders, with a table in place of comments in the signature; of a method, without what all methods share"
    def _repr_markdown_(self):
        if not isinstance(self.dm, DocmentText) or not callable(self.sym): return super()._repr_markdown_()
        said = said_of(self.sym) or dict(self.dm.dm)
        returned = said.pop('return', None) or {}
        head = super()._repr_markdown_().split('```python')[0]
        own = {k: p for k,p in said.items() if k not in SHARED} if is_method(self.sym) else said
        return '\n\n'.join(filter(None, [head.rstrip(), f'```python\n{call(self.nm.split(".")[-1], said)}\n```', self.docs,
            table(own, returned), COMMON*(len(own) < len(said))]))
