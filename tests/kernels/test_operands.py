"""What products read: in bfloat16 and TF32 operands of their own, rounded by the kernel that stores them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from against_reference import in_double
from implicit_convolutions import EveryConvolution
from test_streamed import mlp
from torch import nn

import pcfast
from pcfast.backends.kernel_forms import LinearForm, PointwiseForm
from pcfast.backends.triton import designs
from pcfast.backends.triton.configs import NONE
from pcfast.backends.triton.conv_form import ConvForm
from pcfast.backends.triton.loop import Loop
from pcfast.checking.bounds import relative_error

BATCH = 5
#: (of linear layers, of convolutions): torch has a switch for each
PRECISIONS = [("tf32", "tf32"), ("tf32", "tf32x3"), ("tf32x3", "tf32"), ("tf32x3", "tf32x3")]


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 5, 2), nn.Tanh(), nn.Flatten()),
        nn.Sequential(nn.Linear(20, 70), nn.Sigmoid()),
        nn.Linear(70, 4),
    )


#: name -> (network, shape of a sample, whether convolutions are implicit)
NETWORKS = {
    "convolutions": (convolutions, (2, 6, 6), True),
    "cuDNN's convolutions": (convolutions, (2, 6, 6), False),
    "stages": (lambda: mlp(12, 20, 33, 17, 80), (12,), False),
    "one launch": (lambda: mlp(12, 20, 33, 17, 4), (12,), False),
    "Gram form": (lambda: mlp(12, 60, 7, 5, 4), (12,), False),
}


@pytest.fixture
def loops(monkeypatch) -> list[Loop]:
    result, run = [], Loop.run
    monkeypatch.setattr(Loop, "run", lambda self, *arguments: (run(self, *arguments), result.append(self)))
    return result


def relaxed(monkeypatch, name: str, precisions: tuple[str, str], num_steps: int):
    """Largest relative error of eps against float64, from other beliefs than the forward pass's."""
    make, shape, implicit = NETWORKS[name]
    target = designs.target_of
    changes = dict(zip(("precision", "convolution_precision"), precisions, strict=True))
    changes["choices"] = EveryConvolution() if implicit else NONE
    monkeypatch.setattr(designs, "target_of", lambda *a: dataclasses.replace(target(*a), **changes))
    torch.manual_seed(1)
    model, x = make(), torch.randn(BATCH, *shape)
    y = torch.randint(0, 4, (BATCH,))
    beliefs = pcfast.relax(model, x, y, num_steps=0, backend="reference").beliefs[1:-1]
    start = [None, *(v + 0.1 * torch.randn_like(v) for v in beliefs), None]
    result = pcfast.relax(model, x, y, num_steps=num_steps, backend="triton", vinit=start)
    wide = [v if v is None else v.double() for v in start]
    truth = pcfast.relax(*in_double(model, x, y), num_steps=num_steps, backend="reference", vinit=wide)
    depth = len(truth.beliefs)
    return max(relative_error(result.errors[l], truth.errors[l]) for l in range(2, depth))


@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize(
    ("name", "precisions"),
    [(n, p) for n in NETWORKS for p in PRECISIONS if "convolutions" in n or p[0] != p[1]],
)
def test_operands_are_rounded_where_they_are_stored(name, precisions, num_steps, loops, monkeypatch):
    error = relaxed(monkeypatch, name, precisions, num_steps)
    design, arena = loops[0].design, loops[0].arena
    for l in range(2, design.depth + 1):
        form = design.forms[l]
        precision = precisions[not isinstance(form, LinearForm)]
        rounds = isinstance(form, LinearForm | ConvForm) and precision == "tf32"
        assert isinstance(form, LinearForm | PointwiseForm if "cuDNN" in name else LinearForm | ConvForm)
        for operand in (f"weight{l}", f"delta{l}", f"d_operand{l - 1}"):
            if operand in arena:
                low = arena.matrix(operand).contiguous().view(torch.int32) & 0x1FFF
                assert bool(low.any()) != rounds, operand
        if f"d_operand{l - 1}" in arena:
            d, copy = arena.matrix(f"d{l - 1}"), arena.matrix(f"d_operand{l - 1}")
            assert (d.data_ptr() != copy.data_ptr()) == rounds
            torch.testing.assert_close(copy, d, rtol=2.0**-11 if rounds else 0.0, atol=0.0)
    implicit = name == "convolutions" and precisions[1] == "tf32"
    if precisions[0] == "tf32" or implicit:
        assert 1e-5 < error < (num_steps + 1) * 2**-11  # each iteration rounds operands to 11 bits
    else:
        assert error < 3e-6
