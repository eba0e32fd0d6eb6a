"""Published training recipes as settings of :func:`pcfast.training.train` (docs/recipes.md; `pcfast train --recipe`).

recipe = recipes.RECIPES["pcx-vgg5-cifar10-se"]
data = recipe.prepared(datasets.load(recipe.data, folder="cifar", shape=recipe.shape))
history = training.train(recipe.network(), data, **recipe.settings())
"""

from __future__ import annotations

from . import epc, pcx, rosenbaum
from .recipe import Recipe

#: By name.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*rosenbaum.RECIPES, *pcx.recipes(), *epc.recipes())
}

__all__ = ["RECIPES", "Recipe"]
