"Write README.md from nbs/index.ipynb, or with --check say whether it is in step"
import json
import posixpath
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def directives(cell): return re.findall(r'^#\|\s*(.+)$', ''.join(cell['source']), re.M)


def shown(output):
    "The text of one output"
    if output.get('output_type') == 'stream': return ''.join(output['text']) if output['name'] == 'stdout' else ''
    data = output.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    if 'text/html' in data and '<table' in ''.join(data['text/html']): return ''.join(data['text/html'])
    return ''.join(data.get('text/plain', ''))


def from_root(link): return f"]({posixpath.normpath('nbs/' + link[1])})"


def as_markdown(cell):
    "One cell of the notebook"
    if cell['cell_type'] == 'markdown': return re.sub(r'\]\((?!\w+:|#)([^)]+)\)', from_root, ''.join(cell['source']))
    if 'hide' in directives(cell): return ''
    code = re.sub(r'^#\|.*\n', '', ''.join(cell['source']), flags=re.M)
    parts = [] if 'echo: false' in directives(cell) else [f'```python\n{code}\n```']
    for text in filter(str.strip, map(shown, cell['outputs'])):
        parts.append(text.strip() if text.lstrip().startswith(('<', '|')) else f'```text\n{text.strip()}\n```')
    return '\n\n'.join(parts)


def readme():
    "What README.md has to be"
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    note = '<!-- Written from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->'
    return '\n\n'.join([note, *filter(None, map(as_markdown, cells))]) + '\n'


if __name__ == '__main__':
    path = root/'README.md'
    if '--check' not in sys.argv: path.write_text(readme(), encoding='utf-8')
    elif path.read_text(encoding='utf-8') != readme(): sys.exit('README.md is not in step with nbs/index.ipynb: run python .ci/readme.py')
