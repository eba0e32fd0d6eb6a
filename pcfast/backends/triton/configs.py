"""What tuning chose: launches' tiles, how the loop runs, how convolutions run. Plain values, no GPU needed.

A key holds whatever a choice may depend on. Where a choice could change the order of sums, and with it a row's bits,
its key leaves the batch out: the same network then gets the same choice at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from .tiles import LinearTiles

FUSED, STAGED = "fused", "staged"  # one launch for all iterations, or two stages an iteration
COMPOSED, IMPLICIT = "composed", "implicit"
#: Why a launch has the tiles that it has, where tuning chose them.
REASON = "tuned on this GPU"


@dataclass(frozen=True)
class LaunchKey:
    """One launch of a linear kernel.

    Attributes:
        kernel: "linear_predict", "linear_feedback" or "mlp_relaxation".
        precision: of products: "bf16", "tf32" or "tf32x3".
        loss: the output layer's loss is evaluated in its tile.
        batch: samples; None for mlp_relaxation, whose BLOCK_M decides on the matrix instruction.
        sizes: (N, K) of each product.
    """

    kernel: str
    precision: str
    loss: bool
    batch: int | None
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        samples = "" if self.batch is None else f"{self.batch} samples, "
        return f"tiles of {self.kernel}, {samples}{_sizes(self.sizes)}, {self.precision}"


@dataclass(frozen=True)
class LoopKey:
    """The loop of a network of linear layers.

    Attributes:
        precision: of products. sizes: (out, in) of each layer of the loop, highest first.
        gram: layer 1's beliefs are out of the loop.
    """

    precision: str
    sizes: tuple[tuple[int, int], ...]
    gram: bool

    def __str__(self) -> str:
        return f"the loop, {_sizes(self.sizes)}, {self.precision}"


@dataclass(frozen=True)
class ConvolutionKey:
    """One convolution and its tail.

    Attributes:
        precision: of products. geometry: a :class:`pcfast.kernels.conv_geometry.ConvGeometry` as a plain tuple.
    """

    precision: str
    geometry: tuple

    def __str__(self) -> str:
        height, width, channels, out_channels, kernel = self.geometry[:5]
        return (
            f"convolution {kernel[0]} x {kernel[1]}, {channels} to {out_channels} channels of {height} x {width}, "
            f"{self.precision}"
        )


Key = LaunchKey | LoopKey | ConvolutionKey
Value = LinearTiles | str
_KINDS = {"launch": LaunchKey, "loop": LoopKey, "convolution": ConvolutionKey}
_WORDS = {LoopKey: (FUSED, STAGED), ConvolutionKey: (COMPOSED, IMPLICIT)}


def _sizes(sizes: tuple[tuple[int, int], ...]) -> str:
    """Equal ones once: "3 of 600 x 600"."""
    counts = {size: sizes.count(size) for size in sizes}
    return ", ".join(
        f"{count} of {n} x {k}" if count > 1 else f"{n} x {k}" for (n, k), count in counts.items()
    )


class Choices:
    """Key -> choice; what is not in it, the design decides by rule. Never changes, equal and hashed by value."""

    def __init__(self, entries: Mapping[Key, Value] | None = None) -> None:
        self._entries = dict(entries or {})
        self._hash = hash(frozenset(self._entries.items()))  # once: every relaxation looks its design up

    def get(self, key: Key, default: Value | None = None) -> Value | None:
        return self._entries.get(key, default)

    def with_entries(self, entries: Mapping[Key, Value]) -> Choices:
        """A copy in which ``entries`` replace or join the old ones."""
        return Choices({**self._entries, **entries})

    def items(self):
        return self._entries.items()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choices) and self._entries == other._entries

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Choices({self._entries!r})"


NONE = Choices()


def tuned(tiles: LinearTiles) -> LinearTiles:
    """``tiles`` with the reason of a tuned choice."""
    return replace(tiles, reason=REASON)


def to_json(choices: Choices) -> list[dict]:
    """As lists and dicts for a JSON file; :func:`from_json` reads them."""
    names = {kind: name for name, kind in _KINDS.items()}
    return [
        {
            "kind": names[type(key)],
            "key": asdict(key),
            "choice": asdict(value) if isinstance(value, LinearTiles) else value,
        }
        for key, value in choices.items()
    ]


def from_json(entries: list) -> Choices:
    """What :func:`to_json` made.

    Raises:
        ValueError: anything else.
    """
    choices: dict[Key, Value] = {}
    try:
        for entry in entries:
            kind = _KINDS[entry["kind"]]
            key = kind(**{name: _frozen(value) for name, value in entry["key"].items()})
            choice = entry["choice"]
            if kind is LaunchKey:
                choices[key] = LinearTiles(**choice)
                _check_tiles(choices[key])
            elif choice in _WORDS[kind]:
                choices[key] = choice
            else:
                raise ValueError(f"{choice!r} is none of {_WORDS[kind]}")
        return Choices(choices)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an entry that is no choice ({type(error).__name__}: {error})") from error


def _check_tiles(tiles: LinearTiles) -> None:
    """Raise ValueError for what no kernel could be compiled with."""
    sizes = (tiles.block_m, tiles.block_n, tiles.block_k, tiles.warps)
    usable = all(isinstance(size, int) and size > 0 and size & (size - 1) == 0 for size in sizes)
    if not usable or not isinstance(tiles.stages, int) or tiles.stages < 1:
        raise ValueError(f"tiles that are none: {tiles!r}")


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
