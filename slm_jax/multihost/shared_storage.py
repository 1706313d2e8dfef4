"""Whether all processes write to a directory, and read there what the others wrote."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from slm_jax.multihost.examination import Examination, Verdict, by_value

_BULK_BYTES = 16 << 20
# Each process reads the marks of so many others at most: a thousand processes do not read a million files.
_MOST_READ = 64
# What was written may take so long to be seen.
_SEEN_SECONDS = 3.0


class Files(Protocol):
    """A place for files; each function raises OSError."""

    def write(self, path: str, data: bytes) -> None: ...

    def read(self, path: str) -> bytes: ...

    def remove(self, path: str) -> None: ...

    def free(self, path: str) -> int | None:
        """Returns bytes that are free, where that can be said."""
        ...

    def nearest(self, directory: str) -> str:
        """Returns a directory, or one above it where it is not there."""
        ...


def examine_storage(examination: Examination, files: Files, directory: str, shared: bool = True) -> None:
    """Goes through the phase `storage` for one directory; what it writes there it removes.

    Args:
      examination: in which all processes call this.
      files: writes and reads.
      directory: as this process finds it, local or remote.
      shared: whether processes of several hosts must see what the others write.
    """
    examination.examine(
        "storage",
        lambda: _look(examination, files, directory, shared),
        lambda found: _judge(examination, found, shared),
    )


def _look(examination: Examination, files: Files, directory: str, shared: bool) -> dict[str, Any]:
    index, count = examination.processes.index, examination.processes.count
    token = examination.gathered(os.urandom(8).hex())[0]
    found: dict[str, Any] = {"directory": directory, "error": None, "unseen": [], "free": None}
    examination.at(f"looks for {directory}")
    with _kept(found, f"cannot look for {directory}"):
        directory = found["directory"] = files.nearest(directory)
    mine = f"{directory.rstrip('/')}/.slm_doctor_{token}_"
    bulk = np.random.default_rng(index).bytes(_BULK_BYTES)
    own = [f"{mine}{index}", f"{mine}{index}_bulk"] if not found["error"] else []
    examination.at(f"writes to {directory}")
    with _kept(found, f"cannot write to {directory}"):
        if own:
            files.write(own[0], _mark(index))
            began = time.monotonic()
            files.write(own[1], bulk)
            found["write"] = _BULK_BYTES / (time.monotonic() - began)
            found["free"] = files.free(directory)
    failed = examination.gathered(found["error"] is not None)
    distances = range(1, min(count, _MOST_READ + 1)) if shared else ()
    written = [index, *((index + distance) % count for distance in distances)] if own else []
    written = [other for other in written if not failed[other]]
    examination.at(f"reads from {directory}")
    deadline = time.monotonic() + _SEEN_SECONDS
    found["unseen"] = [other for other in written if not _seen(files, f"{mine}{other}", other, deadline)]
    seen = [other for other in written[::-1] if other not in found["unseen"]]
    if seen and not found["error"]:
        # Somebody else's, where there is one: what a host wrote itself it has in memory.
        with _kept(found, f"cannot read in {directory}"):
            began = time.monotonic()
            same = files.read(f"{mine}{seen[0]}_bulk") == np.random.default_rng(seen[0]).bytes(_BULK_BYTES)
            found["read"] = _BULK_BYTES / (time.monotonic() - began)
            found["error"] = None if same else f"read other bytes in {directory} than were written there"
    examination.gathered(None)
    examination.at(f"removes what it wrote in {directory}")
    for path in own:
        with _kept(found, f"cannot remove {path}"):
            files.remove(path)
    return found


@contextlib.contextmanager
def _kept(found: dict[str, Any], what: str) -> Iterator[None]:
    """Keeps the first error of all; the others wait for this process, whatever it meets."""
    try:
        yield
    except OSError as error:
        found["error"] = found["error"] or f"{what}: {error.strerror or error}"


def _mark(index: int) -> bytes:
    return f"of process {index}\n".encode()


def _seen(files: Files, path: str, other: int, deadline: float) -> bool:
    while True:
        try:
            if files.read(path) == _mark(other):
                return True
        except OSError:
            # It is not there, or not to be read.
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _judge(examination: Examination, found: list[dict[str, Any]], shared: bool) -> Verdict:
    directories = [one["directory"] for one in found]
    errors = {index: one["error"] for index, one in enumerate(found) if one["error"]}
    problems = by_value(errors, examination.names)
    blind = {index: one["unseen"] for index, one in enumerate(found) if one["unseen"]}
    if blind:
        index, unseen = next(iter(blind.items()))
        more = f"; nor do {len(blind) - 1} more see all" if len(blind) > 1 else ""
        problems.append(
            f"{examination.name(index)} does not see what {examination.names(unseen)} wrote in "
            f"{directories[unseen[0]]}; expected a directory that all hosts share{more}"
        )
    if problems:
        return Verdict("", problems)
    write, read = (min(one[what] for one in found) / 1e6 for what in ("write", "read"))
    free = [one["free"] for one in found if one["free"] is not None]
    room = f", {min(free) / 1e9:.1f} GB free" if free else ""
    who = "written and read by all" if shared else "written by each"
    return Verdict(
        f"{directories[0]} is {who}; the slowest writes {write:.0f} MB/s and reads {read:.0f} MB/s{room}"
    )
