"""What a fresh run begins with besides foundation models: the trained parameters of another run."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.cli.run import Run
from slm_jax.errors import UserError


class StartingPoint:
    """The checkpoint that `run.Run.init_from` names.

    Args:
      run: the run that begins, with `init_from`.
      fingerprints: of its foundation models and tokenizers, by name.
      frozen: names of what is frozen in it.
    """

    def __init__(self, run: Run, fingerprints: Mapping[str, str], frozen: Iterable[str]):
        assert run.init_from is not None
        self._run = run
        self._fingerprints = dict(fingerprints)
        self._frozen = set(frozen)
        self._directory: Path = run.path(run.init_from)

    @staticmethod
    def fingerprint(run: Run) -> str:
        """Of what is asked for, so that a run goes on where the other one is gone, or has gone on."""
        return hashlib.sha256(json.dumps([run.init_from, run.init_from_step]).encode()).hexdigest()

    def load(self, shapes: Mapping[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
        """Returns the parameters that the other run has trained.

        Args:
          shapes: of all that trains in this run, with shardings.
          report: takes a line that says what comes from where.

        Raises:
          UserError: there is no such checkpoint, it was trained on other foundation models or tokenizers, or
            holds a parameter that does not train here or has another shape.
        """
        if self._directory == self._run.path(self._run.model_dir):
            raise UserError(f"run.Run.init_from is {self._run.init_from!r}, this run, expected another one")
        loop = self._run.loop
        with contextlib.closing(
            RunCheckpoints(
                self._directory / "checkpoints",
                best_metric=loop.best_metric,
                best_mode=loop.best_mode,
                read_only=True,
            )
        ) as checkpoints:
            step = self._step(checkpoints)
            where = f"run.Run.init_from: checkpoint {checkpoints.directory / str(step)}"
            record = checkpoints.read_record(step)
            self._check_fingerprints(record["provenance"]["fingerprints"], where)
            places = flatten(shapes)
            saved = {
                name.removeprefix("params/") for name in record["parameters"] if name.startswith("params/")
            }
            for name in sorted(saved - places.keys()):
                if name in self._frozen:
                    raise UserError(
                        f"{where} has trained {name}, which is frozen in this run; expected that it "
                        "trains, or a foundation model that run.Run.save_foundations of that run saves"
                    )
            kept = {name: place for name, place in places.items() if name in saved}
            params = checkpoints.restore_params(unflatten(kept), step=step)
        new = _by_part(places.keys() - saved)
        told = f"{where}: {_by_part(kept)} go on from it"
        report(f"{told}, {new} do not" if new else told)
        return params

    def _step(self, checkpoints: RunCheckpoints) -> int:
        asked, metric = self._run.init_from_step, self._run.loop.best_metric
        if isinstance(asked, int):
            # Whether it is there, `restore_params` would tell too late.
            steps = checkpoints.all_steps()
            if asked not in steps:
                found = ", ".join(map(str, steps)) or "none"
                raise UserError(
                    f"run.Run.init_from_step is {asked}, and {checkpoints.directory} has {found}; expected "
                    "one of these"
                )
            return asked
        if asked == "best" and metric is None:
            raise UserError(
                "run.Run.init_from_step is 'best', expected loop.LoopConfig.best_metric, which says by what"
            )
        step = checkpoints.best_step() if asked == "best" else checkpoints.latest_step()
        if step is None:
            what = f"that was scored by {metric}" if asked == "best" else "yet"
            raise UserError(f"run.Run.init_from: {checkpoints.directory} has no checkpoint {what}")
        return step

    def _check_fingerprints(self, saved: Mapping[str, str], where: str) -> None:
        saved = {
            name: value for name, value in saved.items() if name.startswith(("foundation/", "tokenizer/"))
        }
        for name in sorted(saved.keys() | self._fingerprints.keys()):
            before, now = saved.get(name), self._fingerprints.get(name)
            if before != now:
                raise UserError(
                    f"{where} was made with another {name}: it has fingerprint {before or 'none'}, this run "
                    f"has {now or 'none'}, expected the same"
                )


def _by_part(names: Iterable[str]) -> str:
    """Such as `14 parameters of adapter and 4 of llm`."""
    counts = sorted(Counter(name.split("/")[0] for name in names).items())
    return " and ".join(
        f"{count}{' parameters' * (number == 0)} of {part}" for number, (part, count) in enumerate(counts)
    )
