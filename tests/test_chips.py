"""Chips that are not here: the table, the chip that a device is, and what `explain` says of a chip by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pcfast
from pcfast import networks
from pcfast.backends import chips
from pcfast.backends.chips import TABLE, chip_of
from pcfast.cli import main
from pcfast.precision import use_precision

pytest.importorskip("triton")  # whose tiles are explained

ALIASES = [chip.alias for chip in TABLE]
NETWORKS = {
    "mlp": (lambda: networks.mlp([784, 64, 64, 10]), (300, 784)),
    "cnn": (networks.mnist_cnn, (300, 1, 28, 28)),
}
WORDS = r"(\d+) samples? per block, (\d+) blocks of 512 threads, 1 per SM, (\d+) waves?\n\s*([\d,]+) bytes"


def explained(kind: str, device: str, **settings) -> pcfast.Explanation:
    make, shape = NETWORKS[kind]
    return pcfast.explain(make(), shape, device, **settings)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Has torch say that a GPU like a chip of the table is here."""

    def here(alias: str, name: str, **told) -> None:
        chip = chips.by_name(alias)
        sizes = {
            "multi_processor_count": chip.sm_count,
            "shared_memory_per_block_optin": chip.shared_memory_per_block_bytes,
            "shared_memory_per_multiprocessor": chip.shared_memory_per_sm_bytes,
        }
        major, minor = chip.capability
        properties = SimpleNamespace(name=name, major=major, minor=minor, **sizes | told)
        for function, value in {
            "device_count": 1, "current_device": 0, "get_device_properties": properties,
            "get_device_name": name, "get_device_capability": chip.capability,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
        chips._here.cache_clear()

    yield here
    chips._here.cache_clear()


# ---- the table


def test_peaks_are_those_of_the_units_at_the_clock():
    """Multiply-adds of all SMs in a clock, and the published peak: two figures of one chip."""
    for chip in TABLE:
        for operand in ("ieee", "tf32", "bf16"):
            per_clock = 2 * chip.sm_count * getattr(chip.multiply_adds_per_clock, operand)
            clock = 1e6 * getattr(chip.peak_tflops, operand) / per_clock
            assert 0.92 < clock / chip.sm_clock_mhz < 1.07, (chip.alias, operand, clock)


@pytest.mark.parametrize(
    ("given", "name", "figures_of"),
    [
        ("H200", "NVIDIA H200", ""),
        ("NVIDIA A100", "NVIDIA A100", ""),
        ("rtx-4090", "NVIDIA GeForce RTX 4090", ""),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090", ""),
        ("sm_90a", "sm_90a", "NVIDIA H200"),
        ("sm_120", "sm_120", "NVIDIA GeForce RTX 5090"),
    ],
)
def test_chips_by_name(given, name, figures_of):
    chip = chips.by_name(given)
    assert (chip.name, chip.figures_of) == (name, figures_of)


@pytest.mark.parametrize(
    ("name", "capability", "alias", "own"),
    [
        ("NVIDIA H200", (9, 0), "h200", True),
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100", True),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100", True),
        ("NVIDIA B200", (10, 0), "b200", True),
        ("NVIDIA GeForce RTX 4090", (8, 9), "rtx4090", True),
        ("NVIDIA H100 PCIe", (9, 0), "h200", False),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "a100", False),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), "rtx4090", False),
        ("NVIDIA L40S", (8, 9), "rtx4090", False),
        ("NVIDIA H200 MIG 1g.18gb", (9, 0), "h200", False),
        ("NVIDIA GH200 480GB", (9, 0), "h200", False),
        ("Tesla V100-SXM2-16GB", (7, 0), "h200", False),
    ],
)
def test_boards_that_the_table_lacks_say_whose_figures_they_have(name, capability, alias, own):
    chip = chips.like(name, capability)
    assert (chip.name, chip.capability, chip.alias) == (name, capability, alias)
    assert (chip.figures_of == "") == own


def test_sizes_of_a_gpu_that_is_here_are_torchs(on_a_gpu):
    on_a_gpu(
        "a100", "NVIDIA A100-SXM4-80GB", multi_processor_count=54, shared_memory_per_block_optin=99 << 10
    )
    chip = chip_of(torch.device("cuda"))
    assert (chip.sm_count, chip.shared_memory_per_block_bytes) == (54, 99 << 10)
    assert chip.memory_bandwidth_gbs == 2039 and chip.is_here
    assert chip_of(torch.device("cpu")) == chips.DEFAULT
    with chips.planning_for(chips.by_name("b200")):  # not those of the GPU that is here
        assert chip_of(torch.device("cuda")).sm_count == 148
    assert chip_of(torch.device("cuda")) == chip


# ---- explain


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_chip_is_planned_for(alias, kind):
    chip = chips.by_name(alias)
    told = explained(kind, alias)
    text = str(told)
    assert f"for {chip.name}, planned without one" in text and "is measured on the device" in text
    assert {"triton", "eager"} <= set(told.candidates) and told.plan.backend == ""
    (programs,) = {int(n) for n in re.findall(r"linear_predict for .* on (\d+) programs", text)} or {0}
    assert programs <= chip.sm_count
    assert programs or "mlp_relaxation" in text
    if "cuda" not in told.candidates:
        assert kind == "cnn" and chip.shared_memory_per_block_bytes < 164_256
        assert "one sample and the loop's weights take 164,256 bytes" in told.refused["cuda"]
        return
    samples, blocks, waves, memory = (int(n.replace(",", "")) for n in re.search(WORDS, text).groups())
    assert memory <= chip.shared_memory_per_block_bytes
    assert blocks == -(-300 // samples) and waves == -(-blocks // chip.sm_count)


def test_less_shared_memory_places_fewer_samples():
    """784-128-128-10 needs 80 kB with one sample: a GeForce has no room for many."""
    make = lambda: networks.mlp([784, 128, 128, 10])  # noqa: E731
    samples = {}
    for alias in ("h200", "rtx4090"):
        text = str(pcfast.explain(make(), (4000, 784), alias, backend="cuda"))
        samples[alias] = int(re.search(WORDS, text)[1])
    assert samples["h200"] > samples["rtx4090"] >= 1
    with pytest.raises(pcfast.BackendError, match="a block has 101,376"):
        explained("cnn", "rtx4090", backend="cuda")


def test_an_h200_by_numbers():
    """The paper's network: 132 SMs want 3 samples a block; the floor by hand from the bytes that are shown."""
    text = str(explained("cnn", "h200", backend="cuda"))
    assert "3 samples per block, 100 blocks of 512 threads, 1 per SM, 1 wave\n" in text
    arrays = [int(n.replace(",", "")) for line in re.findall(r"^(?:layer|all).*?:(.*) bytes", text, re.M)
              for n in re.findall(r"[a-z_]+ ([\d,]+)", line.split(" bytes; floor")[0])]  # fmt: skip
    assert f"{sum(arrays):,} bytes of shared memory per block" in text
    moved = int(re.search(r"floor of all layers .* ([\d,]+) bytes of", text)[1].replace(",", ""))
    assert f"floor of all layers {moved / 128:,.0f} clocks" in text
    assert f"{moved / 128 / 1980:.3g} us at 1980 MHz" in text


@pytest.mark.parametrize(
    ("alias", "name"), [("h200", "NVIDIA H200"), ("rtx4090", "NVIDIA GeForce RTX 4090")], ids=lambda n: n
)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_chip_by_name_is_explained_as_one_that_is_here(
    alias, name, precision, backend, on_a_gpu, monkeypatch
):
    if backend == "cuda":
        monkeypatch.setattr("pcfast.backends.cuda.native.load_error", lambda: "")
    with use_precision(precision, torch.device("cuda")):
        by_name = explained("mlp", alias, backend=backend)
        on_a_gpu(alias, name)
        here = explained("mlp", "cuda", backend=backend)
    assert here.chip is None and by_name.chip.name == name
    assert here.kernels == by_name.kernels and here.plan == by_name.plan
    word = {"cuda": ("float32", "TF32", "bfloat16"), "triton": ("tf32x3", "tf32", "bf16")}[backend]
    assert word[("ieee", "tf32", "bf16").index(precision)] in "\n".join(here.kernels)


def test_what_is_planned_for_a_chip_needs_no_kernels_here(monkeypatch):
    monkeypatch.setattr("pcfast.backends.cuda.native.load_error", lambda: "not compiled")
    assert "cuda" in explained("mlp", "h200").candidates


def test_one_backend_that_is_left_is_the_answer():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    told = pcfast.explain(model, (4, 6), "h200")
    assert told.plan.backend == "eager" and not told.candidates
    assert "float64" in told.refused["cuda"] and told.refused["reference"] == "eager comes first"


def test_old_chips_are_refused():
    old = replace(chips.DEFAULT, capability=(7, 0))
    for name in ("cuda", "triton"):
        with chips.planning_for(old):
            ok, reason = pcfast.backends.BACKENDS[name].supports(explained("mlp", "h200").plan)
        assert not ok and "8.0 or newer, this GPU has 7.0" in reason


@pytest.mark.parametrize("device", ["h300", "sm_75", "sm_103a", "gpu"])
def test_an_unknown_chip_gets_the_names_of_those_that_are_known(device):
    with pytest.raises(pcfast.ArgumentError, match=re.escape(device)) as caught:
        explained("mlp", device)
    assert all(alias in str(caught.value) for alias in ALIASES) and "sm_89" in str(caught.value)


# ---- the command


def test_the_command(capsys):
    arguments = ["explain", "--net", "cnn", "--device", "rtx4090", "--precision", "bf16"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chip"]["sm_count"] == 128 and told["device"] is None and told["backend"] is None
    assert told["candidates"] == list(told["kernels"]) == ["cuda", "triton", "eager"]
    assert told["precision"]["operand"] == "torch.bfloat16"
    lines = [line for kernels in told["kernels"].values() for line in kernels]
    assert len(lines) > 10 and all(line in text for line in lines)
    assert not torch.is_autocast_enabled("cuda")


def test_the_command_on_what_is_here(capsys):
    assert main(["explain", "--net", "mlp", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "cpu" and told["chip"] is None and told["backend"] == "cpu"
    assert told["multiply_adds"]["total"] == sum(
        told["multiply_adds"][part] for part in ("forward", "relaxation", "gradients")
    )
    assert main(["explain", "--device", "h300"]) == 2
    assert capsys.readouterr().err.startswith("error: --device: got 'h300'")
