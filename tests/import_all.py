"Import all modules of the installed package, from outside of the repository"
import importlib
import pkgutil

import fastai_mixup

# `tools.testing` needs the extra `test`
names = [m.name for m in pkgutil.walk_packages(fastai_mixup.__path__, 'fastai_mixup.') if not m.name.endswith(('_modidx', 'tools.testing'))]
for name in names: importlib.import_module(name)
print(len(names), fastai_mixup.__version__, fastai_mixup.__file__)
