"""The one way in which kernels are launched."""

from __future__ import annotations

import triton

from . import async_proxy

_MIN_ASYNCHRONOUS = 90  # from this compute capability on Tensor Cores run asynchronously
_safe: set[str] = set()  # hashes of compiled kernels


class UnsafeKernel(RuntimeError):
    """What the compiler made of a kernel may compute something else, from one run to the next."""


def launch(kernel, grid: tuple[int, ...], *arguments, **keywords) -> None:
    """Launch on the current stream. The PTX of every compiled kernel is judged once.

    Raises:
        UnsafeKernel: it is not safe to run. It was launched by then, since triton compiles as it launches; what it
            wrote is worth nothing.
    """
    async_proxy.install()
    # named, since releases differ in what they take for granted: products and sums are fused
    compiled = kernel[grid](*arguments, **keywords, enable_fp_fusion=True)
    if compiled is not None and compiled.hash not in _safe:  # None where it is interpreted
        _check(compiled)
        _safe.add(compiled.hash)


def _check(compiled) -> None:
    if compiled.metadata.target.arch < _MIN_ASYNCHRONOUS:
        return
    with_ptx = "ptx" in compiled.asm
    hazards = async_proxy.hazards(compiled.asm["ptx"]) if with_ptx else ["its PTX was not kept"]
    if not hazards:
        return
    kept = "" if with_ptx else "Unset TRITON_STORE_BINARY_ONLY. "
    raise UnsafeKernel(
        f"{compiled.metadata.name}, compiled by triton {triton.__version__} for compute capability "
        f"{compiled.metadata.target.arch / 10}, is not safe: {'; '.join(hazards)}. Needed is a kernel whose PTX "
        f"shows none of this. {kept}Delete triton's cache (TRITON_CACHE_DIR, or ~/.triton/cache), which may hold "
        "what was compiled without pcfast, or install another release of triton (docs/kernels.md, Releases of "
        "triton)."
    )
