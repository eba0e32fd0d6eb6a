"""The resident kernel's planner: arrays in a block's shared memory, samples per block, waves; or why not."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from networks_for_tests import IN_KERNELS, architectures
from torch import nn

from pcfast import networks
from pcfast.backends import gpu_constants
from pcfast.backends.cuda import shared_memory as placement
from pcfast.backends.cuda.describe import describe as in_words
from pcfast.backends.cuda.geometry import CONV, COPY, LINEAR, MAX_LAYERS, NO_PRODUCT
from pcfast.backends.cuda.kernel_params import OPERANDS, Layer, Program, divisor
from pcfast.backends.cuda.shared_memory import Placement, Room, place
from pcfast.model.describe import describe
from pcfast.model.spec import Network
from pcfast.precision import Operands
from pcfast.problem.plan import choose_gram

H200 = Room(132, 232448, 233472)
VECTOR = 4  # numbers of one access
IEEE = Operands("ieee", "ieee")
DEPTHS = {"ieee": VECTOR, "tf32": 8, "bf16": 16}  # of a step of a linear product


def gram_of(network: Network, shapes: tuple, num_steps: int = 20) -> bool:
    return choose_gram(network, shapes, "strict", num_steps, True, False)[0]


def placing(
    network: Network,
    shapes: tuple,
    gram: bool,
    loss: str = "cross_entropy",
    operands: Operands = IEEE,
    scalar_bytes: int = 4,
    room: Room = H200,
    momentum: bool = False,
) -> Placement | str:
    return place(network, shapes, gram, loss, operands, scalar_bytes, room, momentum)


def program_of(placed: Placement) -> Program:
    return Program.from_buffer_copy(placed.program)


def output_shape(layer: Layer) -> tuple[int, int, int]:
    """(channels, height, width) of a layer's output, pooled."""
    area, width = layer.by_area.value, layer.by_width.value
    return layer.size // area, area // width, width


def assert_sound(
    network: Network,
    shapes: tuple,
    gram: bool,
    placed: Placement,
    operands: Operands = IEEE,
    scalar_bytes: int = 4,
    room: Room = H200,
    momentum: bool = False,
) -> None:
    """What holds for every placement."""
    what, batch = program_of(placed), shapes[0][0][0]

    # arrays follow one another without gaps, and fit
    assert placed.arrays[0].first == 0
    for one, following in pairwise(placed.arrays):
        assert one.first + one.elements == following.first
    assert placed.arrays[-1].first + placed.arrays[-1].elements == placed.elements == what.elements
    assert all(array.elements > 0 and array.first % VECTOR == 0 for array in placed.arrays)
    assert placed.bytes == placed.elements * scalar_bytes <= room.block_bytes
    assert (placed.scalar_bytes, placed.operands) == (scalar_bytes, operands)

    # every weight and every state has one home
    expected = [("d", 1)] if not gram else []
    for l in range(2, network.depth + 1):
        product = what.layers[l - 1].predict.kind
        assert product in (COPY, LINEAR, CONV)
        if product != COPY:
            expected.append(("weights", l))
        if product == CONV and operands.convolution != "ieee":
            expected += [("terms", l)] * (1 if gram and l == 2 else 2)
        expected += [("sum" if gram and l == 2 else "delta", l), ("uhat", l)]
        if l < network.depth:
            expected.append(("d", l))
    if momentum:
        expected += [("velocity", l) for l in range(1, network.depth)]
    expected += [(name, network.depth) for name in ("vhat", "target", "target_sum")] + [("scratch", 0)]
    assert sorted((array.name, array.home) for array in placed.arrays) == sorted(expected)
    terms = {array.first: array for array in placed.arrays if array.name == "terms"}
    first = {(array.name, array.home): array.first for array in placed.arrays}
    size = {(array.name, array.home): array.elements for array in placed.arrays}

    # what the kernel reads is what was placed
    assert (what.depth, what.samples, what.group) == (network.depth, placed.samples, placed.group)
    assert placed.samples % placed.group == 0 and placed.group <= 4
    assert what.layers[0].predict.kind == what.layers[0].feedback.kind == NO_PRODUCT
    for l in range(2, network.depth + 1):
        layer = what.layers[l - 1]
        inner = layer.channels * layer.height * layer.width
        used = {COPY: "ieee", LINEAR: operands.linear, CONV: operands.convolution}[layer.predict.kind]
        assert layer.operand == OPERANDS[used]
        if layer.weight_inputs:
            assert layer.weights == first["weights", l]
            assert layer.weight_stride >= layer.channels and layer.weight_stride % VECTOR == 0
            packed = 2 if used == "bf16" and layer.predict.kind == LINEAR else 1
            assert layer.weight_inputs * layer.weight_stride <= packed * size["weights", l]
            assert layer.predict.weights == layer.weights
            assert layer.feedback.weights == layer.weights or (gram and l == 2)
        assert bool(layer.gram) == (gram and l == 2)
        assert (layer.feedback.kind == NO_PRODUCT) == (gram and l == 2)
        assert layer.uhat == first["uhat", l] and layer.uhat_sample >= inner
        # whole warps have pointwise work of one group of samples
        assert layer.items == layer.by_items.value * placed.samples // placed.group
        assert layer.by_items.value % 32 == 0 <= layer.by_items.value - layer.size < 32
        assert layer.uhat_sample * placed.samples == size["uhat", l]
        places = [
            (layer.delta, "sum" if layer.gram else "delta", (layer.channels, layer.height, layer.width))
        ]
        if l < network.depth:
            places.append((layer.d, "d", output_shape(layer)))
        for at, name, shape in places:
            steps = (at.samples, at.channels, at.rows, at.columns)
            last = sum((n - 1) * step for n, step in zip((placed.samples, *shape), steps, strict=True))
            assert first[name, l] <= at.first and at.first + last < first[name, l] + size[name, l]
            assert at.samples * placed.samples == size[name, l]
        for product in (layer.predict, layer.feedback):
            if product.kind == NO_PRODUCT:
                continue
            # parts of the sum cover it, each of them has a place in the scratch
            if product.kind != COPY:
                on_units = product.kind == CONV and used != "ieee"
                summed = product.term_count if on_units else product.channels
                assert (product.splits - 1) * product.split < summed <= product.splits * product.split
            if product.kind == CONV and used != "ieee":
                table = terms.pop(product.terms)
                assert table.home == l and table.elements == 2 * product.term_count
                assert product.term_count % DEPTHS[used] == product.split % DEPTHS[used] == 0
                assert product.term_count >= product.channels * product.taps_y * product.taps_x
            numbers = product.out * product.height * product.width
            assert product.scratch_sample == numbers and product.scratch_split == numbers * placed.samples
            end = product.scratch + product.splits * product.scratch_split
            assert first["scratch", 0] <= product.scratch and end <= placed.elements
            if product.kind == LINEAR:
                # steps are whole, what lies behind the last number of a sample is zero
                assert product.split % DEPTHS[used] == product.input.samples % DEPTHS[used] == 0
                assert product.channels <= product.input.samples
                # rows that are read by vectors
                assert product.input.first % VECTOR == 0
                assert product.weight_row % VECTOR == product.weight_channel % VECTOR == 0
        if layer.feedback.kind != NO_PRODUCT and l > 2:
            below = what.layers[l - 2]
            assert layer.feedback.scratch_sample == below.size
    assert not terms
    for l in range(1, network.depth + 1):
        layer = what.layers[l - 1]
        if not (momentum and l < network.depth):
            assert layer.velocity_sample == 0
            continue
        above = what.layers[l]
        moving = above.channels * above.height * above.width if gram and l == 1 else layer.size
        assert layer.velocity == first["velocity", l] and layer.velocity_sample >= moving
        assert layer.velocity_sample * placed.samples == size["velocity", l]
    # products of one stage do not share scratch
    for stage in ("predict", "feedback"):
        products = [getattr(what.layers[l - 1], stage) for l in range(2, network.depth + 1)]
        ranges = sorted((p.scratch, p.scratch + p.splits * p.scratch_split) for p in products if p.kind)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))

    # the launch
    assert placed.blocks == -(-batch // placed.samples) and placed.blocks * placed.samples >= batch
    assert placed.threads == 512 and placed.blocks_per_sm >= 1
    assert placed.blocks_per_sm == 1 or placed.blocks_per_sm * (placed.bytes + 1024) <= room.sm_bytes
    assert placed.blocks_per_sm * placed.threads <= 2048
    assert placed.waves == -(-placed.blocks // (room.sm_count * placed.blocks_per_sm))


@examples(200)
@given(
    architecture=architectures(IN_KERNELS),
    batch=st.sampled_from((1, 2, 7, 128, 300, 5000)),
    gram=st.sampled_from((True, True, False)),
    loss=st.sampled_from(("cross_entropy", "mse")),
    operands=st.builds(Operands, st.sampled_from(list(DEPTHS)), st.sampled_from(list(DEPTHS))),
    scalar_bytes=st.sampled_from((4, 8)),
    sm_count=st.sampled_from((1, 24, 132)),
    block_bytes=st.sampled_from((1024, 8192, 101376, 232448)),
    momentum=st.booleans(),
)
def test_any_network_is_placed_or_refused(
    architecture, batch, gram, loss, operands, scalar_bytes, sm_count, block_bytes, momentum
):
    model, shape = architecture
    network = describe(model)
    shapes = network.shapes((batch, *shape))
    # layer 1 is in Gram form only where the planner has a count of it
    gram = gram and "in Gram form" in choose_gram(network, shapes, "strict", 20, True, False)[1]
    if network.depth == 1:
        return
    if scalar_bytes == 8:  # Tensor Cores have float32
        operands = IEEE
    room = Room(sm_count, block_bytes, block_bytes + 1024)
    placed = placing(network, shapes, gram, loss, operands, scalar_bytes, room, momentum)
    place.cache_clear()
    assert placed == placing(network, shapes, gram, loss, operands, scalar_bytes, room, momentum)
    if isinstance(placed, str):
        assert placed.startswith(("layer ", "one sample and the loop's weights take "))
        return
    assert_sound(network, shapes, gram, placed, operands, scalar_bytes, room, momentum)
    # one more wave than that only where no count of samples that fits would do with fewer
    for samples in placement.SAMPLES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(placement, "SAMPLES", (samples,))
            place.cache_clear()
            other = placing(network, shapes, gram, loss, operands, scalar_bytes, room, momentum)
        place.cache_clear()
        if isinstance(other, str):
            break
        assert placed.waves <= other.waves
        # and of the counts with as few waves it is the smallest, whose blocks have least to do
        assert samples >= placed.samples or other.waves > placed.waves


def test_the_papers_network():
    network = describe(networks.mnist_cnn())
    shapes = network.shapes((300, 1, 28, 28))
    assert gram_of(network, shapes)
    placed = placing(network, shapes, True)
    assert (placed.samples, placed.blocks, placed.blocks_per_sm, placed.waves) == (3, 100, 1, 1)
    assert_sound(network, shapes, True, placed)


def test_a_narrow_mlp():
    network = describe(networks.mlp([784, 128, 128, 10]))
    shapes = network.shapes((128, 784))
    assert gram_of(network, shapes)
    placed = placing(network, shapes, True)
    assert (placed.samples, placed.blocks, placed.waves) == (1, 128, 1)
    assert_sound(network, shapes, True, placed)


def mlp(*widths: int) -> Network:
    return describe(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))))


def test_the_last_byte_is_used():
    network = mlp(8, 20, 20, 5)
    shapes = network.shapes((1, 8))
    needed = placing(network, shapes, False).bytes
    exactly, less = (dataclasses.replace(H200, block_bytes=bytes) for bytes in (needed, needed - 1))
    assert placing(network, shapes, False, room=exactly).bytes == needed
    assert placing(network, shapes, False, room=less) == (
        f"one sample and the loop's weights take {needed:,} bytes of shared memory, a block has {needed - 1:,}"
    )


@pytest.mark.parametrize("extra", [0, 1])
def test_as_many_layers_as_the_argument_holds(extra):
    network = mlp(*[4] * (MAX_LAYERS + 1 + extra))
    placed = placing(network, network.shapes((2, 4)), False)
    if extra:
        assert placed == "it has 17 layers; the kernel's argument has room for 16"
    else:
        assert_sound(network, network.shapes((2, 4)), False, placed)


@given(st.integers(1, 1 << 16), st.integers(0, (1 << 16) - 1))
def test_quotients_of_a_blocks_numbers_are_exact(value, n):
    assert (n + 1) * divisor(value).multiplier >> 32 == n // value


def test_more_samples_until_one_wave_does():
    network, seen = mlp(8, 20, 20, 5), []
    for batch in (1, 132, 133, 528, 529, 1056, 4224, 8448, 100000):
        shapes = network.shapes((batch, 8))
        placed = placing(network, shapes, True)
        assert_sound(network, shapes, True, placed)
        seen.append((placed.samples, placed.waves))
    # one block an SM, by its registers
    assert seen == [(1, 1), (1, 1), (2, 1), (4, 1), (8, 1), (8, 1), (16, 2), (16, 4), (16, 48)]


def test_a_placement_in_words():
    network = describe(networks.mnist_cnn())
    placed = placing(network, network.shapes((300, 1, 28, 28)), True)
    text = "\n".join(in_words(network, placed, gpu_constants.load()))
    assert "3 samples per block, 100 blocks of 512 threads, 1 per SM, 1 wave\n" in text
    assert f"{placed.bytes:,} bytes of shared memory per block" in text
    numbers = {array.name: f"{array.name} {4 * array.elements:,}" for array in placed.arrays}
    assert all(words in text for words in numbers.values())


def test_no_tensor_is_needed():
    """Planning goes by shapes."""
    with torch.device("meta"):
        model = networks.mlp([784, 128, 128, 10])
    network = describe(model)
    assert placing(network, network.shapes((128, 784)), True).samples == 1
