"""The documentation as a website, from the executed notebooks: `python docs/build.py`, then open `_site/index.html`.

nbdev filters the notebooks and adds signatures and tables of parameters; Sphinx makes the pages and the search, which need no network. The build fails on
a link that leads nowhere, and on a notebook that holds an error. `python docs/look.py` opens all pages in a browser.
"""
import inspect
import json
import os
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

import fastai_mixup.all

root = Path(__file__).resolve().parent.parent
REPOSITORY = 'https://github.com/fastai-mixup/fastai_mixup/blob/main/'
PARTS = {'Begin': ['index', '39_*', '40_*'], 'Tutorials': [*(f'{n}_*' for n in (31, 32, 33, 34, 35, 36, 38, 37, 30))], 'Methods': ['05_*', '06_*', '08_*', '09_*', '1?_*'], 'Tools': ['2?_*'], 'Evidence': ['9[1-9]_*'], 'Under the hood': ['00_*', '01_*', '02_*', '03_*', '04_*', '07_*', '90_*']}


def contents(names):
    "The table of contents: pages by part, each page once"
    left,parts = sorted(names),[]
    for part,patterns in PARTS.items():
        mine = [n for p in patterns for n in left if Path(n).match(p)]
        left = [n for n in left if n not in mine]
        parts.append('\n'.join(['```{toctree}', f':caption: {part}', ':maxdepth: 1', '', *mine, '```']))
    if left: raise SystemExit(f"These notebooks are in no part of the table of contents: {', '.join(left)}")
    return '\n\n'.join(['# Contents', *parts]) + '\n'


def aliases():
    "The short names, such as `MixUp`, and where the documentation of what they stand for is to be published"
    lookup = NbdevLookup('fastai_mixup')
    return {name: lookup.doc(o.__qualname__) for name,o in vars(fastai_mixup.all).items() if inspect.isclass(o) and o.__name__ == f'{name}Callback'}


ALIASES = aliases()


def linked(text):
    "Links for the short names, as nbdev makes them for the others; headings have none"
    def link(name): return f'[`{name}`]({ALIASES[name]})' if name in ALIASES else f'`{name}`'
    return '\n'.join(line if line.startswith('#') else re.sub(r'(?<!\[)`(\w+)`(?!\])', lambda m: link(m[1]), line) for line in text.split('\n'))


def as_markdown(text):
    "A cell without Quarto's attributes of links, and with links into the repository made whole"
    text = re.sub(r'(\]\([^)]*\))\{[^}]*\}', r'\1', text)
    return re.sub(r'\]\(\.\./(?!nbs/)([^)]+)\)', rf']({REPOSITORY}\1)', text)


def page(cell):
    "One cell for Sphinx; `None` for front matter"
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'raw': return
    if cell['cell_type'] == 'markdown': return dict(cell, source=as_markdown(linked(source)), metadata={})
    for output in cell['outputs']:
        if output['output_type'] == 'error': raise SystemExit(f"A notebook holds an error: {output['ename']}: {output['evalue']}")
        data = output.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = re.sub(r'^---$', '', as_markdown(''.join(data['text/markdown'])), flags=re.M)
    tags = ['remove-input'] if re.search(r'^#\| *echo: *false', source, re.M) else []
    return dict(cell_type='code', id=cell['id'], execution_count=None, outputs=cell['outputs'], metadata=dict(tags=tags), source=re.sub(r'^#\|.*\n?', '', source, flags=re.M))


def first_cell(path):
    "The heading, blurb and introduction, of which nbdev keeps the first two as front matter"
    return json.loads((root/'nbs'/path.name).read_text(encoding='utf-8'))['cells'][0]


def convert(src, dest):
    notebook = json.loads(src.read_text(encoding='utf-8'))
    notebook['cells'] = [page(first_cell(src)), *filter(None, map(page, notebook['cells']))]
    dest.write_text(json.dumps(notebook), encoding='utf-8')


def keep_inside(out):
    "Links to where the documentation is to be published become links to the pages beside them; fails if one leads nowhere"
    pages = {p.stem.split('_', 1)[-1]: p for p in out.glob('*.html')}
    texts = {p: p.read_text(encoding='utf-8') for p in pages.values()}
    lost = set()
    def local(m):
        page,anchor = pages.get(m[1]),re.sub('[^a-z0-9]+', '-', m[2]).strip('-')
        if page is None or f'id="{anchor}"' not in texts[page]: lost.add(m[0])
        return f'{page and page.name}#{anchor}'
    for page,text in texts.items(): page.write_text(re.sub(rf'{get_config().doc_host}{get_config().doc_baseurl}/(\w+)\.html#([\w.]+)', local, text), encoding='utf-8')
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
        notebooks = sorted(processed.glob('*.ipynb'))
        for path in notebooks: convert(path, folder/path.name)
        shutil.copytree(processed/'images', folder/'images')
        (folder/'contents.md').write_text(contents([p.stem for p in notebooks]), encoding='utf-8')
        made = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', '-c', str(root/'docs'), str(folder), str(out)])
    if made.returncode: sys.exit(made.returncode)
    keep_inside(out)
