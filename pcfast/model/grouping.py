"""Nest a flat ``nn.Sequential`` into predictive-coding layers."""

from __future__ import annotations

from torch import nn

from ..errors import ArgumentError, ModelError
from .residual import Residual
from .spec import describe

#: Where the belief of a PC layer sits.
FORMS = ("after_activation", "before_activation")
#: Normalisation layers: their parameters belong to the affine map before them.
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
#: Modules whose parameters do not open a new PC layer.
_FOLLOWERS = (*_NORMS, nn.PReLU)


def group_layers(model: nn.Sequential, *, beliefs: str = "after_activation") -> nn.Sequential:
    """Nest a flat Sequential so that each PC layer has one affine map. docs/layers.md draws both forms.

    ``beliefs`` says where the belief of a layer sits. The function that the model computes is the same; the
    predictive-coding updates are not, as errors are measured in other places.

    - "after_activation": a group begins at every module with parameters (Linear, convolution, ...); activations,
      pooling, normalisation, dropout and reshaping join the group before them. PCX, the ePC program, FabricPC,
      PRECO's MBA and Rosenbaum (2022) hold beliefs here.
    - "before_activation": a group ends with its module with parameters and the normalisation directly behind it;
      activations, pooling, dropout and reshaping open the next group. Beliefs are pre-activations, as in JPC's
      ``make_mlp``, PCTrainer's notebooks, PRECO's AMB and Deepity.

    What comes before the first module with parameters joins the first group, what comes after the last one the last
    group. Modules are shared with ``model``, not copied. An element that is itself a Sequential, a
    :class:`pcfast.Residual` too, is never taken apart: "after_activation" keeps it as a group of its own,
    "before_activation" ends a group with it.

    Args:
        model: a flat ``nn.Sequential``.
        beliefs: "after_activation" or "before_activation".

    Returns:
        A new ``nn.Sequential`` of ``nn.Sequential`` groups that computes the same function.

    Raises:
        ArgumentError: another value of ``beliefs``.
        ModelError: not an ``nn.Sequential``, empty, or a Sequential with a forward of its own; for
            "before_activation" also an element before the last group that is a Sequential and ends behind an
            activation.
    """
    if beliefs not in FORMS:
        raise ArgumentError(
            "beliefs",
            repr(beliefs),
            "one of " + ", ".join(f'"{form}"' for form in FORMS),
            "docs/layers.md says which programs hold beliefs where.",
        )
    describe(model)  # refuses what is no chain of layers
    groups = (
        _from_map_to_activation(model) if beliefs == "after_activation" else _from_activation_to_map(model)
    )
    return nn.Sequential(
        *(
            group[0] if len(group) == 1 and isinstance(group[0], nn.Sequential) else nn.Sequential(*group)
            for group in groups
        )
    )


def flattened(model: nn.Sequential) -> nn.Sequential:
    """The modules of ``model`` in order, each an element: plain Sequentials inside it are taken apart."""
    members: list[nn.Module] = []
    for module in model:
        members += flattened(module) if type(module) is nn.Sequential else [module]
    return nn.Sequential(*members)


def _from_map_to_activation(model: nn.Sequential) -> list[list[nn.Module]]:
    groups: list[list[nn.Module]] = []
    closed = True  # a nested Sequential stands alone: what follows it opens a new group
    has_map = False
    for module in model:
        nested = isinstance(module, nn.Sequential)
        if nested or closed or (_is_map(module) and has_map):
            groups.append([])
            has_map = False
        groups[-1].append(module)
        has_map = has_map or _is_map(module)
        closed = nested
    return groups


def _from_activation_to_map(model: nn.Sequential) -> list[list[nn.Module]]:
    groups: list[list[nn.Module]] = []
    rest: list[nn.Module] = []  # modules that no map has followed yet
    for module in model:
        behind_a_map = groups and not rest and not isinstance(groups[-1][-1], nn.Sequential)
        if behind_a_map and isinstance(module, _NORMS):
            groups[-1].append(module)
            continue
        rest.append(module)
        if isinstance(module, nn.Sequential) or _is_map(module):
            groups.append(rest)
            rest = []
    for group in groups[:-1]:
        _check_ends_before_its_activation(group[-1])
    return [*groups[:-1], [*groups[-1], *rest]] if groups else [rest]


def _is_map(module: nn.Module) -> bool:
    return not isinstance(module, _FOLLOWERS) and any(True for _ in module.parameters())


def _check_ends_before_its_activation(element: nn.Module) -> None:
    """A block x + f(x) ends with its sum, whatever f ends with."""
    if not isinstance(element, nn.Sequential) or isinstance(element, Residual):
        return
    for module in reversed(element):
        if isinstance(module, nn.Sequential):
            _check_ends_before_its_activation(module)
            return
        if _is_map(module):
            return
        if type(module).__module__ == nn.ReLU.__module__:
            raise ModelError(
                "model",
                f"an element that is a Sequential and ends behind its {type(module).__name__}",
                'flat modules, or elements that end with their affine map, for beliefs="before_activation"',
                "Give the flat model: nn.Sequential(*(module for layer in model for module in layer)).",
            )
