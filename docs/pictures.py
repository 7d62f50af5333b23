"""The pictures of the README and the gallery: two photographs, mixed by each method. `python docs/pictures.py`

The photographs are those of scikit-learn: a temple in China and a dahlia.
"""
from pathlib import Path

import matplotlib.pyplot as plt
from fastcore.script import call_parse

from fastai_mixup.all import CutMix, FMix, MixUp, ResizeMix
from fastai_mixup.registry import METHODS
from fastai_mixup.tools.testing import photos, plan_of

root = Path(__file__).resolve().parent.parent
README = {MixUp(1.): 5, CutMix(1.): 3, FMix(1.): 3, ResizeMix(): 1} # method and seed
SEEDS = 8, 2, 1


def cropped(factor): return photos(factor)[..., 14//factor:414//factor, 120//factor:640//factor]
def of_name(cls): return f'{cls.__name__.lower()}.jpg'


def save(panels, columns, path, fontsize=15):
    "Titled pictures, as a JPEG"
    rows = -(-len(panels)//columns)
    fig,axs = plt.subplots(rows, columns, figsize=(9, 27/columns*.83/3*rows + .4), layout='constrained', squeeze=False)
    for ax in axs.flat: ax.axis('off')
    for ax,(title,picture) in zip(axs.flat, panels):
        ax.imshow(picture.clamp(0, 1).movedim(0, -1) if picture.ndim == 3 else picture, cmap='gray', vmin=0, vmax=1)
        ax.set_title(title, fontsize=fontsize)
    fig.savefig(path, dpi=100, pil_kwargs=dict(quality=82))
    plt.close(fig)


def for_readme(x):
    def mixed(cb, seed):
        plan = plan_of(cb.method, x, seed=seed)
        own = plan.label_lam[0].item()
        return f'{type(cb).__name__}\n{own:.0%} temple, {1-own:.0%} flower',plan.mix(x)[0]
    return [('temple', x[0]), *(mixed(*o) for o in README.items()), ('flower', x[1])]


def flower(x):
    "Masks: where the second photograph shows the flower, and nothing of the first"
    orange = (x[:,0] - x[:,2]) > .25
    orange[0] = False
    return orange.long()


def for_gallery(method, x, alpha=1.):
    "Three draws, and the mask of the last one where the method pastes"
    plans = [plan_of(method, x, flower(x) if method.looks_at == 'targets' else None, seed=seed) for seed in SEEDS]
    panels = [(f'{plan.label_lam[0]:.0%}', plan.mix(x)[0]) for plan in plans]
    if method.needs_positions: panels.append(('mask', plans[-1].paste(flower(x))[0]))
    return panels


def drawn_without_model(): return [cls for cls in METHODS if not cls().method.needs_model and not cls().recipe.watches]


@call_parse
def main(
    out:str=str(root/'nbs/images'), # Folder to write to
):
    "Draw the pictures"
    out = Path(out)
    (out/'gallery').mkdir(parents=True, exist_ok=True)
    save(for_readme(cropped(2)), 3, out/'photographs.jpg')
    for cls in drawn_without_model():
        method = MixUp(1.).method if cls is MixUp else cls().method
        save(for_gallery(method, cropped(2)), 4, out/'gallery'/of_name(cls))
