"""The resident tier's floor: the planner's multiply-adds, bytes counted by hand, and its words."""

from __future__ import annotations

import pytest
from torch import nn

from pcfast import constants, networks
from pcfast.network import describe
from pcfast.planning import gram_macs, layer_macs
from pcfast.resident.floor import floors
from pcfast.resident.placement import Chip, Placement, place
from pcfast.resident.words import describe as words

KNOWN = constants.load()
CHIP = Chip(KNOWN.sm_count, KNOWN.shared_memory_per_block_bytes, KNOWN.shared_memory_per_sm_bytes)


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


def placed(name: str, gram: bool):
    make, shape = NETWORKS[name]
    network = describe(make())
    shapes = network.shapes(shape)
    found = place(network, shapes, gram, "cross_entropy", 4, CHIP)
    assert isinstance(found, Placement)
    return network, shapes, found


@pytest.mark.parametrize(
    ("name", "gram"),
    [(name, gram) for name in NETWORKS for gram in (False, True) if not (gram and name == "padded_cnn")],
)
def test_multiply_adds_are_the_planners(name, gram):
    network, shapes, found = placed(name, gram)
    least = floors(found, KNOWN)
    batch, macs = shapes[0][0][0], layer_macs(network, shapes)
    for l in range(2, network.depth + 1):
        whole = gram_macs(network, shapes) if gram and l == 2 else 2 * macs[l - 1]
        assert least[l].multiply_adds * batch == whole * found.samples
    assert least[0].multiply_adds == sum(least[l].multiply_adds for l in range(2, network.depth + 1))
    assert least[0].bytes == sum(least[l].bytes for l in range(2, network.depth + 1))


def test_bytes_counted_by_hand():
    """37-8-8-4, one sample a block, not in Gram form."""
    network = describe(networks.mlp([37, 8, 8, 4]))
    shapes = network.shapes((5, 37))
    found = place(network, shapes, False, "cross_entropy", 4, CHIP)
    assert found.samples == 1
    hidden_predict = 8 * 8 + 8  # every weight, and d_1 once: lanes of the same quad of k read the same four
    # every weight, and delta_2; a lane's three other rows are past the end, where all lanes read the last row again
    hidden_feedback = 8 * 8 + 8 + 3 * 8
    hidden_scratch = 8 + 8
    # uhat, s, delta written; d_2 read and written; r and d_1 read, d_1 written
    hidden_pointwise = 3 * 8 + 2 * 8 + 3 * 8
    output = (4 * 8 + 8) + (4 * 8 + 4 + 3 * 4) + (4 + 8) + (3 * 4 + 2 * 4 + 3 * 8)
    least = floors(found, KNOWN)
    assert least[2].bytes == 4 * (hidden_predict + hidden_feedback + hidden_scratch + hidden_pointwise)
    assert least[3].bytes == 4 * output
    assert least[2].clocks == least[2].bytes / 128 and least[2].binding == "shared memory"


@pytest.mark.parametrize("gram", [False, True])
def test_words_name_the_binding_resource(gram):
    network, _, found = placed("mnist_cnn", gram)
    lines = words(network, found, KNOWN)
    least = floors(found, KNOWN)
    for l in range(2, network.depth + 1):
        line = next(line for line in lines if line.startswith(f"layer {l} "))
        assert f"floor {least[l].clocks:,.0f} clocks an iteration" in line and least[l].binding in line
        assert f"{least[l].multiply_adds:,} multiply-adds, {least[l].bytes:,} bytes of shared memory" in line
    assert any(line.startswith("floor of all layers") and "us at 1980 MHz" in line for line in lines)
    assert any("published: CUDA C++ Programming Guide" in line for line in lines)
