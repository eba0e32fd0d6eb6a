"""Which kernels are compiled: QUICK in every test run, CASES and FULL by `make compile-all`.

QUICK and CASES have recorded limits; FULL is held to the chips' own.

Configurations come from the functions that choose them at run time, so what is compiled here is what runs.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from compilation import Case, matrix_instruction

from pcfast.backends.triton.configs import LaunchKey
from pcfast.backends.triton.tiles import LinearTiles, fused_loop_tiles, linear_tiles
from pcfast.kernels import conv_feedback, conv_predict, pointwise_error, pointwise_gram
from pcfast.kernels.codes import activation_code
from pcfast.kernels.conv_geometry import ConvGeometry
from pcfast.kernels.grouped_gemm import MAX_REGISTERS
from pcfast.kernels.limits import LOSS_COLUMNS
from pcfast.kernels.linear_predict import NO_TOP
from pcfast.kernels.output_error import CROSS_ENTROPY, output_tile
from pcfast.model import activations
from pcfast.tuning.search_space import candidates

CHIPS = (80, 90, 100)
ALL_CHIPS = (80, 86, 90, 100, 120)
PRECISIONS = ("bf16", "tf32", "tf32x3")
SM_COUNT = 132
# one launch for each shape of tile: (batch, out, in)
SIZES = {"wide": (4096, 4096, 4096), "middle": (2048, 1024, 1024), "small": (128, 128, 128)}


def _operand(precision: str) -> str:
    return "*bf16" if precision == "bf16" else "*fp32"


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _tile_constants(tiles: LinearTiles, precision: str, aligned: bool = True) -> dict:
    return {
        **tiles.constants(),
        "INPUT_PRECISION": "ieee" if precision == "bf16" else precision,
        "ALIGNED": 16 if aligned else 1,
    }


def _predict_constants(tiles: LinearTiles, precision: str, activation, aligned: bool = True) -> dict:
    act, negative_slope = activation_code(activation)
    # the loss is in launches of small tiles only
    top = (
        dict(TOP_ACT=0, TOP_NEGATIVE_SLOPE=0.0, LOSS=CROSS_ENTROPY.value)
        if tiles.block_n <= LOSS_COLUMNS
        else NO_TOP
    )
    return dict(ACT=act, NEGATIVE_SLOPE=negative_slope, **top, **_tile_constants(tiles, precision, aligned))


def _linear(
    kernel: str, name: str, tiles: LinearTiles, precision: str, capability: int, constexprs: dict
) -> Case:
    types = {"state": "*fp32", "operand": _operand(precision)}
    if kernel == "linear_predict":
        types |= {"table": "*i64", "products": "i32", "front": "i32", "loss_scale": "fp32"}
    elif kernel == "linear_feedback":
        types |= {"table": "*i64", "first_bad": "*i32", "count": "i32", "iteration": "i32", "eta": "fp32"}
        constexprs = {**constexprs, "momentum": None}
    else:
        types |= {"predict_table": "*i64", "feedback_table": "*i64", "first_bad": "*i32"}
        types |= dict.fromkeys(("layers", "first", "last", "fresh"), "i32")
        types |= {"eta": "fp32", "loss_scale": "fp32"}
        constexprs = {**constexprs, "schedule": None, "momentum": None}
    return Case(
        name=name,
        kernel=f"pcfast.kernels.{kernel}:{kernel}",
        signature=types,
        constexprs=constexprs,
        capability=capability,
        divisible=tuple(argument for argument, kind in types.items() if kind.startswith("*")),
        warps=tiles.warps,
        stages=tiles.stages,
        max_registers=MAX_REGISTERS,
        instruction=matrix_instruction(capability, tiles.block_m, tiles.warps),
    )


def linear_cases(chips, sizes, acts) -> list[Case]:
    cases = []
    for capability, precision, size in itertools.product(chips, PRECISIONS, sizes):
        for act in acts:
            tiles = linear_tiles([SIZES[size]], precision, SM_COUNT, activation=act)
            constexprs = _predict_constants(tiles, precision, act)
            name = f"linear_predict, {size}, {precision}, {type(act).__name__}"
            cases.append(_linear("linear_predict", name, tiles, precision, capability, constexprs))
        tiles = linear_tiles([SIZES[size]], precision, SM_COUNT)
        constexprs = _tile_constants(tiles, precision)
        name = f"linear_feedback, {size}, {precision}"
        cases.append(_linear("linear_feedback", name, tiles, precision, capability, constexprs))
    for capability, precision, act in itertools.product(chips, PRECISIONS, acts):
        tiles = fused_loop_tiles(precision)
        constexprs = _predict_constants(tiles, precision, act)
        name = f"mlp_relaxation, {precision}, {type(act).__name__}"
        cases.append(_linear("mlp_relaxation", name, tiles, precision, capability, constexprs))
    return cases


def candidate_cases(chips) -> list[Case]:
    """What tuning tries for launches of linear layers, with the activation that takes most registers."""
    cases = []
    for capability, precision, kernel in itertools.product(
        chips, PRECISIONS, ("linear_predict", "linear_feedback", "mlp_relaxation")
    ):
        whole = kernel == "mlp_relaxation"
        by_rule = (
            fused_loop_tiles(precision) if whole else linear_tiles([SIZES["small"]], precision, SM_COUNT)
        )
        for tiles in candidates(LaunchKey(kernel, precision, whole, 128, ((128, 128),)), by_rule, False):
            constexprs = _tile_constants(tiles, precision)
            if kernel != "linear_feedback":
                constexprs = _predict_constants(tiles, precision, _GELU)
            if kernel == "linear_predict":
                constexprs |= NO_TOP
            shape = f"{tiles.block_m} x {tiles.block_n}, {tiles.warps} warps, {tiles.stages} stages"
            name = f"{kernel}, {precision}, {shape}"
            cases.append(_linear(kernel, name, tiles, precision, capability, constexprs))
    return cases


CONVOLUTIONS = {
    "vgg": ConvGeometry(16, 16, 128, 256, (3, 3), (1, 1), (1, 1), "max", (2, 2)),
    "unpooled": ConvGeometry(32, 32, 64, 128, (3, 3), (1, 1), (1, 1)),
    "mnist": ConvGeometry(13, 13, 10, 5, (3, 3)),
}
SMALL_MAX_POOLED = ConvGeometry(6, 6, 16, 16, (3, 3), (1, 1), (1, 1), "max", (2, 2))


def _conv_predict(name: str, geometry: ConvGeometry, precision: str, capability: int, before, after) -> Case:
    operand, pooled = _operand(precision), geometry.pool is not None
    tiles = conv_predict.predict_tiles(geometry, precision, before, after)
    constants = conv_predict.predict_constants(
        geometry,
        before=before,
        after=after,
        precision=precision,
        operand=_dtype(precision),
        tiles=tiles,
        wide=False,
    )
    types = dict(
        d=operand, weight=operand, uhat="*fp32", d_out="*fp32", error="*fp32", delta=operand,
        **({"winner": "*u8"} if pooled else {}), batch="i32",
    )  # fmt: skip
    missing = {} if pooled else {"winner": None}
    name = f"conv_predict, {name}, {precision}"
    return _conv("conv_predict", name, types, {**constants, **missing}, tiles, capability)


def conv_cases(chips, names) -> list[Case]:
    cases = []
    for capability, precision, name in itertools.product(chips, PRECISIONS, names):
        geometry, dtype = CONVOLUTIONS[name], _dtype(precision)
        pooled = geometry.pool is not None
        missing = {} if pooled else {"winner": None}
        operand = _operand(precision)
        cases.append(_conv_predict(name, geometry, precision, capability, None, activations.Relu()))
        tiles = conv_feedback.feedback_tiles(geometry, precision)
        constants = conv_feedback.feedback_constants(
            geometry, clamped=False, precision=precision, operand=dtype, tiles=tiles, wide=False
        )
        copied = precision != "tf32x3"
        types = dict(
            delta=operand, **({"winner": "*u8"} if pooled else {}), weight=operand, d="*fp32", error="*fp32",
            **({"copy": operand} if copied else {}), first_bad="*i32", batch="i32", layer="i32", iteration="i32",
            eta="fp32",
        )  # fmt: skip
        missing |= {} if copied else {"copy": None}
        missing |= {"velocity": None, "momentum": None}
        cases.append(
            _conv("conv_feedback", f"conv_feedback, {name}, {precision}", types, {**constants, **missing}, tiles,
                  capability, geometry.pool == "max")
        )  # fmt: skip
    return cases


def _conv(
    kernel: str, name: str, types: dict, constexprs: dict, tiles, capability: int, transposed=False
) -> Case:
    return Case(
        name=name,
        kernel=f"pcfast.kernels.{kernel}:{kernel}",
        signature=types,
        constexprs=constexprs,
        capability=capability,
        divisible=tuple(argument for argument, kind in types.items() if kind.startswith("*")),
        warps=tiles.warps,
        stages=tiles.stages,
        instruction=matrix_instruction(
            capability, tiles.block_n if transposed else tiles.block_m, tiles.warps
        ),
    )


def still_cases(chips, names) -> list[Case]:
    """conv_predict while nothing below has moved: without d, and so without a product."""
    return [
        replace(
            case,
            name=f"{case.name}, no product",
            signature={argument: kind for argument, kind in case.signature.items() if argument != "d"},
            constexprs={**case.constexprs, "d": None},
            divisible=tuple(argument for argument in case.divisible if argument != "d"),
            instruction=None,
        )
        for case in conv_cases(chips, names)
        if case.name.startswith("conv_predict")
    ]


def before_max_pools(capability: int) -> list[tuple[Case, int]]:
    """(kernel with an activation in front of a max pool, elements of windows a thread), for every activation."""
    result = []
    (pooled,) = (c for c in pointwise_cases((capability,)) if c.name == "pointwise_error, max 2x2")
    elements = 4 * pooled.constexprs["BLOCK_M"] * pooled.constexprs["BLOCK_N"]
    for activation in _ALL_ACTIVATIONS:
        before, negative_slope = activation_code(activation)
        constants = dict(BEFORE=before, BEFORE_NEGATIVE_SLOPE=negative_slope)
        case = replace(pooled, constexprs={**pooled.constexprs, **constants})
        result.append((case, elements // (32 * case.warps)))
        tiles = conv_predict.predict_tiles(SMALL_MAX_POOLED, "bf16", activation, None)
        case = _conv_predict("small", SMALL_MAX_POOLED, "bf16", capability, activation, None)
        result.append((case, tiles.block_m * tiles.block_n // (32 * case.warps)))
    return result


_PLACE = ("batch", "row", "column")


def pointwise_cases(chips) -> list[Case]:
    cases = []
    views = ("product", "uhat", "deviation", "error", "delta")
    for capability, (name, pool, window) in itertools.product(
        chips, (("plain", "average", (1, 1)), ("max 2x2", "max", (2, 2)))
    ):
        block = pointwise_error.tile(10**6, 256, window[0] * window[1])
        strides = {f"{view}_{axis}": "i32" for view in views for axis in _PLACE}
        kinds = {"product": "*bf16", "delta": "*bf16"}
        sizes = dict.fromkeys(("positions", "pooled_rows", "pooled_columns", "channels"), "i32")
        act, negative_slope = activation_code(activations.Relu())
        pools = {"max": pointwise_error.MAX_POOL, "average": pointwise_error.AVG_POOL}
        cases.append(
            Case(
                name=f"pointwise_error, {name}",
                kernel="pcfast.kernels.pointwise_error:pointwise_error_kernel",
                signature={**{view: kinds.get(view, "*fp32") for view in views}, **strides, **sizes},
                constexprs=dict(
                    ERROR_GIVEN=False, BEFORE=0, BEFORE_NEGATIVE_SLOPE=0.0, POOL=pools[pool].value,
                    WINDOW_ROWS=window[0], WINDOW_COLUMNS=window[1], AFTER=act, AFTER_NEGATIVE_SLOPE=negative_slope,
                    BLOCK_M=block[0], BLOCK_N=block[1],
                ),
                capability=capability,
                divisible=(*views, *strides, "channels"),
            )
        )  # fmt: skip
    for capability in chips:
        block = pointwise_error.tile(10**6, 256)
        views = ("deviation", "error", "pulled", "operand")
        strides = {f"{view}_{axis}": "i32" for view in views for axis in _PLACE}
        kinds = {"pulled": "*bf16", "operand": "*bf16"}
        sizes = dict.fromkeys(("positions", "rows", "columns", "channels", "layer", "iteration"), "i32")
        cases.append(
            Case(
                name="pointwise_update",
                kernel="pcfast.kernels.pointwise_update:pointwise_update_kernel",
                signature={
                    **{view: kinds.get(view, "*fp32") for view in views}, **strides, "first_bad": "*i32", **sizes,
                    "step_size": "fp32",
                },
                constexprs=dict(
                    CLAMPED=False, BLOCK_M=block[0], BLOCK_N=block[1], velocity=None, momentum=None
                ),
                capability=capability,
                divisible=(*views, *strides, "channels"),
            )
        )  # fmt: skip
    for capability in chips:
        arrays = {"s": "*fp32", "total": "*fp32", "delta": "*bf16", "pulled": "*bf16"}
        sizes = dict.fromkeys(("elements", "layer", "iteration"), "i32")
        cases.append(
            Case(
                name="pointwise_gram",
                kernel="pcfast.kernels.pointwise_gram:pointwise_gram_kernel",
                signature={**arrays, "first_bad": "*i32", **sizes, "step_size": "fp32"},
                constexprs=dict(
                    BLOCK=pointwise_gram.BLOCK, velocity=None, total_velocity=None, momentum=None
                ),
                capability=capability,
                divisible=(*arrays, "elements"),
            )
        )
    return cases


def output_cases(chips) -> list[Case]:
    cases = []
    matrices = ("product", "uhat", "vhat", "target", "error", "delta", "target_sum")
    types = {
        argument: kind
        for matrix in matrices
        for argument, kind in ((matrix, "*fp32"), (f"{matrix}_row", "i32"))
    }
    for capability in chips:
        block_m, block_n, warps = output_tile(256, 1000)
        act = dict(ACT=0, NEGATIVE_SLOPE=0.0)
        cases.append(
            Case(
                name="output_error",
                kernel="pcfast.kernels.output_error:output_error_kernel",
                signature={**types, "scale": "fp32", "rows": "i32", "columns": "i32"},
                constexprs=dict(
                    LOSS=CROSS_ENTROPY.value,
                    **act,
                    INPUT_PRECISION="tf32",
                    BLOCK_M=block_m,
                    BLOCK_N=block_n,
                ),
                capability=capability,
                divisible=matrices,
                warps=warps,
            )
        )
        _, block_n, warps = output_tile(256, 4096)
        cases.append(
            Case(
                name="wide_cross_entropy",
                kernel="pcfast.kernels.output_error:wide_cross_entropy_kernel",
                signature={**types, "columns": "i32"},
                constexprs=dict(**act, INPUT_PRECISION="tf32", BLOCK_N=block_n),
                capability=capability,
                divisible=matrices,
                warps=warps,
            )
        )
    return cases


#: What moves beliefs otherwise than plainly, and the arguments that are None without it.
_MOVING = {
    "momentum": {"momentum": "fp32", "velocity": "*fp32", "total_velocity": "*fp32"},
    "schedule": {"schedule": "*fp32"},
}
_BOTH = (("momentum", "schedule"),)
_EACH = (("momentum",), ("schedule",), *_BOTH)


def moving_cases(cases, ways=_BOTH) -> list[Case]:
    """Kernels of the feedback stage among ``cases`` where beliefs move in some ``ways``, as far as kernels tell them.

    Only mlp_relaxation knows a schedule: launches of one iteration have a step size.
    """
    result = {}
    for case, way in itertools.product(cases, ways):
        known = [word for word in way if not _MOVING[word].keys().isdisjoint(case.constexprs)]
        types = {a: kind for word in known for a, kind in _MOVING[word].items() if a in case.constexprs}
        if not types:
            continue
        signature, constexprs = {**case.signature, **types}, {**case.constexprs}
        for argument in types:
            del constexprs[argument]
        if "schedule" in types:
            constexprs["eta"] = None
            del signature["eta"]
        moving = replace(
            case,
            name=f"{case.name}, {' and '.join(known)}",
            signature=signature,
            constexprs=constexprs,
            divisible=(*case.divisible, *(argument for argument, kind in types.items() if kind == "*fp32")),
        )
        result[moving.name, moving.capability] = moving
    return list(result.values())


_TANH, _RELU, _GELU = activations.Tanh(), activations.Relu(), activations.Gelu()

CASES = [
    *linear_cases(CHIPS, ("small",), (_TANH,)),
    *linear_cases((90,), ("wide", "middle"), (_RELU,)),
    *conv_cases((90,), ("vgg", "mnist")),
    *conv_cases((80, 100), ("vgg",)),
    *still_cases((90,), ("vgg",)),
    *pointwise_cases(CHIPS),
    *output_cases(CHIPS),
    # elsewhere than on one chip in the precision that takes most registers
    *moving_cases(
        case
        for case in linear_cases(CHIPS, ("small",), (_TANH,))
        if case.capability == 90 or "x3" in case.name
    ),
    *moving_cases(
        [*linear_cases((90,), ("wide",), ()), *conv_cases((90,), ("vgg",)), *pointwise_cases((90,))]
    ),
]

#: Of each chip; on sm_90 the one that takes most registers.
_QUICK_PRECISIONS = {80: "tf32x3", 90: "bf16", 100: "tf32"}


def _is_quick(case: Case) -> bool:
    precision = next((word for word in case.name.split(", ") if word in PRECISIONS), None)
    if precision is None:
        return case.capability == 90
    return precision == _QUICK_PRECISIONS[case.capability] and "middle" not in case.name


#: Each kernel on sm_90, those with products on every chip.
QUICK = [case for case in CASES if _is_quick(case)]

_ALL_ACTIVATIONS = (
    _RELU, activations.LeakyRelu(), _TANH, activations.Sigmoid(), activations.Silu(), _GELU, activations.GeluTanh(),
    None,
)  # fmt: skip
FULL = [
    *linear_cases(ALL_CHIPS, SIZES, _ALL_ACTIVATIONS),
    *candidate_cases(CHIPS),
    *conv_cases(ALL_CHIPS, CONVOLUTIONS),
    *still_cases(ALL_CHIPS, CONVOLUTIONS),
    *pointwise_cases(ALL_CHIPS),
    *output_cases(ALL_CHIPS),
    *moving_cases(linear_cases(ALL_CHIPS, SIZES, (_GELU,)), _EACH),
    *moving_cases(
        [*candidate_cases(CHIPS), *conv_cases(ALL_CHIPS, CONVOLUTIONS), *pointwise_cases(ALL_CHIPS)]
    ),
]
