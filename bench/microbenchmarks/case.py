"""What a microbenchmark is: some work, and one or more ways to launch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .rounding import Judgement

#: Precision of a kernel's products -> the one of :data:`pcfast.precision.PRECISIONS` that it serves. Kernels without
#: products compute in float32 and write float32 or bfloat16 operands; the resident kernel's are float32, too.
TORCH_PRECISION = {"bf16": "bf16", "tf32": "tf32", "tf32x3": "ieee", "fp32": "ieee"}
PRODUCTS = ("bf16", "tf32", "tf32x3")
ELEMENTWISE = ("bf16", "fp32")

#: Of feedback launches: they are repeated on the same beliefs some 10,000 times, which must not overflow.
ETA = 1e-3
#: Of the deviations there before the first: as large as a step, so that a gate sees both.
BEFORE = 1e-3


@dataclass(frozen=True)
class Way:
    """One way to do a case's work.

    Attributes:
        name: "triton", "cuda", or what else does the same.
        tiles: the launch's configuration in words; "" where it is not ours.
        launch: does the work, on the current stream.
        judge: what :meth:`launch` computed from the case's inputs as drawn; called once, before any timing.
        times: how often one call does the work that is counted: iterations of a loop.
        size: what this way does more or less of than the case's others, in words; they are no rivals then.
    """

    name: str
    tiles: str
    launch: Callable[[], None]
    judge: Callable[[], Judgement]
    times: int = 1
    size: str = ""

    @property
    def label(self) -> str:
        """Of one way among its case's."""
        return f"{self.name}, {self.size}" if self.size else self.name


@dataclass(frozen=True)
class Case:
    """Some work.

    Attributes:
        kernel: whose. size: of the problem, in words.
        precision: key of :data:`TORCH_PRECISION`.
        multiply_adds: of its products. bytes: of device memory that cannot but move, each array once.
        labels: of its ways, which are known before any inputs are drawn.
        ways: draws the inputs on a device and prepares all ways.
        ineligible_reason: why none can run on a device, "" where they can.
    """

    kernel: str
    size: str
    precision: str
    multiply_adds: int
    bytes: int
    labels: tuple[str, ...]
    ways: Callable[[torch.device], list[Way]]
    ineligible_reason: Callable[[torch.device], str] = lambda device: ""


def torch_precision(precision: str, device: torch.device) -> str:
    """Torch's switches for a kernel's precision; a CPU has no TF32."""
    name = TORCH_PRECISION[precision]
    return "ieee" if name == "tf32" and device.type != "cuda" else name


def operand_dtype(precision: str) -> torch.dtype:
    """What products read."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def operand_bytes(precision: str) -> int:
    return operand_dtype(precision).itemsize


def normal(shape: tuple[int, ...], device: torch.device, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers, fp32, the same in every run."""
    generator = torch.Generator(device).manual_seed(1000 * seed + sum(shape))
    return scale * torch.randn(shape, generator=generator, device=device)


def ends(batch: int, rows: int = 8) -> Tensor:
    """Indices of the samples that a gate looks at: samples do not interact, and the tiles' edges lie at the ends."""
    return torch.tensor(sorted({*range(min(rows, batch)), *range(max(batch - rows, 0), batch)}))


def described(tiles, programs: int | None = None) -> str:
    """A configuration in words."""
    grid = "" if programs is None else f", {programs} programs"
    return f"{tiles}, {tiles.warps} warps, {tiles.stages} stages{grid}"
