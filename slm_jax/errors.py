"""The kinds of trouble that are not bugs: a user's mistake, storage that is away, and a bad example."""

import difflib
import math
from collections.abc import Iterable

_LONGEST = 1200

# Exit statuses of `slm`, for whoever starts it again. A user has to mend something first:
EXIT_MISTAKE = 2
# Storage did not answer for a while (sysexits' EX_IOERR); the same command goes on when it does.
EXIT_STORAGE = 74
# Asked to stop: saved, and the same command goes on (sysexits' EX_TEMPFAIL).
EXIT_STOPPED = 75
# Another process of the run is lost, or this one hangs.
EXIT_LOST = 76


class UserError(Exception):
    """A user's mistake, told in one sentence; commands print it and exit with status 2.

    The sentence names the file, field or flag, what was found, what was expected and the
    nearest valid choice. What was found may be anything: the sentence stays one line, and of some length.
    """

    def __init__(self, sentence: str):
        line = " ".join(sentence.splitlines())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class RemoteError(OSError):
    """An operation on remote storage that failed in every attempt."""


class StorageError(UserError):
    """Remote storage that does not answer: nobody's mistake, told in one sentence all the same."""


def exit_status(error: Exception) -> int:
    """Returns the status to exit with: `EXIT_MISTAKE`, or `EXIT_STORAGE` where remote storage was away."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (StorageError, RemoteError)):
            return EXIT_STORAGE
        cause = cause.__cause__
    return EXIT_MISTAKE


class BadExample(Exception):
    """One example that cannot be used; it is skipped and counted, and never ends a run by itself.

    Attributes:
      reason: short code under which the example is counted, such as `unreadable_audio`.
      detail: what was found, for the log.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def nearest(found: object, choices: Iterable[object]) -> str:
    """Returns "; did you mean 'x'?" for the choice closest to `found`, or the choices themselves."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(found), names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(sorted(names))}" if names else ""


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raises UserError unless a field's value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}, expected a whole number of at least {least}")


def is_number(value: object) -> bool:
    """Whether a field's value is a number; infinity, what is not a number, True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
