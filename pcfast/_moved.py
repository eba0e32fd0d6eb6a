"""Modules by the names that they had before docs/architecture.md: whoever imports one gets what it is now."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

MOVED = {
    "resident": "backends.cuda",
    "streamed": "backends.triton",
    "accuracy": "checking.bounds",
    "activations": "model.activations",
    "backends.error_based": "backends.eager.error_based",
    "backends.incremental": "backends.eager.incremental",
    "backends.kernels": "backends.kernel_backend",
    "backends.links": "backends.eager.links",
    "belief_optimizers": "problem.belief_optimizers",
    "checkpoints": "training.checkpoints",
    "comparison_plots": "comparison.plots",
    "console": "support.console",
    "constants": "backends.gpu_constants",
    "deviation.residual": "deviation.chain",
    "diagnostics_plots": "diagnostics.plots",
    "differentiation": "support.differentiation",
    "distances": "gradients",
    "early_exit": "problem.early_exit",
    "figures": "support.figures",
    "files": "support.files",
    "fixed_prediction": "backends.eager.fixed_prediction",
    "forms": "backends.kernel_forms",
    "graphs": "relaxation.cuda_graphs",
    "grouping": "model.grouping",
    "hashing": "support.hashing",
    "history": "training.history",
    "host": "support.host",
    "identification": "presets.identification",
    "interrupts": "support.startup",
    "learning_rates": "recipes.learning_rates",
    "log": "support.log",
    "machine": "support.machine",
    "modes": "support.modes",
    "native": "backends.cuda.native",
    "network": "model.spec",
    "nudging": "problem.nudging",
    "nvcc": "support.nvcc",
    "planning": "problem.plan",
    "plots": "training.curves",
    "progress": "training.progress",
    "ranges": "arguments",
    "reductions": "problem.reductions",
    "replay": "support.replay",
    "resident.floor": "backends.cuda.roofline",
    "resident.loop": "backends.cuda.launch",
    "resident.placement": "backends.cuda.shared_memory",
    "resident.program": "backends.cuda.kernel_params",
    "resident.words": "backends.cuda.describe",
    "residual": "model.residual",
    "scores": "training.scores",
    "sharding": "model.sharding",
    "status": "problem.status",
    "streamed.boundary": "backends.triton.tensor_layout",
    "streamed.branches": "backends.triton.streams",
    "streamed.candidates": "tuning.search_space",
    "streamed.choice_cache": "backends.triton.config_cache",
    "streamed.choices": "backends.triton.configs",
    "streamed.design": "backends.triton.launch_plan",
    "streamed.floor": "backends.triton.roofline",
    "streamed.layers": "backends.triton.conv_form",
    "streamed.layout": "backends.triton.arena",
    "streamed.loop": "backends.triton.loop",
    "streamed.tiles": "backends.triton.tiles",
    "streamed.tuning": "tuning.tuner",
    "streamed.words": "backends.triton.describe",
    "streams": "support.streams",
    "uploads": "support.uploads",
    "validation": "problem.validation",
}
_PREFIX = __package__ + "."


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name; what the machinery then holds under that name is the module of now."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.removeprefix(_PREFIX) in MOVED and fullname.startswith(_PREFIX):
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def exec_module(self, module: ModuleType) -> None:
        now = MOVED[module.__name__.removeprefix(_PREFIX)]
        sys.modules[module.__name__] = importlib.import_module(_PREFIX + now)


def install() -> None:
    """Let the old names be imported."""
    sys.meta_path.insert(0, _Finder())  # before what would load a file of an old package anew


def names_of(package: str, *modules: str) -> Callable[[str], object]:
    """``__getattr__`` of a package that took the place of a module: what was in that is in its parts ``modules``."""

    def attribute(name: str):
        if not name.startswith("__"):
            for module in modules:
                part = importlib.import_module(f"{package}.{module}")
                if hasattr(part, name):
                    return getattr(part, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return attribute
