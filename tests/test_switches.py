"""torch's numeric switches in a precision: the newer and the older ones agree, and all come back."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pcfast.precision import Precision, numerics, use_precision

CUDA = torch.device("cuda")  # switches need none


def switches() -> dict[str, object]:
    """All of them, as they read; the type of the error where torch refuses to tell."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    result = {
        "products": lambda: products.fp32_precision,
        "products, older": torch.get_float32_matmul_precision,
        "products, oldest": lambda: products.allow_tf32,
        "products on the CPU": lambda: torch.backends.mkldnn.matmul.fp32_precision,
        "convolutions": lambda: cudnn.conv.fp32_precision,
        "recurrent layers": lambda: cudnn.rnn.fp32_precision,
        "cuDNN, older": lambda: cudnn.allow_tf32,
    }
    return {name: _told(read) for name, read in result.items()}


def _told(read):
    try:
        return read()
    except RuntimeError as error:
        return type(error)


def set_by_hand(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


@contextlib.contextmanager
def kept():
    """Torch's defaults afterwards."""
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.filterwarnings("ignore:Please use the new API")  # of some torch releases
@pytest.mark.parametrize(
    "before", [None, lambda: torch.set_float32_matmul_precision("medium"), lambda: set_by_hand("tf32")]
)
@pytest.mark.parametrize("name", ["ieee", "tf32"])
def test_older_switches_can_be_read_in_every_precision(name, before):
    with kept():
        if before is not None:
            before()
        outside = switches()
        with use_precision(name, CUDA):
            inside = switches()
        assert switches() == outside
    tf32 = name == "tf32"
    assert inside["products"] == inside["convolutions"] == inside["recurrent layers"] == name
    assert inside["products on the CPU"] == outside["products on the CPU"]
    assert inside["cuDNN, older"] == tf32
    if outside["products, older"] == "highest":
        assert (inside["products, older"], inside["products, oldest"]) == (
            "high" if tf32 else "highest",
            tf32,
        )


def test_float16_autocast_switches_tf32_on_for_a_relaxation():
    with kept():
        outside = switches()
        with numerics(CUDA, Precision(torch.float32, torch.float32, torch.float16)):
            inside = switches()
        assert switches() == outside
    assert (inside["products"], inside["products, older"], inside["products, oldest"]) == (
        "tf32",
        "high",
        True,
    )
