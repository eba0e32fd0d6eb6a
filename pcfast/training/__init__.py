"""``pcfast train``: training with a run folder that can be resumed."""

from .history import History
from .run import evaluate
from .trainer import train

__all__ = ["History", "evaluate", "train"]
