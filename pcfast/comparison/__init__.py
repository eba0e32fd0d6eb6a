"""``pcfast compare``: predictive coding against backpropagation."""

from .._moved import names_of
from .compare import TrainingComparison, compare_errors, compare_iterations, compare_training

__all__ = ["TrainingComparison", "compare_errors", "compare_iterations", "compare_training"]

__getattr__ = names_of(__name__, "compare")
