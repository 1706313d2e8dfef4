"""At which step a run was last evaluated, so that one that died in its last evaluation does it again."""

import json
from pathlib import Path

import jax
import numpy as np

from slm_jax import storage


class EvaluationMark:
    """The file `evaluated.json` of a run, which its first process reads and writes.

    Args:
      path: the file.
      restored_step: what it says of later steps is forgotten, as they are taken again.
    """

    def __init__(self, path: Path, restored_step: int):
        self._path = path
        if jax.process_index() == 0 and (self._read() or 0) > restored_step:
            storage.asked(path, lambda: storage.remove(path))

    def has(self, step: int) -> bool:
        """Returns whether the evaluation of a step is over, the same on every process."""
        found = jax.process_index() == 0 and self._read() == step
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # An evaluation is the work of all of them.
            found = bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))
        return found

    def set(self, step: int) -> None:
        """Writes down that the evaluation of a step is over; raises UserError where it cannot."""
        if jax.process_index() != 0:
            return
        try:
            storage.write(self._path, json.dumps({"step": step}) + "\n")
        except OSError as error:
            raise storage.failed(f"cannot write {self._path}", error, self._path) from error

    def _read(self) -> int | None:
        try:
            return json.loads(storage.read(self._path))["step"]
        except (OSError, ValueError, KeyError, TypeError):
            # To evaluate once more does no harm.
            return None
