"""Independent work of one stage: side by side in a CUDA graph, one after another elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...support.streams import kept_beside


class Branches:
    """Runs pieces that do not depend on each other.

    While a CUDA graph is captured each piece but the first gets a stream of its own, so that the graph's nodes run
    side by side; otherwise that would only cost launches.
    """

    def __init__(self, device: torch.device) -> None:
        self._capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._device = device

    def run(self, pieces: Sequence[Callable[[], None]]) -> None:
        if not self._capturing:
            for piece in pieces:
                piece()
            return
        main = torch.cuda.current_stream(self._device)
        used = kept_beside(main, max(len(pieces) - 1, 0))
        for stream, piece in zip(used, pieces[1:], strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                piece()
        for piece in pieces[:1]:
            piece()
        for stream in used:
            main.wait_stream(stream)
