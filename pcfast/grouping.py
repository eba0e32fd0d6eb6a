"""Nest a flat ``nn.Sequential`` into predictive-coding layers."""

from __future__ import annotations

from torch import nn

from .network import describe

#: Modules whose parameters do not open a new PC layer: they belong to the affine map before them.
_FOLLOWERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def group_layers(model: nn.Sequential) -> nn.Sequential:
    """Nest a flat Sequential so that each PC layer is one affine map with what follows it.

    A new group begins at every module with parameters (Linear, convolution, ...); activations, pooling,
    normalisation, dropout and reshaping join the group before them, as in the networks of Rosenbaum (2022).
    What comes before the first such module joins the first group. Modules are shared with ``model``, not
    copied. An element that is itself a Sequential, a :class:`pcfast.Residual` too, is kept as
    a group of its own.

    Args:
        model: a flat ``nn.Sequential``.

    Returns:
        A new ``nn.Sequential`` of ``nn.Sequential`` groups that computes the same function.

    Raises:
        ModelError: not an ``nn.Sequential``, empty, or a Sequential with a forward of its own.
    """
    describe(model)  # refuses what is no chain of layers
    groups: list[list[nn.Module]] = []
    closed = True  # a nested Sequential stands alone: what follows it opens a new group
    has_opener = False
    for module in model:
        nested = isinstance(module, nn.Sequential)
        opener = not isinstance(module, _FOLLOWERS) and any(True for _ in module.parameters())
        if nested or closed or (opener and has_opener):
            groups.append([])
            has_opener = False
        groups[-1].append(module)
        has_opener = has_opener or opener
        closed = nested
    return nn.Sequential(
        *(group[0] if isinstance(group[0], nn.Sequential) else nn.Sequential(*group) for group in groups)
    )
