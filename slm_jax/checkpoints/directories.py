"""New directories of models: refused before anything is computed, put in place whole, gone when it fails."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from slm_jax import storage
from slm_jax.errors import StorageError, UserError

# Held by the process that writes a directory which is not in place yet.
_LOCK_FILE = ".writing"
# Orbax takes paths for patterns.
_PATTERN = set("[]*?")


def new_directory(directory: str | Path) -> Path:
    """Returns the absolute path of a directory that is not there, or is empty.

    Raises:
      UserError: it holds something, or could not be written.
    """
    if not str(directory):
        raise UserError("the name of the new directory is empty")
    if storage.is_remote(directory):
        path = storage.absolute_path(directory)
    else:
        path = Path(os.path.abspath(directory))  # noqa: PTH100, `..` goes, which `absolute` leaves
    if bad := sorted(_PATTERN.intersection(str(path))):
        raise UserError(f"{path} has {' '.join(bad)} in its name, expected one without any of [ ] * ?")
    if storage.is_remote(path):
        # What a process was killed over has the lock file still, and may be begun anew.
        if not storage.asked(path, lambda: storage.is_empty(path) or storage.is_file(path / _LOCK_FILE)):
            raise UserError(f"{path} exists and is not an empty directory; a model is never overwritten")
        return path
    try:
        if path.is_symlink():
            raise UserError(f"{path} is a link, expected the directory itself or none")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty directory; a model is never overwritten")
    except OSError as error:
        raise UserError(f"{path} cannot be used: {error.strerror or error}") from error
    return path


@contextlib.contextmanager
def put_in_place(directory: Path, what: str, needed: int = 0) -> Iterator[Path]:
    """Gives a folder to write into, which takes the directory's name when all is written, or goes.

    In a bucket it is the directory itself: what is written last there has to be what a reader asks for first.

    In a run of several processes all of them enter together; process 0 makes and moves the folder.

    Args:
      directory: of `new_directory`.
      what: is written, for messages.
      needed: bytes that have to be free.

    Raises:
      UserError: it cannot be written.
    """
    first = jax.process_index() == 0
    if storage.is_remote(directory):
        yield from _in_bucket(directory, what, first)
        return
    partial = directory.with_name(f".{directory.name}.partial-{_shared_suffix()}")
    lock, made = None, []
    try:
        if first:
            made = [parent for parent in directory.parents if not parent.exists()]
            _remove_abandoned(directory)
            partial.mkdir(parents=True)
            lock = (partial / _LOCK_FILE).open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if needed > (free := shutil.disk_usage(partial).free):
                found = f"{free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} for the {what}"
                raise UserError(f"{directory.parent} has {found}")
        barrier(f"{what}: folder")
        yield partial
        if first:
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
            (directory / _LOCK_FILE).unlink()
        barrier(f"{what}: in place")
    except BaseException as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        if isinstance(error, (OSError, ValueError)) or type(error).__name__ == "SafetensorError":
            sentence = f"cannot save the {what} to {directory}: {first_line(error)}"
            raise UserError(sentence) from error
        raise
    finally:
        if lock is not None:
            lock.close()


def _in_bucket(directory: Path, what: str, first: bool) -> Iterator[Path]:
    try:
        if first:
            storage.remove_folder(directory)
            storage.write(directory / _LOCK_FILE, "")
        barrier(f"{what}: folder")
        yield directory
        if first:
            storage.remove(directory / _LOCK_FILE)
        barrier(f"{what}: in place")
    except BaseException as error:
        if first:
            # Where storage is away it stays, without what makes it whole.
            with contextlib.suppress(OSError):
                storage.remove_folder(directory)
        if isinstance(error, (OSError, ValueError)):
            kind = StorageError if storage.is_away(directory, error) else UserError
            raise kind(f"cannot save the {what} to {directory}: {first_line(error)}") from error
        raise


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's name."""
    return (str(error).strip().split("\n")[0][:300] or type(error).__name__).rstrip(".")


def _remove_abandoned(directory: Path) -> None:
    """Removes what a killed process left unfinished beside the directory; a living one holds its lock."""
    if not directory.parent.is_dir():
        return
    for partial in directory.parent.iterdir():
        if partial.name.startswith(f".{directory.name}.partial-"):
            with contextlib.suppress(OSError), (partial / _LOCK_FILE).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)


def _shared_suffix() -> str:
    if jax.process_count() == 1:
        return uuid.uuid4().hex[:8]
    # Every process must write below the same folder.
    from jax.experimental import multihost_utils

    seed = np.frombuffer(uuid.uuid4().bytes[:4], np.uint32)
    return f"{int(multihost_utils.broadcast_one_to_all(seed)[0]):08x}"
