"""pcfast: fast, exact predictive-coding training in PyTorch.

loss = pcfast.pc_loss(model, x, y, loss="cross_entropy", method="strict", step_size=0.1, num_steps=20)
loss.backward()            # .grad now holds the predictive-coding updates
optimizer.step()
"""

from . import _checkout, _moved

from .support import startup  # isort: skip (before anything that needs torch)

startup.begin()
_checkout.find_folders(__path__)
_moved.install()

from ._version import __version__
from .autograd import PredictiveCoding, pc_loss
from .backends.qualification.record import Qualification
from .backends.qualification.run import qualify
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
from .incremental import incremental_step
from .model.graph import Graph, Prior, Root
from .model.grouping import group_layers
from .model.merging import Concatenate, Sum
from .model.residual import Residual
from .model.scaling import Scale
from .presets import settings as presets
from .presets.identification import Match, identify
from .problem.belief_optimizers import Adam, GradientDescent
from .problem.nudging import Nudging
from .problem.per_layer import PerLayer
from .problem.status import synchronize
from .relaxation.cuda_graphs import use_cuda_graphs
from .relaxation.result import GraphRelaxation, Relaxation, relax
from .relaxation.solve import Run, last_run
from .support.allocator import keep_memory
from .torch2pc import PCInfer
from .tuning.tuner import TuningReport, tune

__all__ = [
    "Adam",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "Concatenate",
    "Explanation",
    "GradientDescent",
    "Graph",
    "GraphRelaxation",
    "Match",
    "ModelError",
    "NonFiniteError",
    "Nudging",
    "PCInfer",
    "PcfastError",
    "PerLayer",
    "PredictiveCoding",
    "Prior",
    "Qualification",
    "Relaxation",
    "RelaxationDiverged",
    "Residual",
    "Root",
    "Run",
    "Scale",
    "ShapeError",
    "Sum",
    "TuningReport",
    "__version__",
    "explain",
    "group_layers",
    "identify",
    "incremental_step",
    "keep_memory",
    "last_run",
    "pc_loss",
    "presets",
    "qualify",
    "relax",
    "synchronize",
    "tune",
    "use_cuda_graphs",
    "use_precise_deviations",
]

startup.imported()
