"""Triton kernels on the CPU: triton's interpreter, its arithmetic repaired and its memory accesses checked.

    TRITON_INTERPRET=1 in the environment, before triton is imported
    interpreter.repair()        # once a process; then kernel[grid](...) runs on CPU tensors

Written against triton 3.6's private names. What still differs from a GPU: order and width of a tensor core's
accumulation, contraction of multiply and add, approximate exp and division, rounding to fp8, inline assembly.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl
from sanitizer import Launch, MissingOther, OutOfBounds, Race, SanitizerError, clear_extents, extents
from triton.backends.nvidia.compiler import min_dot_size
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter as interpreted
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import mangle_type

__all__ = [
    "DeviceAssertion",
    "MissingOther",
    "OutOfBounds",
    "Race",
    "SanitizerError",
    "WrongHint",
    "clear_extents",
    "extents",
    "repair",
]


class DeviceAssertion(AssertionError):
    """A `tl.device_assert` failed, or an integer operation overflowed."""


class WrongHint(SanitizerError):
    """A `tl.multiple_of` or `tl.max_contiguous` that does not hold."""


def repair() -> None:
    """Repair the interpreter and check every memory access from now on; another call changes nothing."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 in the environment before triton is imported")
    if not isinstance(tl.standard.sum, interpreted.InterpretedFunction):
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set in the environment")
    _patch_triton()


@functools.cache
def _patch_triton() -> None:
    builder = interpreted.interpreter_builder
    builder.__class__ = interpreted.InterpreterBuilder = _Builder
    # Without it tl.device_assert does nothing.
    builder.options = dataclasses.replace(builder.options, debug=True)
    builder.codegen_fns["min_dot_size"] = min_dot_size(None)  # a GPU's, the same for all; triton's here is 1
    # triton's spends eight of its operations on every addition of integers.
    interpreted.TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    interpreted.GridExecutor = _GridExecutor
    interpreted.ReduceOps = _ReduceOps

    # Once for all: triton does it at every launch and at every call of a device function (tl.sum is one), which
    # costs more than the arithmetic of most kernels.
    interpreted._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreted._patch_lang = lambda fn: None
    interpreted._get_np_dtype = _np_dtype
    _remember_shapes()

    # triton's own takes int() of an array of one element, which numpy deprecates and from 2.4 on refuses.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())

    # constexpr's own wraps a tensor into another constexpr; the tensor has the reflected operation.
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne"):
        method = getattr(tl.constexpr, f"__{name}__")
        setattr(tl.constexpr, f"__{name}__", _leaving_tensors(method))

    for module in (tl, tl.core):
        module.multiple_of, module.max_contiguous = _multiple_of, _max_contiguous

    # What `libdevice` holds outside a compilation are stubs that return None.
    for name, function in inspect.getmembers(cuda_libdevice, tl.core.is_builtin):
        call = functools.partial(function, _semantic=interpreted.interpreter_semantic)
        setattr(libdevice, name, call)
        setattr(cuda_libdevice, name, call)


_triton_np_dtype = interpreted._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}


def _np_dtype(type_: tl.dtype) -> np.dtype:
    """triton's answer, which it finds in a table that it builds at every call."""
    scalar = type_.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _triton_np_dtype(scalar)
    return _np_dtypes[scalar.name]


def _remember_shapes() -> None:
    """Types of blocks and shapes of tensors are made once each, and equal shapes are not broadcast.

    triton checks and wraps them at every operation, which takes most of its time.
    """
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[tuple, dict] = {}
    tensors: dict[str, dict] = {}

    def init_block(self, element_ty, shape):
        if isinstance(shape, tl.constexpr):
            shape = shape.value
        key = (element_ty.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape))
        if key in blocks:
            self.__dict__.update(blocks[key], element_ty=element_ty)
        else:
            make_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)

    def init_tensor(self, handle, type):
        known = tensors.get(type.name)
        if known is None:
            make_tensor(self, handle, type)
            tensors[type.name] = {name: self.__dict__[name] for name in ("shape", "numel")}
        else:
            self.__dict__.update(known, handle=handle, type=type, dtype=type.scalar)

    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor

    semantic = interpreted.TritonSemantic
    broadcast = semantic.broadcast_impl_value

    def of_one_shape(self, lhs, rhs):
        left, right = (operand.type.is_block() and operand.type.shape.values for operand in (lhs, rhs))
        return (lhs, rhs) if left == right else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = of_one_shape


def _check_overflow(semantic, lhs, rhs, operation) -> None:
    """Whether the sum, difference or product of two integer tensors fits their type."""
    scalar = lhs.type.scalar
    if scalar.int_bitwidth >= 64:
        return
    exact = _EXACT[operation.__name__](*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
    fits = exact.min() >= scalar.get_int_min_value() and exact.max() <= scalar.get_int_max_value()
    semantic.builder.create_assert(fits, f"int{scalar.int_bitwidth} overflow in {operation.__name__}")


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _leaving_tensors(method):
    def operation(self, other):
        return NotImplemented if isinstance(other, tl.tensor) else method(self, other)

    return operation


# ---------------------------------------------------------------------------------------------------- number formats
# The interpreter holds bfloat16 as its bits, in uint16, and computes with these as if they were integers.


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _values(handle: TensorHandle) -> np.ndarray:
    """The numbers of a tensor: float32 for bfloat16, else as they are held."""
    if _is_bf16(handle):
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In float32. Every number is summed in the same order wherever it stands, as on a Tensor Core; BLAS does not."""
    return np.einsum("...ik,...kj->...ij", a, b)


def _truncate_to_tf32(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of float32 operands: it ignores the 13 lowest bits."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _round_to_tf32(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32: to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(x), x, rounded)


def _dot_tf32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As triton compiles it: no conversion, so the operands are truncated, not rounded."""
    return _matmul(_truncate_to_tf32(a), _truncate_to_tf32(b))


def _dot_tf32x3(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Three tf32 products, the small ones first, as triton's pass F32DotTC puts them."""
    a_high, b_high = _round_to_tf32(a), _round_to_tf32(b)
    small = _dot_tf32(a - a_high, b_high) + _dot_tf32(a_high, b - b_high)
    # An infinite operand leaves inf - inf in the low parts; the high parts alone give the right infinity.
    return np.where(np.isnan(small), np.float32(0), small) + _matmul(a_high, b_high)


_PRECISIONS = interpreted._ir.INPUT_PRECISION
_DOTS = {_PRECISIONS.TF32: _dot_tf32, _PRECISIONS.TF32x3: _dot_tf32x3, _PRECISIONS.IEEE: _matmul}


def _in_double(function):
    """An elementwise torch function, computed in float64 and rounded to the argument's type."""
    return lambda x: function(torch.tensor(x, dtype=torch.float64)).numpy().astype(x.dtype)


_LIBDEVICE = {
    "erf": _in_double(torch.special.erf),
    "erfc": _in_double(torch.special.erfc),
    "exp": np.exp,
    "expm1": np.expm1,
    "fsub_rn": np.subtract,
    "log1p": np.log1p,
    "tanh": np.tanh,
}


# --------------------------------------------------------------------------------------------------------- operations


class _Builder(interpreted.InterpreterBuilder):
    """triton's interpreter of single operations, with its errors repaired."""

    launch: Launch  # set by _GridExecutor

    def get_bf16(self, value):
        return TensorHandle(_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if not (to_bf16 or _is_bf16(src)):
            return super().cast_impl(src, dst_type)
        values = _values(src).astype(np.float32)
        data = _to_bf16(values) if to_bf16 else values.astype(interpreted._get_np_dtype(dst_type))
        return TensorHandle(data, dst_type.scalar)

    def binary_op(self, lhs, rhs, op):
        if not _is_bf16(lhs):
            result = super().binary_op(lhs, rhs, op)
        else:
            data = op(_values(lhs), _values(rhs))
            result = TensorHandle(data if data.dtype == np.bool_ else _to_bf16(data), tl.bfloat16)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1  # triton's keeps the operands' type, which a later cast would go by
        return result

    # maxnum and minnum drop NaN; triton's interpreter keeps it here and in clamp.
    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        if propagate_nans == tl.PropagateNan.ALL:
            return self.create_minimumf(self.create_maximumf(arg, lo), hi)
        return self.create_minnumf(self.create_maxnumf(arg, lo), hi)

    def create_fma(self, x, y, z):
        """One rounding: a product of float32 is exact in float64."""
        wide = _values(x).astype(np.float64) * _values(y) + _values(z)
        if _is_bf16(z):
            return TensorHandle(_to_bf16(wide.astype(np.float32)), tl.bfloat16)
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def create_extern_elementwise(self, library, path, symbol, args, result_type, is_pure):
        name = symbol.removeprefix("__nv_")
        function = _LIBDEVICE.get(name) or _LIBDEVICE.get(name.removesuffix("f"))
        if function is None:
            raise NotImplementedError(f"{symbol}: add it to tests/kernels/interpreter.py's _LIBDEVICE")
        return TensorHandle(function(*(arg.data for arg in args)), result_type.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_bf16(a):
            product = _matmul(_values(a), _values(b))  # exact products, accumulated in float32
        elif a.dtype.scalar == tl.float32:
            product = _DOTS[input_precision](a.data, b.data)
        else:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def create_assert(self, condition, message):
        if not condition:
            raise DeviceAssertion(f"{self.launch.where()}: {message}")

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        # A tensor descriptor passes its mask as a bare array.
        lanes = np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)
        itemsize = interpreted._get_np_dtype(ptrs.get_element_ty()).itemsize
        real = TensorHandle(self.launch.load(ptrs.data, lanes, itemsize, other is not None), ptrs.dtype)
        lanes = TensorHandle(lanes, tl.int1)
        return super().create_masked_load(real, lanes, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        lanes = np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)
        real = TensorHandle(self.launch.store(ptrs.data, lanes, value.data), ptrs.dtype)
        return super().create_masked_store(
            real, value, TensorHandle(lanes, tl.int1), cache_modifier, eviction_policy
        )

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        lanes = np.broadcast_to(mask.data, ptr.data.shape)
        real = TensorHandle(self.launch.atomic(ptr.data, lanes, val.data.itemsize), ptr.dtype)
        return super().create_atomic_rmw(op, real, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        lanes = np.ones(ptr.data.shape, bool)
        real = TensorHandle(self.launch.atomic(ptr.data, lanes, val.data.itemsize), ptr.dtype)
        return super().create_atomic_cas(real, cmp, val, sem, scope)


# -------------------------------------------------------------------------------------------------------------- hints
# The compiler believes them: a wrong one becomes a vector access to a misaligned address.


def _sizes(values) -> list[int]:
    values = tl.core._unwrap_if_constexpr(values)
    values = values if isinstance(values, list | tuple) else [values]
    return [tl.core._unwrap_if_constexpr(value) for value in values]


def _check_hint(holds: bool, claim: str) -> None:
    if not holds:
        raise WrongHint(f"{interpreted.interpreter_builder.launch.where()}: {claim}")


def _multiple_of(input, values):
    """Of a tensor only the first element of every contiguous run is a multiple; `max_contiguous` names the runs."""
    if isinstance(input, tl.tensor):
        factors = _sizes(values)
        first = input.handle.data.reshape(-1)[0]
        for factor in factors:
            _check_hint(first % factor == 0, f"multiple_of {factor}: {first}")
        input.handle.set_attr("tt.divisibility", factors)
    return input


def _max_contiguous(input, values):
    if isinstance(input, tl.tensor):
        factors = input.handle.attr.get("tt.divisibility", ())
        for axis, count in enumerate(_sizes(values)):
            runs = np.moveaxis(input.handle.data, axis, -1).astype(np.int64)
            runs = runs.reshape(-1, min(count, runs.shape[-1]))
            steps = runs - runs[:, :1]
            _check_hint(
                (steps == np.arange(runs.shape[1])).all(), f"max_contiguous {count} along axis {axis}"
            )
            for factor in factors[axis : axis + 1]:
                _check_hint(
                    (runs[:, 0] % factor == 0).all(), f"multiple_of {factor}, of every run of {count}"
                )
    return input


# --------------------------------------------------------------------------------------------------------- reductions


def _fold(arrays: tuple[np.ndarray, ...], axis: int, combine) -> tuple[np.ndarray, ...]:
    """Combine the halves of an axis until it has one element, as the threads of a GPU do."""
    while arrays[0].shape[axis] > 1:
        halves = [np.split(array, 2, axis) for array in arrays]
        arrays = combine(*(low for low, _ in halves), *(high for _, high in halves))
    return arrays


def _add_bf16(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray]:
    low, high = (TensorHandle(bits, tl.bfloat16) for bits in (low, high))
    return (_to_bf16(_values(low) + _values(high)),)


def _extreme(better):
    """The comparison of triton's argmax or argmin; what it makes of NaN depends on the order, there as here."""

    def combine(value1, index1, value2, index2):
        first = better(value1, value2) | ((value1 == value2) & (index1 < index2))
        return np.where(first, value1, value2), np.where(first, index1, index2)

    return combine


class _ReduceOps(interpreted.ReduceOps):
    """triton's reductions, with bfloat16 sums and with a GPU's treatment of NaN."""

    def apply_impl(self, input):
        standard = tl.standard
        # Not np.nanmax, which warns where all are NaN.
        simple = {standard._elementwise_max: np.fmax.reduce, standard._elementwise_min: np.fmin.reduce}
        by_index = {
            standard._argmax_combine_tie_break_left: np.greater,
            standard._argmin_combine_tie_break_left: np.less,
        }
        if self.combine_fn in simple:
            return self.min_max(input[0], val_reduce_op=simple[self.combine_fn])
        if self.combine_fn in by_index:
            return self._folded(input, _extreme(by_index[self.combine_fn]))
        if self.combine_fn == standard._sum_combine and input[0].dtype == tl.bfloat16:
            return self._folded(input, _add_bf16)
        return super().apply_impl(input)

    def _folded(self, input, combine):
        arrays = tuple(operand.handle.data for operand in input)
        rank, axis = arrays[0].ndim, self.axis
        if axis is None:
            arrays, axis = tuple(array.reshape(-1) for array in arrays), 0
        results = []
        for array, operand in zip(_fold(arrays, axis, combine), input, strict=True):
            if not self.keep_dims:
                array = array.squeeze(axis)
            elif self.axis is None:
                array = array.reshape((1,) * rank)
            results.append(self.to_tensor(array, operand.dtype))
        return results


# ----------------------------------------------------------------------------------------------------------- launches


class _GridExecutor(interpreted.GridExecutor):
    """Runs the programs of a launch one after the other, each access checked."""

    def __call__(self, *args, **kwargs):
        # num_warps and its like are no parameters of the kernel.
        known = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = inspect.getcallargs(self.fn, *args, **known)
        for hook in self.pre_run_hooks:
            hook(*args, **known)
        grid = self.grid(bound) if callable(self.grid) else self.grid
        grid = tuple(int(n) for n in (*grid, 1, 1))[: max(3, len(grid))]

        tensors = dict(itertools.chain.from_iterable(_tensors(name, bound[name]) for name in bound))
        launch = Launch(self.fn.__name__, grid, tensors)
        values = {
            name: value if name in self.constexprs else _as_triton(name, value, launch)
            for name, value in bound.items()
        }
        builder = interpreted.interpreter_builder
        builder.launch = launch
        builder.set_grid_dim(*grid)
        try:
            # A GPU raises nothing for an overflow or a NaN.
            with np.errstate(all="ignore"):
                for program in itertools.product(*map(range, grid)):
                    builder.set_grid_idx(*program)
                    launch.enter(program)
                    self.fn(**values)
        except interpreted.InterpreterError as error:
            # Raised once more by every device function on the way: show what happened, and where.
            cause: BaseException = error
            while isinstance(cause, interpreted.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


def _tensors(name: str, value):
    """(name, tensor) of every tensor in an argument."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}: the interpreter runs on CPU tensors")
        yield name, value
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(value, triton.tools.tensor_descriptor.TensorDescriptor):
        yield from _tensors(name, value.base)


def _as_triton(name: str, value, launch: Launch):
    """An argument as the kernel sees it."""
    if isinstance(value, torch.Tensor):
        pointer = np.array([launch.address(name)], np.uint64)
        type_ = tl.str_to_ty(mangle_type(value), None)
        return tl.tensor(TensorHandle(pointer, type_), type_)
    if isinstance(value, tuple):
        items = (_as_triton(f"{name}[{i}]", item, launch) for i, item in enumerate(value))
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, bool):
        return tl.tensor(TensorHandle(np.array([value]), tl.int1), tl.int1)
    if isinstance(value, float):
        # triton's interpreter leaves a Python float, which takes part in no type promotion; on a GPU it is a float32.
        return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return interpreted._implicit_cvt(value)
