"""``pcfast diagnose``: how one relaxation goes."""

from .._moved import names_of
from .diagnosis import Diagnosis, convergence, diagnose, rising

__all__ = ["Diagnosis", "convergence", "diagnose", "rising"]

__getattr__ = names_of(__name__, "diagnosis")
