"""Frozen dataclasses whose hash is computed once: keys of caches that are asked at every step."""

from __future__ import annotations

_KEPT = "_hash_of_all_fields"


def hashed_once(kind: type) -> type:
    """Class decorator, above ``dataclass(frozen=True)``: an object remembers its hash from the first use on."""
    compute = kind.__hash__

    def remembered(self) -> int:
        kept = self.__dict__.get(_KEPT)
        if kept is None:
            kept = self.__dict__[_KEPT] = compute(self)
        return kept

    def state(self) -> dict:
        """Without the hash, which another process computes otherwise."""
        return {name: value for name, value in self.__dict__.items() if name != _KEPT}

    kind.__hash__, kind.__getstate__ = remembered, state
    return kind
