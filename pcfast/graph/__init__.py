"""Relaxation on graphs (docs/graphs.md): the literal loop, and PyTorch operations in deviation form."""

from .problem import GraphOutcome, GraphPlan, GraphProblem
from .run import BACKENDS, choose, run

__all__ = ["BACKENDS", "GraphOutcome", "GraphPlan", "GraphProblem", "choose", "run"]
