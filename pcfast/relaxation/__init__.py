"""From a call to a relaxation that ran: plan, choice of a backend, CUDA-graph capture and replay."""

from .._moved import names_of
from .solve import Prepared, Relaxation, Run, last_run, relax

__all__ = ["Prepared", "Relaxation", "Run", "last_run", "relax"]

__getattr__ = names_of(__name__, "solve")
