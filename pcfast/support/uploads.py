"""Small tensors that are made on the host once and kept on the device: a CUDA graph cannot record an upload."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor


def uploaded(capacity: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: one tensor for equal arguments, as long as it is one of the last ``capacity`` or is held elsewhere.

    What a step has read can be held until the step is recorded in a graph, however many others come in between.
    """

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        held: weakref.WeakValueDictionary[Hashable, Tensor] = weakref.WeakValueDictionary()
        recent: OrderedDict[Hashable, Tensor] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(make)
        def find(*key: Hashable) -> Tensor:
            with lock:
                tensor = held.get(key)
                if tensor is None:
                    tensor = held[key] = make(*key)
                recent[key] = tensor
                recent.move_to_end(key)
                while len(recent) > capacity:
                    recent.popitem(last=False)
                return tensor

        return find

    return decorate
