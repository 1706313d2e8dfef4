"""Things kept open between reads: a bounded cache that threads share."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Handles(Generic[T]):
    """The things used last, each opened once; the one not used for longest is let go first.

    What is let go while a thread still uses it lives until that thread drops it, so it must close itself when
    it is collected. A process that was forked starts with none.

    Args:
      open_handle: makes the thing of a key.
      capacity: most that are kept, by the sum of their weights; one is kept whatever it weighs.
      weight: of a thing; 1 by default.
    """

    def __init__(
        self,
        open_handle: Callable[..., T],
        capacity: float,
        weight: Callable[[T], float] = lambda handle: 1,
    ):
        self._open, self._capacity, self._weigh = open_handle, capacity, weight
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._slots: OrderedDict[Hashable, _Slot[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._slots)

    def get(self, *key: Any) -> T:
        """Returns the thing of a key; raises what opening it raises, and tries that anew the next time.

        Threads that wait for it while it is opened share what that raises.
        """
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
        # Others that want the same thing wait for it; those that want another one do not.
        with slot.lock:
            if slot.error is not None:
                # They have waited as long for it, and would wait again, one after the other.
                raise slot.error
            if slot.handle is None:
                try:
                    slot.handle = self._open(*key)
                except BaseException as error:
                    slot.error = error if isinstance(error, Exception) else None
                    with self._lock:
                        if self._slots.get(key) is slot:
                            del self._slots[key]
                    raise
                slot.weight = self._weigh(slot.handle)
                self._shrink()
            return slot.handle

    def _shrink(self) -> None:
        with self._lock:
            total = sum(slot.weight for slot in self._slots.values())
            while total > self._capacity and len(self._slots) > 1:
                _, slot = self._slots.popitem(last=False)
                total -= slot.weight


class _Slot(Generic[T]):
    def __init__(self):
        self.lock = threading.Lock()
        self.handle: T | None = None
        self.error: Exception | None = None
        self.weight: float = 0
