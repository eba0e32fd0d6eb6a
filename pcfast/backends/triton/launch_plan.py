"""From shapes alone: what becomes of each layer, where everything lies, which products each launch computes.

Pure Python on plain values, so that designs are cached and tested without a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass, field, replace

from ...kernels.conv_geometry import ConvGeometry
from ...kernels.limits import LOSS_COLUMNS, ROW_MULTIPLE
from ...kernels.linear_problems import (
    CLAMPED,
    GRAM_UPDATE,
    HIDDEN,
    PRODUCT,
    TOP,
    UPDATE,
    FeedbackProblem,
    PredictProblem,
)
from ...model import spec as specs
from ...model.activations import Activation
from ..kernel_forms import LinearForm, PointwiseForm, TorchForm, layer_form
from .arena import Layout, LayoutBuilder, Matrix
from .configs import COMPOSED, FUSED, IMPLICIT, NONE, REASON, Choices, ConvolutionKey, LaunchKey, LoopKey
from .conv_form import ConvForm, Form, conv_form
from .tensor_layout import Boundary, boundaries, padded
from .tiles import LinearTiles, Product, fused_loop_tiles, linear_tiles


@dataclass(frozen=True)
class CompileTarget:
    """What the design depends on beside the network.

    Attributes:
        precision: of products in linear layers: "bf16", "tf32" or "tf32x3".
        sm_count: SMs of the GPU. l1_bytes_per_sm: shared memory and L1 cache of one.
        interpreted: triton interprets the kernels on the CPU.
        choices: what replaces the rules here.
        convolution_precision: in convolutions, whose switch in torch is another one; "": as ``precision``.
    """

    precision: str
    sm_count: int
    l1_bytes_per_sm: int
    interpreted: bool
    choices: Choices = NONE
    convolution_precision: str = ""

    @property
    def convolutions(self) -> str:
        """Precision of products in convolutions."""
        return self.convolution_precision or self.precision

    @property
    def operand_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def linear_copies(self) -> bool:
        """Whether linear kernels read operands of their own, rounded; three TF32 products read the state."""
        return self.precision != "tf32x3"

    def copies(self, form: Form | None) -> bool:
        """Whether products of a layer read operands of their own: rounded to bfloat16, or by our kernels to TF32.

        All operands of a layer are written by its own kernels, d by those of the feedback through it. cuDNN rounds
        what it reads to TF32 itself.
        """
        if isinstance(form, LinearForm):
            return self.linear_copies
        if isinstance(form, ConvForm):
            return self.convolutions != "tf32x3"
        return getattr(form, "convolution", None) is not None and self.precision == "bf16"


@dataclass(frozen=True)
class PredictLaunch:
    """Layers with one activation, in one launch of linear_predict.

    Attributes:
        activation: of the hidden ones. top_activation: of the output layer, where ``loss`` is not None.
        loss: "cross_entropy" or "mse" where the output layer takes part with its loss.
        layers: l, highest first. problems: with their product, then, in the same order, without.
        tiles, aligned: configuration; whether rows of all matrices start at multiples of ROW_MULTIPLE elements.
        key: under which tuning may choose other tiles.
    """

    activation: Activation | None
    top_activation: Activation | None
    loss: str | None
    layers: tuple[int, ...]
    problems: tuple[PredictProblem, ...]
    tiles: LinearTiles
    aligned: bool
    programs: int
    key: LaunchKey


@dataclass(frozen=True)
class FeedbackLaunch:
    """Couplings through linear layers, in one launch of linear_feedback. links: l, highest first."""

    links: tuple[int, ...]
    problems: tuple[FeedbackProblem, ...]
    tiles: LinearTiles
    aligned: bool
    programs: int
    key: LaunchKey


@dataclass(frozen=True)
class Design:
    """Everything that shapes decide.

    Attributes:
        boundaries: of v_0..v_L.
        forms: per layer, from index 2 on (0 and 1 are None: the input is clamped).
        layout: of the arenas.
        gram: layer 1's beliefs are out of the loop (docs/method.md fact 7).
        predicts, feedback: the launches of linear layers.
        wide_top: the output layer's product and its loss are two launches.
        fuse_loop: mlp_relaxation runs all iterations in one launch; fuse_loop_reason: why, or why not.
        loop: under which tuning may choose otherwise; None where only stages are possible.
        momentum: beliefs have velocities.
    """

    boundaries: tuple[Boundary, ...]
    forms: tuple[Form | None, ...]
    layout: Layout
    gram: bool
    predicts: tuple[PredictLaunch, ...]
    feedback: FeedbackLaunch | None
    wide_top: bool
    fuse_loop: bool
    fuse_loop_reason: str
    loop: LoopKey | None
    fresh: bool
    momentum: bool
    target: CompileTarget = field(repr=False)

    @property
    def depth(self) -> int:
        return len(self.boundaries) - 1

    @property
    def gram_by_torch(self) -> bool:
        """Whether torch's operations move layer 1's stand-ins, instead of a kernel."""
        return self.gram and isinstance(self.forms[2], TorchForm)


@functools.lru_cache(maxsize=256)
def design(
    network: specs.Network,
    shapes: tuple,
    gram: bool,
    loss: str | None,
    fresh: bool,
    target: CompileTarget,
    momentum: bool = False,
) -> Design:
    """Design one problem of at least two layers.

    Args:
        shapes: as :meth:`pcfast.model.spec.Network.shapes` gives them, none hidden.
        gram: layer 1's beliefs leave the loop (docs/method.md fact 7).
        loss: "cross_entropy" or "mse" where kernels may evaluate it; None where torch does.
        momentum: beliefs move with it.
    """
    batch, depth = shapes[0][0][0], network.depth
    bounds = boundaries(network, shapes)
    forms = _forms(network, shapes, bounds, gram, loss, target)
    linear = [l for l in range(depth, 1, -1) if isinstance(forms[l], LinearForm)]
    gram_rows = gram and 2 in linear
    builder = LayoutBuilder()
    _place_beliefs(builder, batch, bounds, forms, gram, target, momentum)
    for l in range(2, depth + 1):
        if isinstance(forms[l], PointwiseForm):
            _place_pointwise(builder, l, batch, bounds, forms[l], gram and l == 2, target, momentum)
        elif isinstance(forms[l], ConvForm):
            _place_convolution(builder, l, batch, bounds[l], forms[l], target)
    for l in linear:
        _place_linear(builder, l, batch, bounds[l], forms[l], depth, gram_rows and l == 2, target, momentum)

    feedback = _feedback(linear, batch, bounds, builder.matrices, gram_rows, target)
    wide_top = depth in linear and forms[depth].out_features > _loss_columns(target)
    fuse_loop, reason, loop = _can_fuse_loop(linear, depth, forms, builder.matrices, target, gram_rows)
    predicts = _predicts(
        linear, batch, depth, bounds, forms, builder.matrices, gram_rows, loss, wide_top, fuse_loop, target
    )
    if fuse_loop:
        # without the batch: another BLOCK_M may run on another matrix instruction, with other bits
        key = LaunchKey("mlp_relaxation", target.precision, True, None, loop.sizes)
        tiles = _tuned(key, fused_loop_tiles(target.precision, target.interpreted), target)
        settings = dict(tiles=tiles, programs=-(-batch // tiles.block_m), key=key)
        predicts = tuple(replace(launch, **settings) for launch in predicts)
        feedback = replace(feedback, **settings)
    return Design(
        bounds,
        forms,
        builder.layout(),
        gram,
        predicts,
        feedback,
        wide_top,
        fuse_loop,
        reason,
        loop,
        fresh,
        momentum,
        target,
    )


def implicit(geometry: ConvGeometry, target: CompileTarget) -> bool:
    """Whether conv_predict and conv_feedback run a convolution that they can run.

    Unless the target's choices say so, cuDNN's convolution and an elementwise launch do: nothing has been measured.
    """
    key = ConvolutionKey(target.convolutions, astuple(geometry))
    return target.choices.get(key, COMPOSED) == IMPLICIT


def _forms(
    network: specs.Network,
    shapes: tuple,
    bounds: tuple[Boundary, ...],
    gram: bool,
    loss: str | None,
    target: CompileTarget,
):
    """Per layer from index 2 on, what runs it."""
    forms: list[Form | None] = [None, None]
    for layer in network.layers[1:]:
        form = layer_form(layer, shapes[layer.index - 1], bounds[layer.index - 1].map)
        if layer.index == network.depth and not isinstance(form, LinearForm):
            form = TorchForm("the output layer is not a linear one")
        elif layer.index == network.depth and loss is None:
            form = TorchForm("torch evaluates the loss")
        # the Gram matrix of a convolution is another convolution's weight, and cuDNN's to multiply with
        in_gram_form = gram and layer.index == 2
        multiplied = None if in_gram_form else conv_form(form, layer, bounds[layer.index - 1])
        forms.append(multiplied if multiplied and implicit(multiplied.geometry, target) else form)
    return tuple(forms)


# where everything lies


# Where layer 1's beliefs are out of the loop, these arrays of layer 2 move in it instead.
_GRAM_STATE = ("s", "sum")
_GRAM_VELOCITIES = ("s_velocity", "sum_velocity")


def _place_beliefs(builder, batch, bounds, forms, gram, target, momentum) -> None:
    for l in range(2 if gram else 1, len(bounds) - 1):
        bound, above = bounds[l], forms[l + 1]
        d = builder.add(f"d{l}", batch, bound.size, bound.stride)
        builder.add(f"error{l}", batch, bound.size, bound.stride)
        if momentum:
            builder.add(f"velocity{l}", batch, bound.size, bound.stride)
        if target.copies(above):
            builder.add(f"d_operand{l}", batch, bound.size, bound.stride, operand=True)
        elif isinstance(above, LinearForm) or getattr(above, "convolution", None) is not None:
            builder.matrices[f"d_operand{l}"] = d


def _gram_state(in_gram_form: bool, momentum: bool) -> tuple[str, ...]:
    """What layer 2 keeps beside what other layers do."""
    return (_GRAM_STATE + (_GRAM_VELOCITIES if momentum else ())) if in_gram_form else ()


def _place_pointwise(
    builder, l, batch, bounds, form: PointwiseForm, in_gram_form: bool, target: CompileTarget, momentum
) -> None:
    height, width, channels = form.inner
    size = height * width * channels
    for name in _gram_state(in_gram_form, momentum):
        builder.add(f"{name}{l}", batch, size)
    if form.convolution is None:  # the error is added to the beliefs below as it is: state, in their layout
        builder.add(f"delta{l}", batch, size, bounds[l - 1].stride)
    else:
        builder.add(f"delta{l}", batch, size, operand=target.copies(form))


def _place_convolution(builder, l, batch, bound: Boundary, form: ConvForm, target: CompileTarget) -> None:
    geometry, copies = form.geometry, target.copies(form)
    builder.add(f"delta{l}", batch, bound.size, operand=copies)  # pooled
    builder.add(f"weight{l}", geometry.out_channels, geometry.taps * geometry.channels, operand=copies)


def _place_linear(
    builder,
    l,
    batch,
    bound: Boundary,
    form: LinearForm,
    depth,
    in_gram_form: bool,
    target: CompileTarget,
    momentum,
) -> None:
    names = ["uhat", *_gram_state(in_gram_form, momentum)]
    if l == depth:
        names += ["error", "vhat", "target"] + ([] if in_gram_form else ["s"])
        builder.add("target_sum", 1, batch)
    for name in names:
        builder.add(f"{name}{l}", batch, bound.size, bound.stride)
    builder.add(f"delta{l}", batch, bound.size, bound.stride, operand=target.copies(form))
    rows = padded(form.out_features)  # zero rows at the end: products run over the padding of delta
    columns = form.out_features if in_gram_form else form.in_features  # G takes the place of W
    builder.add(f"weight{l}", rows, columns, padded(columns), operand=target.copies(form))


# launches of linear layers


def _tiles(
    products: list[Product], target: CompileTarget, activation: Activation | None = None, loss: bool = False
) -> LinearTiles:
    return linear_tiles(products, target.precision, target.sm_count, target.interpreted, activation, loss)


def _tuned(key: LaunchKey, by_rule: LinearTiles, target: CompileTarget) -> LinearTiles:
    """The tiles that tuning chose for a launch, else those that the rules give.

    BLOCK_K stays theirs: it is the order of sums, on which a row's bits depend. So does BLOCK_N of a launch with the
    loss, whose rows lie whole in one tile.
    """
    chosen = target.choices.get(key, by_rule)
    same_sums = chosen.block_k == by_rule.block_k
    return chosen if same_sums and (not key.loss or chosen.block_n == by_rule.block_n) else by_rule


def _key(kernel: str, products: list[Product], target: CompileTarget, loss: bool = False) -> LaunchKey:
    batch = products[0][0]
    return LaunchKey(kernel, target.precision, loss, batch, tuple((n, k) for _, n, k in products))


def _loss_columns(target: CompileTarget) -> int:
    """The widest output whose loss a tile can do."""
    return min(LOSS_COLUMNS, fused_loop_tiles(target.precision, target.interpreted).block_n)


def _programs(tiles: LinearTiles, products: list[Product], target: CompileTarget) -> int:
    """One program an SM, at most one a tile; the interpreter gets few, to see that they share the tiles."""
    return min(tiles.count(products), 3 if target.interpreted else target.sm_count)


def _aligned(strides: list[int]) -> bool:
    return all(stride % ROW_MULTIPLE == 0 for stride in strides)


def _first(matrices: dict[str, Matrix], name: str) -> int:
    return matrices[name].first if name in matrices else 0


def _predict_problem(l, kind, batch, bounds, form: LinearForm, matrices, multiplied: bool, s_given: bool):
    def first(name: str) -> int:
        return _first(matrices, f"{name}{l}")

    below, weight = bounds[l - 1], matrices[f"weight{l}"]
    return PredictProblem(
        kind=kind,
        m=batch,
        n=form.out_features,
        k=below.stride if multiplied and not s_given else 0,
        a=_first(matrices, f"d_operand{l - 1}"),
        lda=below.stride,
        b=weight.first,
        ldb=weight.stride,
        ldc=bounds[l].stride,
        uhat=first("uhat"),
        d=first("d"),
        error=first("error"),
        delta=first("delta"),
        s=first("s"),
        vhat=first("vhat"),
        target=first("target"),
        target_sum=_first(matrices, "target_sum"),
        s_given=s_given,
    )


def _predicts(linear, batch, depth, bounds, forms, matrices, gram_rows, loss, wide_top, fuse_loop, target):
    """Launches of the predict stage: one for each activation, one more for a wide output layer."""

    def product(l: int) -> Product:
        return batch, forms[l].out_features, forms[l].in_features

    groups: dict[Activation | None, list[int]] = {}
    for l in linear:
        if l != depth:
            groups.setdefault(forms[l].activation, []).append(l)
    launches_of = list(groups.items())
    if depth in linear:
        first = launches_of[0][1] if launches_of else []
        # the loss wants whole rows of the output in one narrow tile: with other tiles the output layer goes alone
        together = _tiles([product(l) for l in [depth, *first]], target, launches_of[0][0] if first else None)
        fits = forms[depth].out_features <= together.block_n <= _loss_columns(target)
        if first and not wide_top and (fuse_loop or fits):
            first.insert(0, depth)
        else:
            launches_of.append((None, [depth]))
    launches = []
    for activation, layers in launches_of:
        kinds = {l: HIDDEN.value for l in layers}
        if layers[0] == depth:
            kinds[depth] = PRODUCT.value if wide_top else TOP.value
        problems = [
            _predict_problem(l, kinds[l], batch, bounds, forms[l], matrices, multiplied, gram_rows and l == 2)
            for multiplied in (True, False)
            for l in layers
        ]
        products = [product(l) for l in layers]
        with_loss = TOP.value in kinds.values()
        key = _key("linear_predict", products, target, with_loss)
        alone = with_loss and len(layers) == 1
        tiles = _tuned(key, _tiles(products, target, activation, loss=alone), target)
        launches.append(
            PredictLaunch(
                activation=activation,
                top_activation=forms[depth].activation if with_loss else None,
                loss=loss if with_loss else None,
                layers=tuple(layers),
                problems=tuple(problems),
                tiles=tiles,
                aligned=_aligned([bounds[m].stride for l in layers for m in (l - 1, l)]),
                programs=_programs(tiles, products, target),
                key=key,
            )
        )
    return tuple(launches)


def _feedback(linear, batch, bounds, matrices, gram_rows, target) -> FeedbackLaunch | None:
    if not linear:
        return None
    problems, products = [], []
    for l in linear:
        link, delta = l - 1, matrices[f"delta{l}"]
        in_gram_form = gram_rows and l == 2
        weight = matrices[f"weight{l}"]
        kind = GRAM_UPDATE if in_gram_form else CLAMPED if link == 1 else UPDATE
        problems.append(
            FeedbackProblem(
                kind=kind.value,
                m=batch,
                n=weight.columns,
                k=delta.stride,
                a=delta.first,
                lda=delta.stride,
                b=weight.first,
                ldb=weight.stride,
                ldc=bounds[l if in_gram_form else link].stride,
                d=_first(matrices, f"d{link}"),
                d_operand=_first(matrices, f"d_operand{link}"),
                error=_first(matrices, f"error{link}"),
                s=_first(matrices, "s2"),
                sum=_first(matrices, "sum2"),
                layer=link,
                velocity=_first(matrices, "s_velocity2" if in_gram_form else f"velocity{link}"),
                sum_velocity=_first(matrices, "sum_velocity2"),
            )
        )
        products.append((batch, weight.columns, delta.columns))
    key = _key("linear_feedback", products, target)
    tiles = _tuned(key, _tiles(products, target), target)
    return FeedbackLaunch(
        links=tuple(l - 1 for l in linear),
        problems=tuple(problems),
        tiles=tiles,
        aligned=_aligned([p.ldc for p in problems] + [p.ldb for p in problems]),
        programs=_programs(tiles, products, target),
        key=key,
    )


def _can_fuse_loop(linear, depth, forms, matrices, target, gram_rows) -> tuple[bool, str, LoopKey | None]:
    """Whether mlp_relaxation runs the loop, why, and what tuning may choose under; None where it cannot run it.

    By rule all loop weights must fit into the L1 cache and shared memory of one SM. The batch has no say, not in
    tuning either, so that a sample's result does not depend on it.
    """
    if len(linear) < depth - 1:
        return False, "not every layer of the loop is a linear one", None
    if forms[depth].out_features > _loss_columns(target):
        return False, "the output is wider than a tile", None
    if len({forms[l].activation for l in linear if l != depth}) > 1:
        return False, "the hidden layers have several activations", None
    weights = target.operand_bytes * sum(matrices[f"weight{l}"].elements for l in linear)
    fits = weights <= target.l1_bytes_per_sm
    key = LoopKey(
        target.precision, tuple((forms[l].out_features, forms[l].in_features) for l in linear), gram_rows
    )
    chosen = target.choices.get(key)
    if chosen is not None:
        return chosen == FUSED, REASON, key
    return (
        fits,
        f"{weights:,} bytes of loop weights, {target.l1_bytes_per_sm:,} of L1 and shared memory per SM",
        key,
    )
