"""pcfast: fast, exact predictive-coding training in PyTorch.

loss = pcfast.pc_loss(model, x, y, loss="cross_entropy", method="strict", step_size=0.1, num_steps=20)
loss.backward()            # .grad now holds the predictive-coding updates
optimizer.step()
"""

from . import _checkout, interrupts  # isort: skip (before anything that needs torch)

interrupts.begin()
_checkout.find_folders(__path__)

from . import presets
from ._version import __version__
from .autograd import PredictiveCoding, pc_loss
from .belief_optimizers import Adam, GradientDescent
from .deviation.differences import use_precise_deviations
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    ModelError,
    NonFiniteError,
    PcfastError,
    RelaxationDiverged,
    ShapeError,
)
from .explanation import Explanation, explain
from .graphs import use_cuda_graphs
from .grouping import group_layers
from .identification import Match, identify
from .incremental import incremental_step
from .nudging import Nudging
from .relaxation import Relaxation, Run, last_run, relax
from .residual import Residual
from .status import synchronize
from .streamed.tuning import TuningReport, tune
from .torch2pc import PCInfer

__all__ = [
    "Adam",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "Explanation",
    "GradientDescent",
    "Match",
    "ModelError",
    "NonFiniteError",
    "Nudging",
    "PCInfer",
    "PcfastError",
    "PredictiveCoding",
    "Relaxation",
    "RelaxationDiverged",
    "Residual",
    "Run",
    "ShapeError",
    "TuningReport",
    "__version__",
    "explain",
    "group_layers",
    "identify",
    "incremental_step",
    "last_run",
    "pc_loss",
    "presets",
    "relax",
    "synchronize",
    "tune",
    "use_cuda_graphs",
    "use_precise_deviations",
]
