"""Independent jobs on Apache Beam: here, or where Flink, Spark or Dataflow runs them."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import re
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.errors import RemoteError, StorageError, UserError, check_whole, nearest

logger = logging.getLogger(__name__)

RUNNERS = ("DirectRunner", "FlinkRunner", "SparkRunner", "DataflowRunner", "PortableRunner")
# Beam's DirectRunner fetches the binary of another one, Prism, unless a pipeline may do what Prism cannot.
_WITHOUT_PRISM = {"allow_unsafe_triggers": True}


# How an error of another process begins that is a sentence, and what Beam adds to its end.
_SENTENCES = {f"{kind.__module__}.{kind.__name__}: ": kind for kind in (UserError, StorageError, RemoteError)}
_STEP = re.compile(r" \[while running '[^']*'\]$")


def check_runner(runner: str, workers: int | None, options: Mapping[str, Any]) -> None:
    """Raises UserError where Beam is missing, or a runner or an option of it is unknown.

    Args:
      runner: one of `RUNNERS`.
      workers: processes of DirectRunner; None where it was not asked for.
      options: of Beam's pipelines, by name.
    """
    if runner not in RUNNERS:
        raise UserError(f"--runner is {runner!r}{nearest(runner, RUNNERS)}")
    if workers is not None:
        check_whole("--workers", workers)
        if runner != "DirectRunner":
            raise UserError(f"--workers is of DirectRunner; give {runner} its options by --beam NAME=VALUE")
    _, PipelineOptions = _beam()
    known = PipelineOptions(flags=[]).get_all_options()
    for name in options:
        if name not in known:
            # There are too many to list.
            near = nearest(name, difflib.get_close_matches(name, known, n=1))
            raise UserError(f"--beam {name}: Beam has no such option{near}")
    said = io.StringIO()
    try:
        # Its values are parsed as flags of a command, which ends where one is wrong.
        with contextlib.redirect_stderr(said):
            PipelineOptions.from_dictionary(dict(options)).get_all_options()
    except SystemExit:
        raise UserError(f"--beam: {said.getvalue().strip().rpartition('error: ')[2]}") from None


def run_on_beam(
    function: Callable[[Any], object],
    jobs: Sequence[Any],
    *,
    runner: str = "DirectRunner",
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Applies a function to each of many independent jobs.

    Args:
      function: of a module, so that it can be found by its name.
      jobs: what it is applied to; each can be pickled.
      runner: one of `RUNNERS`.
      workers: processes of DirectRunner; with one, the jobs run in this process.
      options: of Beam's pipelines, by name.

    Raises:
      UserError: as `check_runner`, that of a job, or a job failed.
      RemoteError: that of a job.
    """
    check_runner(runner, workers, options or {})
    beam, PipelineOptions = _beam()
    chosen = {"runner": runner, **(options or {})}
    if runner == "DirectRunner":
        count = min(workers or 1, len(jobs))
        direct = {
            "direct_num_workers": count,
            "direct_running_mode": "multi_processing" if count > 1 else "in_memory",
            # What a job raises is told once, as a sentence.
            "default_sdk_harness_log_level": "CRITICAL",
            **_WITHOUT_PRISM,
        }
        chosen = {**direct, **chosen}
    try:
        with contextlib.ExitStack() as stack:
            step = beam.Map(function)
            if runner == "DirectRunner":
                step = beam.Map(_note_errors, function, stack.enter_context(_notes_folder()))
            stack.enter_context(_quiet())
            with beam.Pipeline(options=PipelineOptions.from_dictionary(chosen)) as pipeline:
                _ = pipeline | beam.Create(jobs) | beam.Reshuffle() | step
    except Exception as error:
        logger.info("the pipeline failed", exc_info=True)
        raise _told(error, runner) from error


def _note_errors(job: Any, function: Callable[[Any], object], folder: str) -> None:
    """Applies a function; notes what it raises in a folder of this machine, and then does nothing more.

    Workers of Beam print the tracebacks of what is raised in them, whatever is logged.
    """
    notes = Path(folder)
    if any(notes.iterdir()):
        return
    try:
        function(job)
    except Exception:
        (notes / uuid.uuid4().hex).write_text(traceback.format_exc(), "utf-8")


@contextlib.contextmanager
def _notes_folder() -> Iterator[str]:
    """Yields a folder for workers on this machine; raises RuntimeError with the first error noted there."""
    with tempfile.TemporaryDirectory(prefix="slm-jobs-") as folder:
        yield folder
        for path in Path(folder).iterdir():
            raise RuntimeError(path.read_text("utf-8"))


def _told(error: Exception, runner: str) -> Exception:
    """Returns what a failed pipeline says: what a job found wrong as the job says it."""
    said, kind = str(error).strip() or type(error).__name__, type(error)
    # Of another process there is text alone.
    if "Traceback" in said:
        said = said.splitlines()[-1]
        start = next((start for start in _SENTENCES if said.startswith(start)), "")
        said, kind = said.removeprefix(start), _SENTENCES.get(start, RuntimeError)
    if issubclass(kind, (UserError, RemoteError)):
        return kind(_STEP.sub("", said))
    return UserError(f"--runner {runner}: the pipeline failed: {said}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Beam from logging the errors that the pipeline raises, with their tracebacks."""
    beam = logging.getLogger("apache_beam")
    level = beam.level
    beam.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        beam.setLevel(level)


def _beam() -> tuple[Any, Any]:
    """Returns the module and its class of options; raises UserError where Beam is not installed."""
    # Beam logs what it found of Google's client libraries when it is imported.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import apache_beam
            from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("Apache Beam is not installed: pip install 'slm_jax[beam]'") from None
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam, PipelineOptions
