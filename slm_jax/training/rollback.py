"""Going back to a checkpoint and past rows, once, however often the same command is run.

What was asked for is written down in `rollbacks.json` of the run's directory before anything moves. A start
that finds it unfinished finishes it, with or without the flags; one that finds it done goes on with the run.
"""

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from slm_jax import storage
from slm_jax.appended import copy_appended
from slm_jax.checkpoints.broadcast import together
from slm_jax.checkpoints.directories import barrier
from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.errors import UserError, check_whole

ROLLBACKS_FILE = "rollbacks.json"
ROLLED_BACK = "checkpoints_rolled_back"

# First row and number of rows.
RowRange = tuple[int, int]


@dataclass(frozen=True)
class Rollback:
    """What is asked for.

    Attributes:
      step: of the checkpoint to go back to.
      skip_steps: steps' worth of rows after it that are never trained on.
    """

    step: int
    skip_steps: int = 0

    def __post_init__(self):
        check_whole("--rollback_to", self.step)
        check_whole("--skip_steps", self.skip_steps, 0)


class Rollbacks:
    """The rollbacks of a run, the newest of which counts.

    Every process makes one and asks the same of it; the first process writes and moves.

    Args:
      model_dir: the run's directory; checkpoints lie in its folder `checkpoints`.
      asked: by this command, if anything.

    Raises:
      UserError: `rollbacks.json` is damaged.
    """

    def __init__(self, model_dir: Path, asked: Rollback | None):
        self._model_dir, self._asked = model_dir, asked
        self._entries = self._read()

    @property
    def _last(self) -> Rollback | None:
        if not self._entries:
            return None
        return Rollback(self._entries[-1]["step"], self._entries[-1]["skip_steps"])

    @property
    def oldest(self) -> int:
        """The step of the newest rollback: an older checkpoint knows nothing of the rows that it left out."""
        return self._last.step if self._last else 0

    @property
    def unfinished(self) -> Rollback | None:
        """What is to be carried out now; None where it is done already or nothing was asked for."""
        if self._entries and not self._entries[-1]["done"]:
            return self._last
        return self._asked if self._asked != self._last else None

    def step(self, saved: Sequence[int]) -> int | None:
        """Returns the step to restore, None for the newest.

        Raises:
          UserError: it is none of the saved steps, or other flags began what is unfinished.
        """
        wanted = self.unfinished
        if wanted is None:
            return None
        if self._asked not in (None, wanted):
            raise UserError(
                f"--rollback_to {self._asked.step} --skip_steps {self._asked.skip_steps}: a rollback of "
                f"{self._model_dir} was cut off, expected its own --rollback_to {wanted.step} --skip_steps "
                f"{wanted.skip_steps} or neither, which finishes it"
            )
        if wanted.step not in saved:
            near = min(saved, key=lambda step: abs(step - wanted.step), default=None)
            told = f"the nearest saved one is {near}" if near is not None else "nothing is saved yet"
            if self._asked is None:
                raise UserError(
                    f"{self._model_dir} was being rolled back to step {wanted.step}, of which it holds no "
                    f"checkpoint any more; {told}; remove {self._model_dir / ROLLBACKS_FILE} to go on from "
                    "the newest"
                )
            raise UserError(
                f"--rollback_to {wanted.step}: {self._model_dir} holds no checkpoint of it; {told}"
            )
        return wanted.step

    def carry_out(self, checkpoints: RunCheckpoints) -> str | None:
        """Writes down what was asked for and moves later checkpoints aside.

        Args:
          checkpoints: of the run; they are looked at anew where some were moved.

        Returns:
          A line for the first process's log where something was to be done.

        Raises:
          UserError: it cannot be written or moved.
        """
        wanted = self.unfinished
        if wanted is None:
            return None
        barrier("rollback: begin")
        line = together(lambda: self._move(wanted) if jax.process_index() == 0 else None)
        self._entries = self._read()
        checkpoints.reload()
        return line

    def skipped_after(self, step: int | None, rows_consumed: int, rows_per_step: int) -> RowRange | None:
        """Returns the rows to leave out after a checkpoint: it knows of no rollback to itself.

        Args:
          step: that was restored, None where the run begins.
          rows_consumed: as it says.
          rows_per_step: of a global batch.
        """
        last = self._last
        if last is None or last.step != step or not last.skip_steps:
            return None
        return rows_consumed, last.skip_steps * rows_per_step

    def forget(self) -> None:
        """A run that begins has gone back nowhere; what was moved aside stays."""
        if self._entries and jax.process_index() == 0:
            path = self._model_dir / ROLLBACKS_FILE
            storage.asked(path, lambda: storage.remove(path))
        self._entries = []

    def _move(self, wanted: Rollback) -> str:
        try:
            if not self._entries or self._entries[-1]["done"]:
                aside = self._free_folder()
                self._entries.append({**asdict(wanted), "moved_to": aside.name, "done": False})
                self._write()
            aside = self._model_dir / ROLLED_BACK / self._entries[-1]["moved_to"]
            storage.make_folder(aside)
            for name in fnmatch.filter(storage.list_folder(self._model_dir), "steps*.jsonl"):
                # The run's own is cut off after the step that it goes on from.
                copy_appended(self._model_dir / name, aside)
            for path in self._later(wanted.step):
                _move_checkpoint(path, aside / path.name)
            moved = sorted(int(name) for name in storage.list_folder(aside) if name.isdigit())
            self._entries[-1]["done"] = True
            self._write()
        except OSError as error:
            raise storage.failed(f"cannot roll back {self._model_dir}", error, self._model_dir) from error
        what = f"checkpoints {', '.join(map(str, moved))} are" if moved else "steps.jsonl as it was is"
        return f"rolled back to step {wanted.step}: {what} in {aside}"

    def _later(self, step: int) -> list[Path]:
        folder = self._model_dir / "checkpoints"
        steps = [int(name) for name in storage.list_folder(folder) if name.isdigit() and int(name) > step]
        return [folder / str(step) for step in sorted(steps, reverse=True)]

    def _free_folder(self) -> Path:
        number = 1
        while storage.is_folder(folder := self._model_dir / ROLLED_BACK / str(number)):
            number += 1
        return folder

    def _read(self) -> list[dict[str, Any]]:
        path = self._model_dir / ROLLBACKS_FILE
        try:
            entries = json.loads(storage.read(path))
            for entry in entries:
                Rollback(entry["step"], entry["skip_steps"])
                _ = entry["done"], entry["moved_to"]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage.failed(f"cannot read {path}", error, path) from error
        except (ValueError, KeyError, TypeError, UserError) as error:
            raise UserError(
                f"{path} is damaged, expected the rollbacks of this run; remove it to go on from the newest "
                "checkpoint without what it left out"
            ) from error
        return entries

    def _write(self) -> None:
        path = self._model_dir / ROLLBACKS_FILE
        storage.write(path, json.dumps(self._entries, indent=1) + "\n")


def rows_text(skipped: Sequence[RowRange]) -> str:
    """Says which rows are left out."""
    return ", ".join(f"{first} to {first + count - 1}" for first, count in skipped)


def _move_checkpoint(path: Path, aside: Path) -> None:
    storage.move_folder(path, aside)
