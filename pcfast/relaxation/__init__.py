"""From a call to a relaxation that ran: plan, choice of a backend, CUDA-graph capture and replay."""

from .solve import Prepared, Relaxation, Run, last_run, relax

__all__ = ["Prepared", "Relaxation", "Run", "last_run", "relax"]
