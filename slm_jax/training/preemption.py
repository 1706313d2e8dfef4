"""Being asked to stop: SIGTERM, a notice or Ctrl-C ends a run after the step at hand, with a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from slm_jax.multihost.joining import agreement
from slm_jax.multihost.notice import preemption_notices


class StopWaiting(BaseException):
    """A signal came while the run waited for something that may never come."""


class StopRequests:
    """Whether a run is asked to stop: a function of the step that was taken.

    Args:
      reached: says after a step whether to stop there.
    """

    def __init__(self, reached: Callable[[int], bool]):
        self._reached = reached
        self._is_waiting = False

    def __call__(self, step: int) -> bool:
        """Returns whether to stop after a step."""
        return self._reached(step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the signals raise StopWaiting where one process trains in the main thread."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def interrupt(self) -> None:
        """Ends the waiting; called by the handler of the signal."""
        if self._is_waiting:
            self._is_waiting = False
            raise StopWaiting


@contextlib.contextmanager
def stop_requests(step: int) -> Iterator[StopRequests]:
    """Watches for SIGTERM, SIGINT and notices of preemption; gives what says after a step whether to stop.

    A second SIGINT is Python's KeyboardInterrupt. Several processes stop after the same step, all of them,
    as JAX's preemption service agrees on it.

    Args:
      step: steps that are behind the run.
    """
    if jax.process_count() > 1:
        reached = agreement(step)
        # JAX knows of the one signal alone.
        with _keyboard(lambda: os.kill(os.getpid(), signal.SIGTERM)), preemption_notices():
            yield StopRequests(reached)
        return
    if threading.current_thread() is not threading.main_thread():
        # Signals belong to the main thread; elsewhere the owner of the process handles them.
        yield StopRequests(lambda step: False)
        return
    asked = threading.Event()
    requests = StopRequests(lambda step: asked.is_set())

    def stop() -> None:
        asked.set()
        requests.interrupt()

    previous = signal.signal(signal.SIGTERM, lambda number, _: stop())
    try:
        with _keyboard(stop), preemption_notices():
            yield requests
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _keyboard(stop: Callable[[], None]) -> Iterator[None]:
    """Inside, the first SIGINT calls `stop`.

    Where SIGINT is ignored or somebody else's, as of a job in the background, it stays so.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number: int, _: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; interrupt once more to end at once, with nothing saved\n")
        stop()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
