"""Where the members of a tar archive lie, from one pass over its headers."""

from __future__ import annotations

import logging
import tarfile
from typing import NamedTuple

from slm_jax.data import storage
from slm_jax.data.sources.text_files import naming_mistakes
from slm_jax.errors import UserError

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A file in an archive: its name, and where its bytes lie."""

    name: str
    offset: int
    length: int


def tar_members(path: str) -> list[Member]:
    """Returns the files in a tar archive, in its order.

    An archive that breaks off has the members up to there; that the last one is not whole is found when it is
    read.

    Raises:
      UserError: it is missing, or is no plain tar archive.
    """
    members: list[Member] = []
    with naming_mistakes(path, "tar shard"), storage.open_binary(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    if info.isreg() and not info.issparse():
                        members.append(Member(info.name, info.offset_data, info.size))
        except tarfile.TarError as error:
            if not members:
                raise UserError(f"tar shard {path} is no plain tar archive: {error}") from None
            logger.warning("tar shard %s breaks off after %s: %s", path, members[-1].name, error)
    return members
