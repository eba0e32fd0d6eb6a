"""``pcfast info``: versions, devices, and which backends run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable

import click
import torch

from .._version import __version__
from ..backends import BACKENDS, kernel_backend, timings
from ..backends.cuda import native
from ..backends.qualification import record
from ..model.describe import describe
from ..networks import mlp
from ..precision import choose_precision
from ..problem.plan import plan
from ..relaxation import contest, cuda_graphs
from ..support import cpu_module
from ..support.machine import cpu_name
from .options import json_option
from .output import console, print_json, table
from .qualify import as_dict, kinds_table

# What commands need beside torch and numpy, and for what.
_OPTIONAL = {"scikit-learn": "data sets", "matplotlib": "figures"}


@click.command()
@json_option
def info(as_json: bool) -> int:
    """Show versions, devices, which backends run here and why the others do not, and what "auto" knows of them."""
    devices = _devices()
    qualifications = _qualifications(devices)
    result = {
        "versions": _versions(),
        "devices": devices,
        "backends": _backends(devices),
        "cpu_kernels": _cpu_kernels(),
        "native": _native(),
        "graphs": _graphs(),
        "qualifications": [
            {"device": name, "ok": False, "path": None}
            if found is None
            else as_dict(torch.device(name), found)
            for name, found in qualifications.items()
        ],
        "timings": _timings(qualifications),
    }
    if as_json:
        print_json(result)
        return 0
    out = console()
    versions = table("Versions", "", "")
    for name, version in result["versions"].items():
        versions.add_row(
            name, version or f'missing: needed for {_OPTIONAL[name]}; pip install "pcfast[train]"'
        )
    out.print(versions)
    shown = table("Devices", "", "", "")
    for device in devices:
        shown.add_row(device["device"], device["name"] or "none", device["detail"])
    out.print(shown)
    backends = table("Backends", "backend", "device", "runs", "why not")
    for row in result["backends"]:
        backends.add_row(row["backend"], row["device"], "yes" if row["runs"] else "no", row["reason"])
    out.print(backends)
    kernels = table("CPU kernels", "", "")
    compiled = result["cpu_kernels"]
    if compiled["compiled"]:
        kernels.add_row("compiled for", ", ".join(compiled["instruction_sets"]))
        kernels.add_row("used", compiled["used"])
        kernels.add_row("threads", compiled["openmp"])
    else:
        kernels.add_row("why none", compiled["reason"])
    out.print(kernels)
    kernels = table("CUDA kernels", "", "")
    compiled = result["native"]
    if compiled["compiled"]:
        kernels.add_row("compiled for", ", ".join(compiled["architectures"]) or "the CPU")
        kernels.add_row("CUDA", compiled["runtime"] or "none")
        kernels.add_row("CUDA of the driver", compiled["driver"] or "none")
    if compiled["reason"]:
        kernels.add_row("why no GPU runs them", compiled["reason"])
    out.print(kernels)
    out.print(f"CUDA graphs: {result['graphs']}")
    for name, found in qualifications.items():
        if found is None:
            out.print(
                f"no kernel is qualified on {name} yet: pcfast qualify, or the first call with backend auto"
            )
        else:
            out.print(kinds_table(name, found))
    if result["timings"]:
        timed = table("Timed by auto", "device", "what", "runs", "median times")
        for row in result["timings"]:
            timed.add_row(row["device"], row["what"], row["backend"] or "eager", row["words"])
        out.print(timed)
    return 0


def _versions() -> dict[str, str | None]:
    versions = {
        "pcfast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA of torch": torch.version.cuda or "none, a CPU build",
        "numpy": importlib.metadata.version("numpy"),
    }
    for name in _OPTIONAL:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[dict]:
    """The CPU and every GPU; a row without a name says why there is none."""
    rows = [_device("cpu", cpu_name(), f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = (
            f"compute capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} SMs"
        )
        rows.append(_device(f"cuda:{index}", properties.name, detail))
    if len(rows) == 1:
        built = torch.version.cuda is not None
        why = (
            "torch finds no GPU or no driver"
            if built
            else "this torch is built without CUDA: see pytorch.org"
        )
        rows.append(_device("cuda", None, why))
    return rows


def _device(device: str, name: str | None, detail: str) -> dict:
    return {"device": device, "name": name, "detail": detail}


def _backends(devices: list[dict]) -> list[dict]:
    """Whether each backend runs a plain float32 MLP on each device that is here, and why not."""
    network = describe(mlp([2, 2, 2]))
    rows = []
    for name, backend in BACKENDS.items():
        for device in devices:
            if device["name"] is None:
                continue
            where = torch.device(device["device"])
            precision = choose_precision(where.type, torch.float32)
            runs, reason = backend.supports(plan(network, where, torch.float32, (1, 2), precision))
            rows.append({"backend": name, "device": device["device"], "runs": runs, "reason": reason})
    return rows


def _qualifications(devices: list[dict]) -> dict[str, record.Qualification | None]:
    """By device, of those on which "auto" considers kernels."""
    present = [device["device"] for device in devices if device["name"] is not None]
    considered = [name for name in present if torch.device(name).type in kernel_backend.AUTOMATIC_DEVICES]
    return {name: record.load(torch.device(name)) for name in considered}


def _timings(devices: Iterable[str]) -> list[dict]:
    """What "auto" measured on each device, and which backend it runs since."""
    return [
        {
            "device": name, "what": timed.what, "when": timed.when, "seconds": dict(timed.seconds),
            "out": dict(timed.out), "backend": timed.fastest(timed.seconds), "words": contest.words(timed),
        }
        for name in devices for timed in timings.of_device(torch.device(name)).values()
    ]  # fmt: skip


def _cpu_kernels() -> dict:
    """The CPU kernels: the instruction sets among which this CPU chooses, and whose threads run them."""
    missing = cpu_module.load_error()
    if missing:
        return {"compiled": False, "instruction_sets": [], "used": None, "openmp": None, "reason": missing}
    module = cpu_module.load()
    runtime = cpu_module.openmp_runtime() or "a runtime that nobody had loaded before"
    return {
        "compiled": True,
        "instruction_sets": module.instruction_sets(),
        "used": module.used(),
        "openmp": runtime if module.uses_the_openmp_of_torch() else "an OpenMP runtime of their own",
        "reason": "",
    }


def _native() -> dict:
    """The native module: whether it is here, what for, and why none of its kernels can run; "" where they can."""
    missing = native.load_error()
    if missing:
        return {"compiled": False, "architectures": [], "driver": None, "runtime": None, "reason": missing}
    probe = native.probe()
    return {
        "compiled": True,
        "architectures": list(probe.architectures),
        "driver": probe.driver_version,
        "runtime": probe.runtime_version,
        "reason": probe.reason,
    }


def _graphs() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device to replay them on"
    return "on" if cuda_graphs.switched_on() else "switched off"
