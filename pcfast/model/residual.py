"""Residual blocks: an identity skip inside one PC layer."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ModelError, ShapeError


class Residual(nn.Sequential):
    """``x + f(x)``, where f is the chain of the modules given: a whole PC layer, or a part of one.

    Made like ``nn.Sequential``, with the same names of parameters. The skip stays inside its PC layer: as a layer of
    its own it predicts mu_l = v_{l-1} + f(v_{l-1}) (docs/method.md, "Residual blocks"). Blocks may be nested; without
    modules f is the identity.

    x: any shape (B, ...), which f keeps. Returns the same shape.

    Raises, when called:
        ShapeError: f changes the shape.
        ModelError: f returns no tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.clone())  # a clone, so that in-place modules leave the skip alone
        if not isinstance(out, Tensor):
            raise ModelError(
                "model",
                f"a residual branch that returns a {type(out).__name__}",
                "a branch that returns a tensor",
            )
        check_kept(tuple(x.shape), tuple(out.shape))
        return x + out


def check_kept(given: tuple[int, ...], returned: tuple[int, ...]) -> None:
    """Raise ShapeError unless a residual branch returns the shape that it was given."""
    if given != returned:
        raise ShapeError(
            "model",
            f"a residual branch that makes {returned} of {given}",
            "a branch that keeps the shape, as x + f(x) adds element by element",
            "Change the shape before or after the block.",
        )
