"""``pcfast tune``: tiles and forms of the Triton kernels, chosen by measurement."""

from .tuner import TuningReport, tune

__all__ = ["TuningReport", "tune"]
