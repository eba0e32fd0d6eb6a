"""What a generative network infers and generates: latent variables, reconstructions, samples, their picture."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..model.graph import Graph, Prior
from ..problem.settings import Settings
from ..relaxation.result import relax
from ..support.files import write_atomically
from ..support.plotting import plain, require_matplotlib


def latent_roots(graph: Graph) -> list[str]:
    """The roots with a prior."""
    return [
        name
        for name, inputs in graph.inputs_of.items()
        if not inputs and isinstance(graph._modules.get(name), Prior)
    ]


def inferred(
    graph: Graph, settings: Settings, y: Tensor, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The latent roots' beliefs after relaxation with the output at ``y`` and other roots ``given``."""
    result = relax(
        graph, clamp=given, y=y, loss=settings.loss, method=settings.method, step_size=settings.step_size,
        num_steps=settings.num_steps, belief_optimizer=settings.belief_optimizer, precision=settings.precision,
        backend=settings.backend,
    )  # fmt: skip
    return {name: result.beliefs[name] for name in latent_roots(graph)}


def reconstructions(graph: Graph, settings: Settings, x: Tensor, y: Tensor) -> Tensor:
    """What the network predicts from ``x``, where it has an input, and the latent variables that it infers from y."""
    given = dict.fromkeys(graph.inputs, x)
    dtype = next(graph.parameters()).dtype
    roots = {name: z.to(dtype) for name, z in inferred(graph, settings, y, given).items()}
    return graph(**roots, **given)


@torch.no_grad()
def samples(
    graph: Graph, latents: Mapping[str, Tensor], count: int, given: Mapping[str, Tensor] | None = None
) -> Tensor:
    """``count`` outputs, of latent roots drawn from the Gaussians with the mean and covariance of ``latents``.

    Args:
        latents: (rows, units) of each latent root, as :func:`inferred`.
        given: values of the other roots, (count, ...).
    """
    drawn = {}
    for name, z in latents.items():
        flat = z.flatten(1).double()
        spread = torch.cov(flat.t()).reshape(flat.shape[1], flat.shape[1])
        spread = spread + 1e-9 * torch.eye(len(spread), dtype=spread.dtype, device=z.device)
        sample = torch.distributions.MultivariateNormal(flat.mean(0), spread).sample((count,))
        drawn[name] = sample.to(z.dtype).reshape(count, *z.shape[1:])
    return graph(**drawn, **(given or {}))


def draw_images(rows: list[Tensor], path: str | os.PathLike, *, titles: list[str], title: str = "") -> None:
    """Rows of images in [0, 1], each (count, channels, height, width), as a PNG at ``path``, atomically.

    Raises:
        ArgumentError: no row, or rows of different lengths.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    if not rows or len({len(row) for row in rows}) != 1 or len(titles) != len(rows):
        raise ArgumentError(
            "rows", f"rows of {[len(row) for row in rows]} images", "rows of one length, a title each"
        )
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(rows[0])
    figure = Figure(figsize=(0.6 * count + 1.4, 0.6 * len(rows) + 0.5), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), count, squeeze=False)
    for line, row, name in zip(panels, rows, titles, strict=True):
        for place, (axes, image) in enumerate(zip(line, row.detach().clamp(0, 1).float().cpu(), strict=True)):
            axes.imshow(image.movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if not place:
                axes.set_ylabel(plain(name), rotation=0, ha="right", va="center", fontsize=7)
    figure.suptitle(plain(title), fontsize=8, parse_math=False)
    write_atomically(path, canvas.print_png)
