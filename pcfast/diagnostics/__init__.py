"""``pcfast diagnose``: how one relaxation goes."""

from .._moved import names_of
from .diagnosis import Diagnosis, diagnose, relaxed_fraction, rising

__all__ = ["Diagnosis", "diagnose", "relaxed_fraction", "rising"]

__getattr__ = names_of(__name__, "diagnosis")
