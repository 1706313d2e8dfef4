"""Manifests as text: lines of local, remote and gzipped files, with one sentence for what is wrong."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

from slm_jax import storage
from slm_jax.errors import RemoteError, UserError, nearest

_BLOCK = 4 << 20


@contextlib.contextmanager
def naming_mistakes(path: str, what: str = "manifest") -> Iterator[None]:
    """Turns an OSError of a file into a UserError that names it and the nearest in its folder.

    Args:
      path: of the file, local or remote.
      what: the file is, such as `manifest`.

    Raises:
      RemoteError: its storage is away; that goes through as it is.
    """
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist{_nearest_sibling(path)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{what} {path} is not a whole gzip file: {error}") from None
    except RemoteError:
        raise
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None


class Block(NamedTuple):
    """A run of whole lines.

    Attributes:
      number: of its first line, from 1.
      text: the lines, line feeds between them and none at the end.
    """

    number: int
    text: str

    @property
    def lines(self) -> list[str]:
        """The lines, without line feeds."""
        # Not splitlines: a text may hold characters that it takes for line ends.
        return self.text.split("\n")


def blocks(path: str, what: str = "manifest") -> Iterator[Block]:
    """Yields the lines of a file in runs of some megabytes.

    Args:
      path: local or remote, in UTF-8, with a byte order mark or without; gzipped where it ends in `.gz`.
      what: the file is, for errors.

    Raises:
      UserError: it is missing, cannot be read, or is not UTF-8.
    """
    number, offset, rest = 1, 0, b""
    with naming_mistakes(path, what), _open(path) as file:
        while data := file.read(_BLOCK):
            data = rest + data
            # Spreadsheets begin UTF-8 with a mark, which is no part of the first field's name.
            if not offset and data.startswith(codecs.BOM_UTF8):
                offset = len(codecs.BOM_UTF8)
                data = data[offset:]
            data, feed, rest = data.rpartition(b"\n")
            if feed:
                yield Block(number, _decoded(data, offset, path, what))
                number += data.count(b"\n") + 1
                offset += len(data) + 1
        if rest:
            yield Block(number, _decoded(rest, offset, path, what))


def numbered_lines(path: str, what: str = "manifest") -> Iterator[tuple[int, str]]:
    """Yields the lines of a file that are not blank with their numbers; raises UserError as `blocks`."""
    for block in blocks(path, what):
        for number, line in enumerate(block.lines, block.number):
            if line and not line.isspace():
                yield number, line


def fingerprint(path: str, what: str = "manifest") -> str:
    """Returns the SHA-256 of a file's bytes; raises UserError where it cannot be read."""
    with naming_mistakes(path, what), storage.open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def _decoded(data: bytes, offset: int, path: str, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise UserError(f"{what} {path} is not UTF-8 text: byte {place} is {error.reason}") from None


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    with storage.open_binary(path) as file:
        if path.endswith(".gz"):
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def _nearest_sibling(path: str) -> str:
    name = path.rpartition("/")[2]
    suffix = name.rpartition(".")[2]
    with contextlib.suppress(OSError):
        return nearest(
            name, [found for found in storage.list_folder(storage.parent(path)) if found.endswith(suffix)]
        )
    return ""
