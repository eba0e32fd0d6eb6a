"""What ``pcfast check`` found: a row a quantity, with its bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Before a parameter's name: the quantity that its update is.
UPDATE = "update "


@dataclass(frozen=True)
class Row:
    """One quantity of one layer, from one backend in one precision.

    Attributes:
        backend, precision: what ran (:data:`pcfast.precision.PRECISIONS`).
        layer: PC layer, 1-based; None where a run failed as a whole.
        quantity: "belief" v_l, "error" eps_l, "update NAME" of the parameter NAME; "run" where a run failed as
            a whole.
        error, bound: Frobenius norms. In fp64 of the draw that comes closest to its bound, in other precisions
            medians over the draws; NaN where any draw gave NaN.
        relative_to: what they are relative to. "truth": the float64 value. "layer": the layer's whole update, since
            this update is nothing but rounding (a bias below a BatchNorm). "nothing": they are absolute, since the
            truth is zero (the relaxation has not reached the layer yet).
        message: what else there is to say; "" where nothing.
    """

    backend: str
    precision: str
    layer: int | None
    quantity: str
    error: float
    bound: float
    relative_to: str
    message: str = ""

    @property
    def ok(self) -> bool:
        """error <= bound; False where either is not a finite number."""
        return math.isfinite(self.error) and math.isfinite(self.bound) and self.error <= self.bound

    @property
    def ratio(self) -> float:
        """error / bound; infinite where there is no number."""
        if not (math.isfinite(self.error) and math.isfinite(self.bound)):
            return math.inf
        if self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound else math.inf

    @property
    def words(self) -> str:
        """What was compared, and how it came out."""
        said = self.message or f"error {self.error:.1e}, bound {self.bound:.1e}"
        return f"layer {self.layer}, {self.quantity}: {said}"


@dataclass(frozen=True)
class Refusal:
    """A backend that cannot run the network in a precision, and why."""

    backend: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`check` found.

    Attributes:
        method, step_size, num_steps: settings of the relaxation.
        device: where it ran.
        x_shape: of the first batch.
        draws: number of batches.
        rows: by backend, then precision, then layer.
        refused: what could not run.
        notes: what to know when reading the rows.
    """

    method: str
    step_size: float
    num_steps: int
    device: str
    x_shape: tuple[int, ...]
    draws: int
    rows: tuple[Row, ...]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Every row is within its bound."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are out of their bounds."""
        return tuple(row for row in self.rows if not row.ok)

    def worst(self) -> dict[tuple[str, str], Row]:
        """(backend, precision) -> the row that comes closest to its bound, or is furthest out of it."""
        result: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            key = row.backend, row.precision
            if key not in result or row.ratio > result[key].ratio:
                result[key] = row
        return result
