"""One line of JSON per step, to compare runs step by step."""

import json
from collections.abc import Mapping
from pathlib import Path

from slm_jax import storage
from slm_jax.appended import open_appended, read_appended
from slm_jax.errors import UserError


class StepLog:
    """The file `steps.jsonl` of a run: step, loss and, if wanted, more of it and the ids of its examples.

    Lines past the restored step are cut off when a run resumes, so that the file reads as if the run had
    never stopped.

    Args:
      path: the file.
      restored_step: last step whose line is kept; 0 starts afresh.

    Raises:
      UserError: it cannot be written.
    """

    def __init__(self, path: str | Path, restored_step: int):
        self._path = storage.absolute_path(path)
        try:
            self._file = open_appended(self._path, b"".join(self._lines_up_to(restored_step)))
        except OSError as error:
            raise self._unwritten(error) from error

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        return self._path.name

    def write(
        self,
        step: int,
        loss: float,
        ids: Mapping[int, tuple[str, ...]] | None = None,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Adds a line; `ids` maps global rows to example ids, `more` has other scalars by their names."""
        line: dict[str, object] = {"step": step, "loss": loss, **(more or {})}
        if ids is not None:
            line["ids"] = {str(row): list(names) for row, names in sorted(ids.items())}
        try:
            self._file.add(json.dumps(line) + "\n")
        except OSError as error:
            raise self._unwritten(error) from error

    def flush(self) -> None:
        """Brings all lines to the disk; called before a checkpoint, which must never be ahead of it."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> UserError:
        return storage.failed(f"cannot write {self._path}", error, self._path)

    def _lines_up_to(self, last_step: int) -> list[bytes]:
        try:
            lines = read_appended(self._path).splitlines(keepends=True)
        except FileNotFoundError:
            return []
        kept = []
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                # A kill may leave half a line at the end.
                continue
            if step <= last_step and line.endswith(b"\n"):
                kept.append(line)
        return kept
