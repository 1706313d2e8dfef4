"""Buckets as folders: `gs://`, `s3://` and what else fsspec knows, for us and, through etils, for Orbax.

A bucket has no folders, only names with slashes: a folder is there where a name begins with it, making one
does nothing, and moving one is a copy of each object. One object is written whole or not at all. Nothing is
cached: what another process has written is seen.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib.util
import io
import os
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from etils.epath import backend, gpath, stat_utils

from slm_jax.errors import UserError

# Scheme -> the package that speaks its protocol, and what of ours asks for it.
PACKAGES = {
    "gs": ("gcsfs", "slm_jax[gcs]"),
    "s3": ("s3fs", "slm_jax[s3]"),
    "az": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 20, "read_timeout": 60}
    },
}


# Orbax's sign that a checkpoint is complete. It is written last, and so it has to go first.
COMMIT_FILE = "commit_success.txt"


class ObjectInfo(NamedTuple):
    """What is known of a name: size in bytes, time of change in nanoseconds (0 unknown), whether a folder."""

    size: int
    changed: int
    folder: bool


class ObjectStore:
    """What can be done in the buckets of one scheme; every operation is one attempt, but for `remove_below`.

    Args:
      scheme: such as `s3`.

    Raises:
      UserError: the package that speaks to it is not installed.
    """

    def __init__(self, scheme: str):
        package, wanted = PACKAGES[scheme]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{scheme}:// needs the package {package}; expected pip install '{wanted}'")
        options = dict(_OPTIONS.get(scheme, {}))
        if scheme == "gs":
            import aiohttp

            # An answer that does not go on is given up as S3's is; by itself gcsfs waits for five minutes.
            options["requests_timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
        self._files = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
        # How often a request is tried is decided in one place, not in each client.
        if scheme == "s3":
            self._files.retries = 1
        if scheme == "gs":
            self._files._request = type(self._files)._request.__wrapped__.__get__(self._files)

    def info(self, path: str) -> ObjectInfo:
        """Returns what is known of a file or folder; FileNotFoundError where there is neither."""
        found = self._files.info(path)
        changed = found.get("mtime") or found.get("LastModified") or found.get("updated")
        if hasattr(changed, "timestamp"):
            changed = changed.timestamp()
        seconds = changed if isinstance(changed, (int, float)) else 0.0
        return ObjectInfo(int(found.get("size") or 0), int(seconds * 1e9), found.get("type") == "directory")

    def names(self, path: str) -> list[str]:
        """Returns the names in a folder, sorted; FileNotFoundError where there is none."""
        own = path.partition("://")[2].strip("/")
        found = (name.strip("/") for name in self._files.ls(path, detail=False))
        # A folder that a console has made is an object of its own name.
        return sorted({posixpath.basename(name) for name in found if name != own})

    def below(self, path: str) -> list[str]:
        """Returns the names of all objects below a folder, relative to it, sorted."""
        own = path.partition("://")[2].strip("/")
        found = (name.lstrip("/") for name in self._files.find(path))
        # Clients cannot remove the `folder/` that a console has made.
        return sorted(name[len(own) + 1 :] for name in found if not name.endswith("/"))

    def parts_to_move(self, path: str) -> list[str]:
        """Returns the names of a complete checkpoint's objects, its sign last; none of half a one."""
        names = self.below(path)
        if COMMIT_FILE not in names:
            return []
        return sorted(names, key=lambda name: (name == COMMIT_FILE, name))

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Returns the bytes of an object, or those from `start` to `end`."""
        return self._files.cat_file(path, start=start, end=end)

    def write(self, path: str, data: bytes) -> None:
        """Writes an object."""
        self._files.pipe_file(path, data)

    def upload(self, local: str, path: str) -> None:
        """Copies a local file."""
        self._files.put_file(local, path)

    def copy(self, source: str, path: str) -> None:
        """Copies an object to another name."""
        self._files.cp_file(source, path)

    def remove(self, path: str) -> None:
        """Removes an object, where it is there: an attempt that seemed to fail may have done it."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)

    def remove_below(self, path: str, retrying: Retrying) -> None:
        """Removes all that is below a folder, signs of completeness first; nothing where there is none.

        It takes many requests, which would hardly ever succeed in one go: each is tried again by itself.
        """

        def listed() -> list[str]:
            return retrying(f"list {path}", lambda: self.below(path))

        def attempt() -> None:
            # One that failed has removed some of it.
            if names := listed():
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm([f"{path}/{name}" for name in names])
                # S3's client does not tell of an object that it could not remove.
                if listed():
                    raise OSError(f"{path} was removed and is there")

        # Half removed it must not look complete.
        signs = [name for name in listed() if posixpath.basename(name) == COMMIT_FILE]
        for name in sorted(signs, key=lambda name: name.count("/")):
            retrying(f"remove {path}/{name}", lambda name=name: self.remove(f"{path}/{name}"))
        retrying(f"remove {path}", attempt)


@functools.cache
def store(scheme: str) -> ObjectStore:
    """Returns the object store of a scheme; raises UserError where its package is not installed."""
    return ObjectStore(scheme)


# Does an operation, described in words, as often as is needed.
Retrying = Callable[[str, Callable[[], Any]], Any]


@functools.cache
def serve_etils(retrying: Retrying) -> None:
    """Has `epath.Path` of remote paths, and with it all of Orbax, go through the object stores of this file.

    By itself etils takes TensorFlow's files, which know no `s3://`, or fsspec's as they are, for which what
    cannot be asked is not there. There is no public way to give it another backend.
    """
    served = _Backend(retrying)
    gpath._PREFIX_TO_BACKEND.update(dict.fromkeys(PACKAGES, served))
    # Of two paths the remote one's decides.
    gpath._GCS_BACKENDS = frozenset({*gpath._GCS_BACKENDS, served})
    os.environ["EPATH_USE_TF"] = "false"
    gpath._is_tf_installed.cache_clear()


class _Backend(backend.Backend):
    """etils' operations on object stores, each tried again where it fails for a moment."""

    def __init__(self, retrying: Retrying):
        self._retrying = retrying

    def _do(self, what: str, path: Any, operation: Callable[[ObjectStore, str], Any]) -> Any:
        name = os.fspath(path).rstrip("/")
        found = store(name.partition("://")[0])
        return self._retrying(f"{what} {name}", lambda: operation(found, name))

    def _info(self, path: Any) -> ObjectInfo | None:
        try:
            return self._do("look at", path, lambda found, name: found.info(name))
        except FileNotFoundError:
            return None

    def open(self, path: Any, mode: str) -> Any:
        if "a" in mode:
            raise NotImplementedError(f"{path}: nothing can be added to an object")
        if "w" in mode:
            kind = _Upload if "b" in mode else _TextUpload
            return kind(lambda data: self._do("write", path, lambda found, name: found.write(name, data)))
        file = io.BytesIO(self._do("read", path, lambda found, name: found.read(name)))
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def exists(self, path: Any) -> bool:
        return self._info(path) is not None

    def isdir(self, path: Any) -> bool:
        info = self._info(path)
        return info is not None and info.folder

    def listdir(self, path: Any) -> list[str]:
        return self._do("list", path, lambda found, name: found.names(name))

    def glob(self, path: Any) -> list[str]:
        folder, _, pattern = os.fspath(path).rpartition("/")
        if any(sign in folder for sign in "*?["):
            raise NotImplementedError(f"{path}: only the last part of a path may be a pattern")
        try:
            names = self.listdir(folder)
        except FileNotFoundError:
            return []
        return [f"{folder}/{name}" for name in fnmatch.filter(names, pattern)]

    def walk(self, top: Any, *, top_down: bool = True, on_error: Any = None) -> Iterator[Any]:
        top = os.fspath(top).rstrip("/")
        names = self._do("list", top, lambda found, name: found.below(name))
        folders: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}
        for name in names:
            *parents, last = name.split("/")
            for depth in range(len(parents)):
                folders["/".join(parents[:depth])][0].add(parents[depth])
                folders.setdefault("/".join(parents[: depth + 1]), (set(), []))
            folders["/".join(parents)][1].append(last)
        for folder in sorted(folders, reverse=not top_down):
            inside, files = folders[folder]
            yield f"{top}/{folder}".rstrip("/"), sorted(inside), files

    def makedirs(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        if not exist_ok and self.exists(path):
            raise FileExistsError(f"{path} is there already")

    def mkdir(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        self.makedirs(path, exist_ok=exist_ok)

    def rmtree(self, path: Any) -> None:
        if not self.exists(path):
            raise FileNotFoundError(f"there is no {path}")
        name = os.fspath(path).rstrip("/")
        store(name.partition("://")[0]).remove_below(name, self._retrying)

    def remove(self, path: Any) -> None:
        info = self._info(path)
        if info is None:
            raise FileNotFoundError(f"there is no {path}")
        if info.folder:
            raise IsADirectoryError(f"{path} is a folder")
        self._do("remove", path, lambda found, name: found.remove(name))

    def rename(self, path: Any, dst: Any) -> None:
        if self.exists(dst):
            raise FileExistsError(f"{dst} is there already")
        self.replace(path, dst)

    def replace(self, path: Any, dst: Any) -> None:
        info = self._info(path)
        if info is None:
            raise FileNotFoundError(f"there is no {path}")
        if info.folder:
            raise IsADirectoryError(f"{path} is a folder, and a bucket cannot move one at once")
        self.copy(path, dst, overwrite=True)
        self.remove(path)

    def copy(self, path: Any, dst: Any, overwrite: bool) -> None:
        if not overwrite and self.exists(dst):
            raise FileExistsError(f"{dst} is there already")
        source, target = os.fspath(path), os.fspath(dst)
        if "://" not in source:
            self._do("write", target, lambda found, name: found.upload(source, name))
        elif "://" not in target:
            Path(target).write_bytes(self._do("read", source, lambda s, name: s.read(name)))
        else:
            self._do("write", target, lambda found, name: found.copy(source, name))

    def stat(self, path: Any) -> Any:
        info = self._info(path)
        if info is None:
            raise FileNotFoundError(f"there is no {path}")
        seconds = info.changed // 1_000_000_000
        return stat_utils.StatResult(
            is_directory=info.folder, length=info.size, mtime=seconds, owner=None, group=None, mode=None
        )


class _Upload(io.BytesIO):
    """A file to write, which becomes an object when it is closed, unless an error closes it."""

    def __init__(self, write: Callable[[bytes], None]):
        super().__init__()
        self._write = write

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self._write = lambda _: None
        super().__exit__(kind, *rest)

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._write(data)


class _TextUpload(_Upload):
    """The same for text."""

    def write(self, text: Any, /) -> int:
        return super().write(text.encode())
