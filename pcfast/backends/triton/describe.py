"""A design in words, for pcfast.explain."""

from __future__ import annotations

import math

from ...kernels import conv_feedback, conv_predict, output_error, pointwise_error
from ...kernels.tiles import Tiles
from ...model import spec as specs
from ..chips import Chip
from ..gpu_constants import Constants
from ..kernel_forms import LinearForm, PointwiseForm
from .conv_form import ConvForm
from .launch_plan import Design, FeedbackLaunch, PredictLaunch
from .roofline import floors, rate_names


def describe(network: specs.Network, shapes: tuple, design: Design, constants: Constants) -> list[str]:
    """Where state lies, how the loop runs, and per layer its kernels and its floor."""
    depth, precision = design.depth, design.target.precision
    lines = [f"multi-kernel, state in global memory: products of linear layers in {precision}"]
    if design.fuse_loop:
        tiles = design.predicts[0].tiles
        lines.append(
            f"one launch for all iterations, mlp_relaxation, {tiles.block_m} samples a program, {_tiles(tiles)} "
            f"({design.fuse_loop_reason}){_occupied(design.predicts[0], design, constants.chip)}"
        )
    else:
        lines.append(f"two stages an iteration, no single launch for all of them: {design.fuse_loop_reason}")
        for launch in design.predicts:
            tiles = launch.tiles
            line = f"linear_predict for {_layers(launch.layers)}: {_tiles(tiles)} ({tiles.reason})"
            lines.append(line + _occupied(launch, design, constants.chip))
        if design.feedback is not None:
            tiles = design.feedback.tiles
            links = _layers(design.feedback.links)
            line = f"linear_feedback into {links}: {_tiles(tiles)} ({tiles.reason})"
            lines.append(line + _occupied(design.feedback, design, constants.chip))
    velocities = sum(m.elements for name, m in design.layout.matrices if "velocity" in name)
    if velocities:
        lines.append(f"momentum: velocities of what moves, {4 * velocities:,} bytes")
    floor_of = floors(network, shapes, design, constants)
    for l in range(1, depth + 1):
        line = f"{network.layers[l - 1].label}: {_how(design, l, shapes[0][0][0])}"
        if l in floor_of:
            line += f"; floor {1e6 * floor_of[l].seconds:.3g} us an iteration ({floor_of[l].binding})"
        lines.append(line)
    names = [*sorted(rate_names(network, design.target, constants)), "copy_bandwidth_gbs"]
    sources = {name: constants.source[name] for name in names}
    lines.append("floors from " + ", ".join(f"{name} ({source})" for name, source in sources.items()))
    return lines


def _layers(indices: tuple[int, ...]) -> str:
    return ("layer " if len(indices) == 1 else "layers ") + ", ".join(map(str, sorted(indices)))


def _occupied(launch: PredictLaunch | FeedbackLaunch, design: Design, chip: Chip) -> str:
    """What a launch takes of the chip; "" where it is interpreted."""
    if design.target.interpreted:
        return ""
    key, tiles = launch.key, launch.tiles
    memory = tiles.shared_memory_bytes(design.target.precision, chip.capability)
    if key.batch is None:  # mlp_relaxation
        waves = -(-launch.programs // chip.sm_count)
        work = f"{launch.programs} programs, {waves} wave{'s' * (waves > 1)}"
    else:
        work = f"{tiles.count([(key.batch, n, k) for n, k in key.sizes])} tiles on {launch.programs} programs"
    return f"; {work}, {memory:,} bytes of shared memory each"


def _tiles(tiles: Tiles) -> str:
    return f"tiles of {tiles}"


def _convolution(form: ConvForm, precision: str) -> str:
    predict = conv_predict.predict_tiles(form.geometry, precision, form.before, form.after)
    feedback = conv_feedback.feedback_tiles(form.geometry, precision)
    return f"conv_predict in {_tiles(predict)}, conv_feedback in {_tiles(feedback)}, products in {precision}"


def _pointwise(form: PointwiseForm, batch: int) -> str:
    height, width, channels = form.inner
    window = (1, 1) if form.pool is None else form.pool.kernel
    positions = batch * (height // window[0]) * (width // window[1])
    block_m, block_n = pointwise_error.tile(positions, channels, math.prod(window))
    return f"pointwise_error in tiles of {block_m} x {block_n}"


def _how(design: Design, l: int, batch: int) -> str:
    if l == 1:
        return "its input is clamped: evaluated once, outside the loop"
    form = design.forms[l]
    if isinstance(form, LinearForm):
        wide = ""
        if l == design.depth and design.wide_top:
            block_m, block_n, _ = output_error.output_tile(batch, form.out_features)
            wide = f", loss in output_error in tiles of {block_m} x {block_n}"
        gram = ", Gram form" if l == 2 and design.gram else ""
        return ("mlp_relaxation" if design.fuse_loop else "linear_predict, linear_feedback") + wide + gram
    if isinstance(form, ConvForm):
        return _convolution(form, design.target.convolutions)
    if isinstance(form, PointwiseForm):
        product = "" if form.convolution is None else "cuDNN's convolution, "
        if design.gram and l == 2:
            return f"{product}{_pointwise(form, batch)}, pointwise_gram, Gram form"
        return f"{product}{_pointwise(form, batch)}, pointwise_update"
    return f"torch ({form.reason})" + (", Gram form" if design.gram and l == 2 else "")
