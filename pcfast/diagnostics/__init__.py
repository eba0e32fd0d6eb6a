"""``pcfast diagnose``: how one relaxation goes."""

from .diagnosis import Diagnosis, diagnose, relaxed_fraction, rising

__all__ = ["Diagnosis", "diagnose", "relaxed_fraction", "rising"]
