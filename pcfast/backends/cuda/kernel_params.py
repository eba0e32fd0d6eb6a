"""The resident kernel's arguments as it reads them: a mirror of csrc/resident/program.h, compared with it by size."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_int32, c_int64, c_uint32, c_void_p

from . import geometry

#: Codes of what products read, by the words of pcfast.precision.Operands.
OPERANDS = {"ieee": geometry.IEEE, "tf32": geometry.TF32, "bf16": geometry.BF16}


def _ints(*names: str) -> list:
    return [(name, c_int32) for name in names]


class StridedView(Structure):
    _fields_ = _ints("first", "samples", "channels", "rows", "columns")


class Divisor(Structure):
    _fields_ = [("value", c_int32), ("multiplier", c_uint32)]


def divisor(value: int) -> Divisor:
    """Returns a divisor by which quotients of n are exact up to (n + 1) value = 2^32.

    Its multiplier is at most 1 below 2^32 / value.
    """
    return Divisor(value, (2**32 - 1) // value)


class Product(Structure):
    _fields_ = [
        *_ints("kind", "out", "height", "width"),
        ("by_area", Divisor),
        ("by_width", Divisor),
        *_ints("channels", "taps_y", "taps_x"),
        *_ints("weights", "weight_row", "weight_channel", "weight_tap_y", "weight_tap_x"),
        ("input", StridedView),
        *_ints("input_tap_y", "input_tap_x", "scratch", "scratch_sample", "scratch_split"),
        *_ints("units"),
        ("by_splits", Divisor),
        ("by_tiles", Divisor),
        *_ints("split", "lanes_log2", "rows_per_thread", "tiles", "terms", "term_count"),
    ]

    @property
    def splits(self) -> int:
        return self.by_splits.value

    @property
    def lanes(self) -> int:
        return 1 << self.lanes_log2


class Layer(Structure):
    _fields_ = [
        ("predict", Product),
        ("feedback", Product),
        *_ints("channels", "height", "width"),
        *_ints("size"),
        ("by_area", Divisor),
        ("by_width", Divisor),
        *_ints("items"),
        ("by_items", Divisor),
        *_ints("pool", "window_y", "window_x"),
        ("by_window_x", Divisor),
        *_ints("before", "after"),
        ("before_negative_slope", c_double),
        ("after_negative_slope", c_double),
        *_ints(
            "uhat",
            "uhat_sample",
            "velocity",
            "velocity_sample",
            "operand",
            "weights",
            "weight_inputs",
            "weight_stride",
            "gram",
        ),
        ("delta", StridedView),
        ("d", StridedView),
    ]


class Program(Structure):
    _fields_ = [
        *_ints("depth", "samples", "group", "elements", "loss", "classes"),
        *_ints("vhat", "target", "target_sum", "classes_stride", "first_in_loop"),
        ("layers", Layer * geometry.MAX_LAYERS),
    ]


_PerLayer = c_void_p * geometry.MAX_LAYERS


class Tensors(Structure):
    _fields_ = [
        *((name, _PerLayer) for name in ("weight", "bias", "start")),
        *(
            (name, c_void_p)
            for name in ("vhat_1", "uhat_2", "labels", "target", "class_weight", "step_sizes")
        ),
        *((name, _PerLayer) for name in ("vhat", "belief", "error", "local_error")),
        *((name, c_void_p) for name in ("loss_rows", "output_gradient", "gram_sum", "gram_sum_before")),
        ("first_bad", c_void_p),
    ]


class RunParams(Structure):
    _fields_ = [
        *_ints("batch", "iterations", "fresh", "mean", "every_row"),
        ("ignored_label", c_int64),
        *((name, c_double) for name in ("eta", "momentum", "smoothing", "share", "loss_scale")),
    ]


def sizes() -> tuple[int, int, int]:
    """Returns the bytes of Program, Tensors and RunParams."""
    return tuple(ctypes.sizeof(kind) for kind in (Program, Tensors, RunParams))
