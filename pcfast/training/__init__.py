"""``pcfast train``: training with a run folder that can be resumed."""

from .._moved import names_of
from .history import History
from .run import evaluate
from .trainer import train

__all__ = ["History", "evaluate", "train"]

__getattr__ = names_of(__name__, "trainer", "run")
