"Settings of Sphinx; `build.py` writes what it reads"
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = html_title = 'fastai_mixup'
extensions = ['myst_nb', 'mathml']
html_theme = 'furo'
html_math_renderer = 'mathml'
root_doc = 'contents'
exclude_patterns = ['_build']
nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'gfm'
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_inline']
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header']
html_theme_options = dict(source_repository='https://github.com/fastai-mixup/fastai_mixup/', source_branch='main', source_directory='nbs/')
html_static_path = [str(Path(__file__).parent/'static')]
html_css_files = ['site.css']
html_show_sphinx = False
copyright = 'The fastai_mixup authors, Apache-2.0'
