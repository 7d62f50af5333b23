"""The documentation as a website, from the executed notebooks: `python docs/build.py`, then open `_site/index.html`.

nbdev filters the notebooks and adds signatures and tables of parameters; Sphinx makes the pages and the search, which need no network.
The build fails on a link that leads nowhere, and on a notebook that holds an error. `python docs/look.py` opens all pages in a browser.
"""
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbdev.showdoc
from entries import Entry
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.serve import proc_nbs

from fastai_mixup._modidx import d
from fastai_mixup.registry import TWINS

root = Path(__file__).resolve().parent.parent
REPOSITORY = 'https://github.com/fastai-mixup/fastai_mixup/blob/main/'
PARTS = {
    'Begin': ['index', 'tutorials/help'],
    'How to': [f'tutorials/{name}' for name in
        'images segmentation tables text series regression multilabel inputs distributed own_method'.split()],
    'Which method': ['explanations/which', 'explanations/gallery', 'explanations/methods', 'explanations/parameters'],
    'Methods': ['api/20_*', 'api/41_*', 'api/21_*', 'api/3[1-9]_*', 'api/4?_*'],
    'Partners and labels': ['api/5?_*'],
    'Tools': ['api/6?_*'],
    'Evidence': [f'explanations/{name}' for name in 'evidence speed models compatibility limitations'.split()],
    'Migration and help': ['tutorials/migration', 'explanations/troubleshooting', 'explanations/questions', 'explanations/glossary'],
    'More': ['tutorials/*', 'explanations/*'],
    'How it works': ['api/*'],
}

def contents(names):
    "The table of contents: pages by part, each page once"
    left,parts = sorted(names),[]
    for part,patterns in PARTS.items():
        mine = [*dict.fromkeys(n for p in patterns for n in left if Path(n).match(p))]
        left = [n for n in left if n not in mine]
        if mine: parts.append('\n'.join(['```{toctree}', f':caption: {part}', ':maxdepth: 1', '', *mine, '```']))
    if left: raise SystemExit(f"These notebooks are in no part of the table of contents: {', '.join(left)}")
    return '\n\n'.join(['# Contents', *parts]) + '\n'


def aliases():
    "The second names, such as `MixUpCallback`, and where the documentation of what they stand for is to be published"
    lookup = NbdevLookup('fastai_mixup')
    return {name: lookup.doc(o.__qualname__) for name,o in TWINS.items()}

ALIASES = aliases()
EXPORTED = {link for names in d['syms'].values() for link,_ in names.values()} # also those that have no entry on their page


def linked(text):
    "Links for the second names, as nbdev makes them for the others; headings have none"
    def link(name): return f'[`{name}`]({ALIASES[name]})' if name in ALIASES else f'`{name}`'
    return '\n'.join(line if line.startswith('#') else re.sub(r'(?<!\[)`(\w+)`(?!\])', lambda m: link(m[1]), line)
        for line in text.split('\n'))


def as_markdown(text, folder='.'):
    "A cell of a notebook in `nbs/folder`, without Quarto's attributes of links, and with links into the repository made whole"
    def whole(m):
        path = posixpath.normpath(f'nbs/{folder}/{m[1]}')
        return m[0] if path.startswith('nbs/') else f']({REPOSITORY}{path})'
    return re.sub(r'\]\((\.\./[^)]+)\)', whole, re.sub(r'(\]\([^)]*\))\{[^}]*\}', r'\1', text))

def page(cell, folder='.'):
    "One cell for Sphinx; `None` for front matter"
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'raw': return
    if cell['cell_type'] == 'markdown': return dict(cell, source=as_markdown(linked(source), folder), metadata={})
    for output in cell['outputs']:
        if output['output_type'] == 'error':
            raise SystemExit(f"A notebook holds an error: {output['ename']}: {output['evalue']}")
        data = output.get('data', {})
        if 'text/markdown' in data:
            data['text/markdown'] = re.sub(r'^---$', '', as_markdown(''.join(data['text/markdown']), folder), flags=re.M)
    tags = ['remove-input'] if re.search(r'^#\| *echo: *false', source, re.M) else []
    return dict(cell_type='code', id=cell['id'], execution_count=None, outputs=cell['outputs'], metadata=dict(tags=tags),
        source=re.sub(r'^#\|.*\n?', '', source, flags=re.M))

def cells_of(path): return json.loads(path.read_text(encoding='utf-8'))['cells']

def convert(name, processed, dest):
    "The heading, blurb and introduction are the notebook's own, of which nbdev keeps the first two as front matter"
    folder,notebook = name.parent.as_posix(),json.loads((processed/name).read_text(encoding='utf-8'))
    cells = [cells_of(root/'nbs'/name)[0], *notebook['cells']]
    notebook['cells'] = [o for cell in cells if (o := page(cell, folder)) is not None]
    (dest/name).parent.mkdir(parents=True, exist_ok=True)
    (dest/name).write_text(json.dumps(notebook), encoding='utf-8')

def published(path):
    "The name under which nbdev publishes a page, which has no number"
    return (path.parent/re.sub(r'^\d+_', '', path.stem)).as_posix()

BRAND = re.compile(r'(class="sidebar-brand" href="[./]*)contents(\.html")|(<a href="[./]*)contents(\.html"><div class="brand">)')

def keep_inside(out):
    "Links to where the documentation is to be published become links to the other pages; fails if one leads nowhere"
    pages = {published(p.relative_to(out)): p for p in out.rglob('*.html')}
    texts = {p: p.read_text(encoding='utf-8') for p in pages.values()}
    url = re.escape(f'{get_config().doc_host}{get_config().doc_baseurl}/')
    lost = set()
    for path,text in texts.items():
        def local(m):
            target,anchor = pages.get(m[1]),re.sub('[^a-z0-9]+', '-', m[2]).strip('-')
            if target is None: return lost.add(m[0]) or m[0]
            there = Path(os.path.relpath(target, path.parent)).as_posix()
            if f'id="{anchor}"' in texts[target]: return f'{there}#{anchor}'
            return there if f'{m[1]}.html#{m[2]}' in EXPORTED else lost.add(m[0]) or m[0]
        text = re.sub(rf'{url}([\w/]+)\.html#([\w.]+)', local, text)
        path.write_text(BRAND.sub(lambda m: (m[1] or m[3]) + 'index' + (m[2] or m[4]), text), encoding='utf-8')
    if lost: raise SystemExit(f"These links lead nowhere: {', '.join(sorted(lost))}")

@call_parse
def main(
    out:str='_site', # Folder of the website
):
    "Build the website"
    os.chdir(root)
    nbdev.showdoc.BasicMarkdownRenderer = Entry
    processed,out = Path(proc_nbs(n_workers=0)),Path(out).resolve()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        names = sorted(p.relative_to(processed) for p in processed.rglob('*.ipynb'))
        for name in names: convert(name, processed, folder)
        shutil.copytree(processed/'images', folder/'images')
        (folder/'contents.md').write_text(contents([p.with_suffix('').as_posix() for p in names]), encoding='utf-8')
        made = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', '-c', str(root/'docs'),
            str(folder), str(out)])
    if made.returncode: sys.exit(made.returncode)
    keep_inside(out)
