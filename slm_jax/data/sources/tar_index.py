"""Where the members of a tar archive lie, from one pass over its headers."""

from __future__ import annotations

import logging
import tarfile
from typing import NamedTuple

from slm_jax import storage
from slm_jax.data.sources.text_files import naming_mistakes
from slm_jax.errors import UserError

logger = logging.getLogger(__name__)

# Column of kept tables: in its last row, the member after which the archive breaks off.
BROKEN_OFF = "@broken_off"


class Member(NamedTuple):
    """A file in an archive: its name, and where its bytes lie."""

    name: str
    offset: int
    length: int


class Members(NamedTuple):
    """The files in an archive.

    Attributes:
      files: in its order.
      broken_off: name of the last of them where the archive breaks off there; empty where it is whole.
    """

    files: list[Member]
    broken_off: str = ""


def tar_members(path: str) -> Members:
    """Returns the files in a tar archive; one that breaks off has those up to there.

    Raises:
      UserError: it is missing, or is no plain tar archive.
    """
    members: list[Member] = []
    broken_off = ""
    with naming_mistakes(path, "tar shard"), storage.open_binary(path) as file:
        try:
            # Names that are not UTF-8 are to be text that can be kept, and still differ.
            with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as archive:
                for info in archive:
                    if info.isreg() and not info.issparse():
                        members.append(Member(info.name, info.offset_data, info.size))
        except tarfile.TarError as error:
            if not members:
                raise UserError(f"tar shard {path} is no plain tar archive: {error}") from None
            broken_off = members[-1].name
    return Members(members, broken_off)


def warn_of_break(path: str, broken_off: str) -> None:
    """Logs where an archive breaks off, if it does; a look says so whether it scans or remembers."""
    if broken_off:
        logger.warning("tar shard %s breaks off after %s", path, broken_off)
