"""From a call to a relaxation that ran: plan, choice of a backend, CUDA-graph capture and replay."""

from .._moved import names_of
from .result import Relaxation, relax
from .solve import Run, last_run

__all__ = ["Relaxation", "Run", "last_run", "relax"]

__getattr__ = names_of(__name__, "solve", "result")
