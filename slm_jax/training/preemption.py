"""Being asked to stop: SIGTERM ends a run after the step at hand, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Watches for SIGTERM; gives a function that says after a step whether to stop there.

    With several processes all of them stop after the same step, as JAX's preemption service agrees on it.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Signals belong to the main thread; elsewhere the owner of the process handles them.
        yield lambda step: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
