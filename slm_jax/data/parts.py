"""Which part of a file a reference is: the grammar of `Reference.part`.

A part is `&`-joined `key=value`, empty for a whole file:

- `t=START,END` seconds of the audio, as in W3C's media fragments; without END (`t=START`) to its end. It goes
  with any of the others;
- one kind of container, with what it needs: a key of `containers.READERS`.

Values are percent-encoded where they hold `&`, `=` or `%`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, unquote

from slm_jax.errors import BadExample


class Part(NamedTuple):
    """A parsed part.

    Attributes:
      values: its keys and values but `t`; empty for a whole file.
      start: of the stretch, in seconds.
      end: of the stretch, in seconds; None for the end of the audio.
    """

    values: Mapping[str, str]
    start: float = 0.0
    end: float | None = None

    @property
    def is_stretch(self) -> bool:
        """Whether `t` is given."""
        return self.start > 0 or self.end is not None


def seconds(start: float, end: float | None = None) -> str:
    """Returns the part of a stretch of audio."""
    return f"t={start!r}" if end is None else f"t={start!r},{end!r}"


def byte_range(offset: int, length: int) -> str:
    """Returns the part of a stretch of a file."""
    return f"bytes={offset},{length}"


def parquet_row(row: int, column: str) -> str:
    """Returns the part of a row of a parquet file, from 0."""
    return f"row={row}&column={quoted(column)}"


def quoted(value: str) -> str:
    """Returns a value as it may stand in a part."""
    return quote(value, safe="/:,+ @")


def parse(part: str) -> Part:
    """Returns what a part says.

    Raises:
      BadExample: `bad_part`, it is none.
    """
    values: dict[str, str] = {}
    for item in part.split("&") if part else ():
        key, _, value = item.partition("=")
        if key in values:
            raise BadExample("bad_part", f"part {part!r} says {key!r} twice")
        values[key] = unquote(value)
    start, end = _stretch(values.pop("t", None), part)
    return Part(values, start, end)


def whole_number(values: Mapping[str, str], key: str) -> int:
    """Returns the value of a key as a number from 0; raises BadExample `bad_part`."""
    (number,) = whole_numbers(values, key, 1)
    return number


def whole_numbers(values: Mapping[str, str], key: str, count: int) -> list[int]:
    """Returns the value of a key as `count` numbers from 0; raises BadExample `bad_part`."""
    words = values.get(key, "").split(",")
    if len(words) != count or not all(word.isascii() and word.isdigit() for word in words):
        raise BadExample("bad_part", f"{key}={values.get(key, '')} is not {count} whole numbers")
    return [int(word) for word in words]


def _stretch(value: str | None, part: str) -> tuple[float, float | None]:
    if value is None:
        return 0.0, None
    start, _, end = value.partition(",")
    try:
        first, last = float(start or 0), float(end) if end else None
    except ValueError:
        raise BadExample("bad_part", f"part {part!r}: t is {value!r}, expected seconds") from None
    if not (0 <= first < math.inf) or (last is not None and not first < last < math.inf):
        raise BadExample("bad_part", f"part {part!r}: t is {value!r}, expected START before END")
    return first, last
