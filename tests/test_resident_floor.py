"""The resident kernel's floor: the planner's multiply-adds, bytes counted by hand, and its words."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from pcfast import networks
from pcfast.backends import gpu_constants
from pcfast.backends.cuda import kernel_params as p
from pcfast.backends.cuda.describe import describe as words
from pcfast.backends.cuda.roofline import floors
from pcfast.backends.cuda.shared_memory import Placement, Room, place
from pcfast.model.describe import describe
from pcfast.precision import Operands
from pcfast.problem.plan import gram_macs, layer_macs

KNOWN = gpu_constants.load()
CHIP = Room(KNOWN.sm_count, KNOWN.shared_memory_per_block_bytes, KNOWN.shared_memory_per_sm_bytes)


def padded_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 9, 3, stride=2, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        nn.AvgPool2d(2),
        nn.Sequential(nn.Conv2d(9, 7, (2, 1)), nn.ReLU(), nn.Flatten()),
        nn.Linear(7 * 2 * 3, 10),
    )


NETWORKS = {
    "mnist_cnn": (networks.mnist_cnn, (300, 1, 28, 28)),
    "mlp_128": (lambda: networks.mlp([784, 128, 128, 10]), (128, 784)),
    "odd": (lambda: networks.mlp([37, 61, 53, 7]), (2000, 37)),
    "padded_cnn": (padded_cnn, (33, 2, 24, 25)),
}


MIXED = Operands("ieee", "tf32")  # torch's switches as they are by default
OPERANDS = [Operands("ieee", "ieee"), Operands("tf32", "tf32"), Operands("bf16", "bf16"), MIXED]


def placed(name: str, gram: bool, operands: Operands = OPERANDS[0]):
    make, shape = NETWORKS[name]
    network = describe(make())
    shapes = network.shapes(shape)
    result = place(network, shapes, gram, "cross_entropy", operands, 4, CHIP)
    assert isinstance(result, Placement)
    return network, shapes, result


@pytest.mark.parametrize("operands", OPERANDS, ids=lambda each: f"{each.linear}-{each.convolution}")
@pytest.mark.parametrize(
    ("name", "gram"),
    [(name, gram) for name in NETWORKS for gram in (False, True) if not (gram and name == "padded_cnn")],
)
def test_multiply_adds_are_the_planners(name, gram, operands):
    network, shapes, result = placed(name, gram, operands)
    least = floors(result, KNOWN)
    batch, macs = shapes[0][0][0], layer_macs(network, shapes)
    for l in range(2, network.depth + 1):
        whole = gram_macs(network, shapes) if gram and l == 2 else 2 * macs[l - 1]
        assert least[l].multiply_adds * batch == whole * result.samples
    assert least[0].multiply_adds == sum(least[l].multiply_adds for l in range(2, network.depth + 1))
    assert least[0].bytes == sum(least[l].bytes for l in range(2, network.depth + 1))


def program_of(result: Placement) -> p.Program:
    return p.Program.from_buffer_copy(result.program)


def small_mlp(operand: str) -> Placement:
    """37-8-8-4, one sample a block, not in Gram form."""
    network = describe(networks.mlp([37, 8, 8, 4]))
    shapes = network.shapes((5, 37))
    result = place(network, shapes, False, "cross_entropy", Operands(operand, operand), 4, CHIP)
    assert result.samples == 1
    return result


# layer 2: scratch; uhat, s, delta written; d_2 read and written; r and d_1 read, d_1 written
HIDDEN_BESIDE = (8 + 8) + 3 * 8 + 2 * 8 + 3 * 8
# layer 3: scratch; uhat, s, delta written; vhat and target; r and d_2 read, d_2 written
OUTPUT_BESIDE = (4 + 8) + 3 * 4 + 2 * 4 + 3 * 8


def test_bytes_counted_by_hand():
    hidden_predict = 8 * 8 + 8  # every weight, and d_1 once: lanes of the same quad of k read the same four
    # every weight, and delta_2; a lane's three other rows are past the end, where all lanes read the last row again
    hidden_feedback = 8 * 8 + 8 + 3 * 8
    output = (4 * 8 + 8) + (4 * 8 + 4 + 3 * 4)
    least = floors(small_mlp("ieee"), KNOWN)
    assert least[2].bytes == 4 * (hidden_predict + hidden_feedback + HIDDEN_BESIDE)
    assert least[3].bytes == 4 * (output + OUTPUT_BESIDE)
    assert least[2].clocks == least[2].bytes / 128 and least[2].binding == "shared memory"


def test_bytes_on_tensor_cores_counted_by_hand():
    """A tile has 16 rows: past the end a prediction reads what follows, a feedback the last row again.

    The last row counts where it takes an instruction of its own.
    """
    # d_1, and of one step all rows of the tile; delta_2, and of one step the eight rows and the last one again
    hidden_predict = 8 + 8 * 16
    hidden_feedback = 8 + 8 * (8 + 1)
    # the feedback over 4 outputs that are padded to a step of 8
    output = (8 + 8 * 16) + (8 + 8 * (8 + 1))
    least = floors(small_mlp("tf32"), KNOWN)
    assert least[2].bytes == 4 * (hidden_predict + hidden_feedback + HIDDEN_BESIDE)
    assert least[3].bytes == 4 * (output + OUTPUT_BESIDE)

    # A step of 16, weights of two bytes in rows of 8. One instruction loads a tile: in the prediction 8 numbers of
    # each k, in the feedback 8 rows and, since a step runs past the end of one, what follows the last.
    predict, feedback = 4 * 16 + 2 * 16 * 8, 4 * 16 + 2 * (8 * 8 + 8)
    least = floors(small_mlp("bf16"), KNOWN)
    assert least[2].bytes == predict + feedback + 4 * HIDDEN_BESIDE
    assert least[3].bytes == predict + feedback + 4 * OUTPUT_BESIDE


def test_bytes_of_a_convolution_on_tensor_cores_counted_by_hand():
    """One channel of 3 x 11 to two of 1 x 9, taps 3 x 3: nine terms, padded to a step of 16."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(18, 3),
    )
    network = describe(model)
    shapes = network.shapes((1, 1, 3, 11))
    result = place(network, shapes, False, "cross_entropy", Operands("ieee", "bf16"), 4, CHIP)
    # Four terms at a time are read: taps 0..3, 4..7, 8 and padding, padding. Of eight places side by side, and of the
    # last one again in each of seven more groups; padding reads the first number.
    # taps 0, 1, 2 of a row and 0 of the next one: ten in a row and eight more; 1, 2 | 0, 1: nine each
    eight = (10 + 8) + (9 + 9) + (8 + 8) + 8
    one = 4 + 4 + 2 + 1
    predict = 2 * 16 + 9 * 2 + eight + 7 * one  # the table, each weight, the state
    # back to 33 places in rows of 11 from two channels: 18 terms, padded to 32
    feedback_table, feedback_weights = 2 * 32, 18
    scratch, pointwise = 18 + 33, 3 * 18 + 2 * 18 + 3 * 33
    feedback = found_feedback_words(result)
    assert floors(result, KNOWN)[2].bytes == 4 * (
        predict + feedback_table + feedback_weights + feedback + scratch + pointwise
    )


def found_feedback_words(result: Placement) -> int:
    """Distinct numbers that layer 2's feedback reads of the errors, by instruction."""
    product = program_of(result).layers[1].feedback
    at, words = product.input, 0
    terms = [(c, y, x) for c in range(2) for y in range(3) for x in range(3)] + [None] * 14
    for rows in range(0, 64, 8):
        for step in range(0, 32, 4):
            read = set()
            for pixel in (min(rows + g, 32) for g in range(8)):
                first = at.first + pixel // 11 * at.rows + pixel % 11 * at.columns
                for term in terms[step : step + 4]:
                    c, y, x = term or (0, 0, 0)
                    read.add(first + c * at.channels + y * product.input_tap_y + x * product.input_tap_x)
            words += len(read)
    return words


def test_clocks_are_those_of_the_units_that_have_the_most():
    """float32 units and Tensor Cores work beside each other; shared memory of both."""
    plenty = dataclasses.replace(KNOWN, shared_memory_bytes_per_clk_sm=1e9)
    rates = {"ieee": 128, "tf32": 1024, "bf16": 2048}  # of an H200
    for operands in OPERANDS:
        least = floors(placed("padded_cnn", False, operands)[2], plenty)
        convolutions = least[2].multiply_adds + least[4].multiply_adds
        by_convolutions = convolutions / rates[operands.convolution]
        by_linear = least[5].multiply_adds / rates[operands.linear]
        same = operands.linear == operands.convolution
        assert least[0].binding == "multiply-adds"
        assert least[0].clocks == pytest.approx(
            by_convolutions + by_linear if same else max(by_convolutions, by_linear)
        )


@pytest.mark.parametrize(
    ("operands", "rates"),
    [
        (OPERANDS[0], "128 float32"),
        (OPERANDS[1], "1,024 TF32"),
        (OPERANDS[2], "2,048 bfloat16"),
        (MIXED, "128 float32 and 1,024 TF32"),
    ],
)
@pytest.mark.parametrize("gram", [False, True])
def test_words_name_the_binding_resource(gram, operands, rates):
    network, _, result = placed("mnist_cnn", gram, operands)
    lines = words(network, result, KNOWN)
    least = floors(result, KNOWN)
    for l in range(2, network.depth + 1):
        line = next(line for line in lines if line.startswith(f"layer {l} "))
        assert f"floor {least[l].clocks:,.0f} clocks an iteration" in line and least[l].binding in line
        assert f"{least[l].multiply_adds:,} multiply-adds, {least[l].bytes:,} bytes of shared memory" in line
    assert any(line.startswith("floor of all layers") and "us at 1980 MHz" in line for line in lines)
    assert any(line.startswith(f"floors at {rates} multiply-adds and 128 bytes") for line in lines)
    assert any("published: CUDA C++ Programming Guide" in line for line in lines)
