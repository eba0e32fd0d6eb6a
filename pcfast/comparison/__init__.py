"""``pcfast compare``: predictive coding against backpropagation."""

from .compare import TrainingComparison, compare_errors, compare_iterations, compare_training

__all__ = ["TrainingComparison", "compare_errors", "compare_iterations", "compare_training"]
