"""A design in words, for pcfast.explain."""

from __future__ import annotations

from .. import network as specs
from ..constants import Constants
from ..forms import LinearForm, PointwiseForm
from .design import Design
from .floor import floors, matrix_rate
from .layers import ConvForm


def describe(network: specs.Network, shapes: tuple, design: Design, constants: Constants) -> list[str]:
    """The tier, how the loop runs, and per layer its kernels and its floor."""
    depth, precision = design.depth, design.target.precision
    lines = [f"tier streamed: weights and state in device memory, products of linear layers in {precision}"]
    if design.whole:
        tiles = design.predicts[0].tiles
        lines.append(
            f"one launch for all iterations, mlp_relaxation, {tiles.rows} samples a program ({design.whole_reason})"
        )
    else:
        lines.append(f"two stages an iteration, no single launch for all of them: {design.whole_reason}")
        for launch in design.predicts:
            lines.append(
                f"linear_predict for {_layers(launch.layers)}: tiles of {launch.tiles.rows} x "
                f"{launch.tiles.columns} x {launch.tiles.reduction} ({launch.tiles.reason})"
            )
        if design.feedback is not None:
            tiles = design.feedback.tiles
            lines.append(
                f"linear_feedback into {_layers(design.feedback.links)}: tiles of {tiles.rows} x {tiles.columns} x "
                f"{tiles.reduction} ({tiles.reason})"
            )
    least = floors(network, shapes, design, constants)
    for l in range(1, depth + 1):
        line = f"{network.layers[l - 1].label}: {_how(design, l)}"
        if l in least:
            line += f"; floor {1e6 * least[l].seconds:.3g} us an iteration ({least[l].binding})"
        lines.append(line)
    _, rate = matrix_rate(precision, constants)
    sources = {name: constants.source[name] for name in (rate, "copy_bandwidth_gbs")}
    lines.append("floors from " + ", ".join(f"{name} ({source})" for name, source in sources.items()))
    return lines


def _layers(indices: tuple[int, ...]) -> str:
    return ("layer " if len(indices) == 1 else "layers ") + ", ".join(map(str, sorted(indices)))


def _how(design: Design, l: int) -> str:
    if l == 1:
        return "its input is clamped: evaluated once, outside the loop"
    form = design.forms[l]
    if isinstance(form, LinearForm):
        wide = ", loss in output_error" if l == design.depth and design.wide_top else ""
        gram = ", Gram form" if l == 2 and design.gram else ""
        return ("mlp_relaxation" if design.whole else "linear_predict, linear_feedback") + wide + gram
    if isinstance(form, ConvForm):
        return "conv_predict, conv_feedback"
    if isinstance(form, PointwiseForm):
        product = "" if form.convolution is None else "cuDNN's convolution, "
        if design.gram and l == 2:
            return product + "pointwise_error, pointwise_gram, Gram form"
        return product + "pointwise_error, pointwise_update"
    return f"torch ({form.reason})" + (", Gram form" if design.gram and l == 2 else "")
