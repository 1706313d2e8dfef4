"""Notices that nothing goes on, says where every process is, and ends the run, to be started again."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from slm_jax.errors import EXIT_LOST
from slm_jax.multihost import joining

# Between two looks at where this process is, and between two times that it tells the others; at most.
_LOOK_SECONDS = 1.0
_TELL_SECONDS = 5.0
# Who has told nothing for so long is named with that.
_SILENT_SECONDS = 30.0
# So many processes of one place are named one by one.
_NAMED = 4

_TOPIC = "place"
_STDERR = 2


class Place(NamedTuple):
    """Where a process is.

    Attributes:
      what: in words, such as `'data wait' of step 121`.
      mark: another one whenever there was progress.
    """

    what: str
    mark: object


class Told(NamedTuple):
    """What a process has told of itself.

    Attributes:
      what: of its place.
      held: seconds without progress until it told so.
      silent: seconds since then.
    """

    what: str
    held: float
    silent: float = 0.0


class Watchdog:
    """A thread that ends the process when it stays in one place for too long.

    All processes of a run then write the stacks of all threads to stderr and end with `EXIT_LOST`.

    Args:
      where: gives the place of this process, from another thread; None where no limit holds.
      seconds: that a place may be without progress.
      head: what the sentence begins with.
    """

    def __init__(self, where: Callable[[], Place | None], seconds: float, head: str = ""):
        self._where, self._seconds, self._head = where, seconds, head
        self._look = min(_LOOK_SECONDS, seconds / 5)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slm_jax watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        mark: object = None
        held, told_at, looked_at = 0.0, 0.0, time.monotonic()
        while not self._stopped.wait(self._look):
            # Where the interpreter itself is held, only this is left.
            faulthandler.dump_traceback_later(self._seconds + _SILENT_SECONDS, file=_STDERR)
            now = time.monotonic()
            # A process that was stopped itself, as by Ctrl-Z, did not hang meanwhile.
            passed, looked_at = min(now - looked_at, 2 * self._look), now
            place = self._where()
            same = place is not None and place.mark == mark
            held, mark = (held + passed if same else 0.0), (place.mark if place else None)
            if place and (now - told_at > _TELL_SECONDS or held >= self._seconds):
                told_at = now
                self._tell(place, held)
            if place and held >= self._seconds:
                self._end(place, held)

    def _tell(self, place: Place, held: float) -> None:
        # Whoever keeps what is told may be gone, which others notice.
        if company := joining.company():
            with contextlib.suppress(Exception):
                company.tell(_TOPIC, json.dumps([place.what, held, time.time()]))

    def _end(self, place: Place, held: float) -> None:
        company = joining.company()
        sentence = f"{self._head}no progress for {held:.0f} s: this process is in {place.what}"
        if company:
            places = {company.processes.index: Told(place.what, held)}
            with contextlib.suppress(Exception):
                places = _places(company.told(_TOPIC)) | places
            sentence = f"{self._head}no progress for {held:.0f} s: {places_text(places, company.name)}"
        print(f"slm: {sentence}; the stacks of all threads follow", file=sys.stderr, flush=True)
        joining.dump_stacks()
        if company:
            company.fail(EXIT_LOST, sentence, stacks=True)
        os._exit(EXIT_LOST)


def _places(told: Mapping[int, str]) -> dict[int, Told]:
    found = {index: json.loads(text) for index, text in told.items()}
    return {index: Told(what, held, time.time() - at) for index, (what, held, at) in found.items()}


def places_text(places: Mapping[int, Told], name: Callable[[int], str]) -> str:
    """Returns which processes are where; first the place of the fewest, which the others wait for.

    Args:
      places: by process.
      name: of a process, by its number.
    """
    by_place: dict[str, list[int]] = {}
    for index, told in sorted(places.items()):
        by_place.setdefault(told.what, []).append(index)
    parts = []
    for what, found in sorted(by_place.items(), key=lambda entry: (len(entry[1]), entry[1])):
        verb, held = ("is" if len(found) == 1 else "are"), max(places[index].held for index in found)
        part = f"{names_text(found, name)} {verb} in {what} for {held:.0f} s"
        if silent := [index for index in found if places[index].silent > _SILENT_SECONDS]:
            most = max(places[index].silent for index in silent)
            part += f" ({names_text(silent, name)} told nothing for {most:.0f} s since)"
        parts.append(part)
    return "; ".join(parts)


def names_text(indices: Sequence[int], name: Callable[[int], str]) -> str:
    """Returns the names of some processes and the number of the others."""
    names = [name(index) for index in indices[:_NAMED]]
    if len(indices) > _NAMED:
        names.append(f"{len(indices) - _NAMED} more")
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


@contextlib.contextmanager
def watched(where: Callable[[], Place | None], seconds: float | None, head: str = "") -> Iterator[None]:
    """Has a `Watchdog` look on for the time of a block; `seconds` None has nobody look on."""
    watchdog = Watchdog(where, seconds, head) if seconds is not None else None
    try:
        yield
    finally:
        if watchdog:
            watchdog.stop()
