"""What a fresh run begins with besides foundation models: what another run has trained."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax import storage
from slm_jax.checkpoints.broadcast import decided
from slm_jax.checkpoints.foundation import read_foundation
from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.parameters import (
    ParameterTable,
    check_parameters,
    parameter_table,
    table_from_json,
)
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.cli.run import Run
from slm_jax.errors import UserError
from slm_jax.training.carried import carried_slots
from slm_jax.training.initialisation import RunShapes

# In the run's directory: which checkpoint it began with.
STARTING_POINT_FILE = "starting_point.json"
_OPTIMIZER = "opt_state/"


class StartingPoint:
    """The checkpoint that `run.Run.init_from` names.

    Args:
      run: the run that begins, with `init_from`.
      fingerprints: of its foundation models and tokenizers, by name.
      shapes: of its variables, with shardings.
    """

    def __init__(self, run: Run, fingerprints: Mapping[str, str], shapes: RunShapes):
        assert run.init_from is not None
        self._run = run
        self._fingerprints = dict(fingerprints)
        self._shapes = shapes
        self._directory: Path = run.path(run.init_from)
        self._found: int | None = None

    @staticmethod
    def fingerprint(run: Run) -> str:
        """Of what is asked for, so that a run goes on where the other one is gone, or has gone on."""
        return hashlib.sha256(json.dumps([run.init_from, run.init_from_step]).encode()).hexdigest()

    def load(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Returns the parameters that the other run has trained.

        Args:
          report: takes a line that says what comes from where.

        Raises:
          UserError: there is no such checkpoint, it was trained on other foundation models or tokenizers, or
            by another optimizer, of which state is wanted, or holds a parameter that does not train here or
            has another shape.
        """
        if self._directory == self._run.path(self._run.model_dir):
            raise UserError(f"run.Run.init_from is {self._run.init_from!r}, this run, expected another one")
        with self._open() as (checkpoints, step):
            where = f"run.Run.init_from: checkpoint {checkpoints.directory / str(step)}"
            record = checkpoints.read_record(step)
            self._check_fingerprints(record["provenance"], where)
            places, frozen = flatten(self._shapes.state.params), flatten(self._shapes.frozen)
            saved = self._trained_there(record)
            for name in sorted(saved.keys() - places.keys()):
                if name in frozen:
                    raise UserError(
                        f"{where} has trained {name}, which is frozen in this run; expected that it "
                        "trains, or the foundation model that run.Run.save_foundations of that run has saved"
                    )
            kept = {name: place for name, place in places.items() if name in saved}
            if not kept:
                raise UserError(f"{where} has trained nothing that trains in this run, expected some of it")
            check_parameters(saved, parameter_table(unflatten(kept)), where, check_dtype=False)
            if self._run.carries_optimizer and self._slots(record) is None:
                raise UserError(
                    f"{where} has optimizer state of another form than {type(self._run.optimizer).__name__} "
                    "has for what goes on; expected the optimizer of that run, or "
                    "run.Run.init_optimizer = 'fresh'"
                )
            arrays = checkpoints.restore_arrays(
                {f"params/{name}": place for name, place in kept.items()}, step
            )
            params = unflatten({name.removeprefix("params/"): array for name, array in arrays.items()})
        new = _by_part(places.keys() - saved.keys())
        told = f"{where}: {_by_part(kept)} go on from it"
        if self._run.carries_optimizer:
            told += " with their optimizer state"
        report(f"{told}, {new} do not" if new else told)
        return params

    def load_slots(self, opt_state: Any) -> dict[str, jax.Array]:
        """Returns the optimizer state of what goes on, by name in this run's; after `load`.

        Args:
          opt_state: shapes of the optimizer's state, with shardings.
        """
        places = flatten(opt_state)
        with self._open() as (checkpoints, step):
            slots = self._slots(checkpoints.read_record(step))
            assert slots is not None
            wanted = {saved: places[name] for name, saved in slots.items()}
            arrays = checkpoints.restore_arrays(
                {f"{_OPTIMIZER}{name}": place for name, place in wanted.items()}, step
            )
        # One count may become that of many parameters; the state is donated, so each is an array of its own.
        return {name: jnp.copy(arrays[f"{_OPTIMIZER}{saved}"]) for name, saved in slots.items()}

    def _slots(self, record: Mapping[str, Any]) -> dict[str, str] | None:
        saved = {name: shape for name, (shape, _) in _below(_OPTIMIZER, record).items()}
        going_on = self._trained_there(record).keys() & flatten(self._shapes.state.params).keys()
        return carried_slots(self._shapes.state.opt_state, saved, going_on)

    def _trained_there(self, record: Mapping[str, Any]) -> ParameterTable:
        """What the other run has trained, but for what this one has from it as a foundation model."""
        made = [f"{'/'.join(path)}/" for path in self._made_by(record["provenance"]).values()]
        trained = _below("params/", record)
        return {name: entry for name, entry in trained.items() if not name.startswith(tuple(made))}

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[RunCheckpoints, int]]:
        loop = self._run.loop
        with contextlib.closing(
            RunCheckpoints(
                self._directory / "checkpoints",
                best_metric=loop.best_metric,
                best_mode=loop.best_mode,
                read_only=True,
            )
        ) as checkpoints:
            if self._found is None:
                # Once, and by one process: the other run may go on meanwhile.
                self._found = int(decided(lambda: str(self._recorded_step(checkpoints))))
            yield checkpoints, self._found

    def _recorded_step(self, checkpoints: RunCheckpoints) -> int:
        """The step to begin with; the same for a run that was killed before its first checkpoint."""
        asked = StartingPoint.fingerprint(self._run)
        path = self._run.path(self._run.model_dir) / STARTING_POINT_FILE
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            found = json.loads(storage.read(path))
            if found["asked"] == asked and found["step"] in checkpoints.all_steps():
                return found["step"]
        step = self._step(checkpoints)
        if storage.is_remote(path) or path.parent.is_dir():
            told = {"run": str(self._directory), "step": step, "asked": asked}
            try:
                storage.write(path, json.dumps(told, indent=1) + "\n")
            except OSError as error:
                raise storage.failed(f"cannot write {path}", error, path) from error
        return step

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

    def _made_by(self, provenance: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """Frozen parts whose foundation models the other run has saved, with their places."""
        frozen, parts = flatten(self._shapes.frozen), self._run.objective.parts
        # A foundation model has no plan of rows.
        fingerprints = {name: value for name, value in provenance["fingerprints"].items() if name != "plan"}
        provenance = {**provenance, "fingerprints": fingerprints}
        made = {}
        for part, directory in self._run.foundations.items():
            path = parts[part].path
            if not any(name.startswith(f"{'/'.join(path)}/") for name in frozen):
                continue
            if read_foundation(self._run.path(directory)).provenance == provenance:
                made[part] = path
        return made

    def _check_fingerprints(self, provenance: Mapping[str, Any], where: str) -> None:
        saved = {
            name: value
            for name, value in provenance["fingerprints"].items()
            if name.startswith(("foundation/", "tokenizer/"))
        }
        made = {f"foundation/{part}" for part in self._made_by(provenance)}
        for name in sorted((saved.keys() | self._fingerprints.keys()) - made):
            before, now = saved.get(name), self._fingerprints.get(name)
            if before != now:
                raise UserError(
                    f"{where} was made with another {name}: it has fingerprint {before or 'none'}, this run "
                    f"has {now or 'none'}, expected the same"
                )


def _below(prefix: str, record: Mapping[str, Any]) -> ParameterTable:
    """Those of a record's arrays whose names begin so, by the rest of their names."""
    table = table_from_json(record["parameters"])
    return {name.removeprefix(prefix): entry for name, entry in table.items() if name.startswith(prefix)}


def _by_part(names: Iterable[str]) -> str:
    """Such as `14 parameters of adapter and 4 of llm`."""
    counts = sorted(Counter(name.split("/")[0] for name in names).items())
    return " and ".join(
        f"{count}{' parameters' * (number == 0)} of {part}" for number, (part, count) in enumerate(counts)
    )
