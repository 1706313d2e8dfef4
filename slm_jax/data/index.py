"""Index tables: what the planner reads of a task, built once and memory-mapped.

A task's preprocessors run over its references, never over audio; what comes out is filtered by rule and
written to a folder (`index_table`), named by the hash of everything it was made from.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import seqio

from slm_jax import storage
from slm_jax.data import leftovers
from slm_jax.data.batch import check_feature_lengths
from slm_jax.data.columns import Chunk, Pipeline, Ragged
from slm_jax.data.duplicate_ids import find_duplicate, hashes_of
from slm_jax.data.host_tensorflow import Tensor, tf
from slm_jax.data.index_table import IndexTable, TableWriter, count_markers
from slm_jax.data.sources.base import CHUNK
from slm_jax.errors import RemoteError, UserError, nearest

logger = logging.getLogger(__name__)

# Seconds between lines of progress.
_REPORT_SECONDS = 10.0


# What is usually amiss where all references of a task are rejected.
_HINTS = {
    "empty_target": "no target has text: do the source's fields have the names that the task reads?",
    "non_positive_duration": "no length is known: do the files of audio lie where the references say, and is "
    "`duration` in seconds?",
    "speech_too_long": "TASK_FEATURE_LENGTHS['speech'] counts samples at 16 kHz, and `duration` seconds",
}


def build_index(
    task_or_name: seqio.Task | str,
    split: str,
    feature_lengths: Mapping[str, int],
    cache_dir: str | Path,
    *,
    samples_per_position: int = 1,
    seed: int = 0,
) -> IndexTable:
    """Returns the index table of a task, from the cache where its contents are the same.

    A source says by its fingerprint, its files or its function what it holds. One that says nothing of that
    is read again every time.

    A reference is left out, counted in the report and logged with its id, for the first of these
    reasons that holds: what the task itself says in its feature `reject` (such as `unknown_language`),
    `several_speech_markers`, `missing_audio` (a marker without a path), `non_positive_duration`,
    `speech_too_long`, `inputs_too_long`, `layout_too_long`, `empty_target`, `targets_too_long`.

    Args:
      task_or_name: a SeqIO task, or the name of a registered one.
      split: of the task.
      feature_lengths: most samples (`speech`), tokens (`inputs`, `targets`) and, where given, positions
        (`layout`) of a row.
      cache_dir: folder of index files; made where it does not exist.
      samples_per_position: samples behind one speech position; counts for `layout` alone.
      seed: of preprocessors that draw random numbers.

    Raises:
      UserError: unknown task or split, a bad manifest or vocabulary, duplicate ids, or nothing is left.
    """
    check_feature_lengths(feature_lengths)
    task = find_task(task_or_name)
    if split not in task.splits:
        raise UserError(f"task {task.name!r} has no split {split!r}{nearest(split, task.splits)}")
    root = getattr(task.source, "audio_root", lambda split: "")(split)
    limits = dict(sorted(feature_lengths.items()))
    if "layout" in limits:
        limits["samples_per_position"] = samples_per_position
    name = f"{task.name.replace(':', '_')}-{split}"
    if (content := _describe_source(task.source, split)) is None:
        table = _build_for_once(task, split, limits, Path(cache_dir) / f"{name}.index", seed, root)
    else:
        key = _content_key(task, split, content, limits, seed)
        path = Path(cache_dir) / f"{name}-{key[:24]}.index"
        table = _open_cached(path, root)
        if table is None:
            _build(task, split, limits, path, seed)
            table = IndexTable(path, root)
    logger.info("index of task %s, split %s: %s", task.name, split, table.report)
    if not len(table):
        hints = [_HINTS[reason] for reason in sorted(table.report.rejected) if reason in _HINTS]
        raise UserError(
            "; ".join([f"task {task.name!r}, split {split!r} yields nothing: {table.report}", *hints])
        )
    return table


def find_task(task_or_name: seqio.Task | str) -> seqio.Task:
    """Returns a task by its name; raises UserError with the nearest name where it is unknown."""
    if not isinstance(task_or_name, str):
        return task_or_name
    names = seqio.TaskRegistry.names()
    if task_or_name not in names:
        raise UserError(f"unknown task {task_or_name!r}{nearest(task_or_name, names)}")
    return seqio.TaskRegistry.get(task_or_name)


def _open_cached(path: Path, root: str) -> IndexTable | None:
    if not path.exists():
        return None
    try:
        return IndexTable(path, root)
    except (OSError, ValueError, KeyError, TypeError) as error:
        # A machine that lost power may have left a file without its last blocks.
        logger.warning("index %s is damaged (%s) and is built again", path, error)
        return None


# --- what an index is made from --------------------------------------------------------------------


def _content_key(task: seqio.Task, split: str, content: Any, limits: Mapping[str, int], seed: int) -> str:
    parts = {
        "source": content,
        "task": task.name,
        "split": split,
        "vocabularies": {name: _describe(f.vocabulary) for name, f in task.output_features.items()},
        "preprocessors": [_describe(step) for step in task.preprocessors],
        "limits": dict(limits),
        "seed": seed,
        "code": _code_fingerprint(),
        "versions": [tf.__version__, pa.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code_fingerprint() -> str:
    folder = Path(__file__).parent
    files = [folder / f"{name}.py" for name in _MODULES]
    files += sorted((folder / "sources").rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# What a table's contents depend on, besides sources.
_MODULES = (
    "biasing", "columns", "columnwise", "continuation", "index", "index_table", "labels", "order", "parts",
    "preprocessors", "prompt_languages", "references", "same_language", "shards", "tfds_examples",
)  # fmt: skip


def _describe_source(source: Any, split: str) -> Any:
    """Returns JSON that changes with what a source holds; None where the source says nothing of that."""
    if fingerprint := getattr(source, "content_fingerprint", None):
        return fingerprint(split)
    if isinstance(source, seqio.FunctionDataSource):
        return _describe_whole(source._dataset_fn)
    reader = getattr(source, "_reader", None)
    try:
        files = [(path, *storage.stat(path)) for path in source.list_shards(split)]
    except RemoteError:
        raise
    except OSError:
        # Its shards are no files.
        return None
    return [_describe(source), reader and _text_of(reader), sorted(files)] if files else None


def _describe_whole(function: Any) -> Any:
    """Returns a description of a function with all that it is bound to; None where that cannot be had."""
    if isinstance(function, functools.partial):
        inner, bound = _describe_whole(function.func), [function.args, function.keywords]
    else:
        inner, bound = _text_of(function), [cell.cell_contents for cell in _cells(function)]
    try:
        # What JSON does not hold may look the same with other contents: a long array, an object.
        return inner and [inner, json.dumps(bound, sort_keys=True)]
    except (TypeError, ValueError):
        return None


def _text_of(function: Any) -> Any:
    """Returns the name and source text of a function or class; None where it has none."""
    try:
        return [function.__module__, function.__qualname__, inspect.getsource(function)]
    except (AttributeError, OSError, TypeError):
        return None


def _cells(function: Callable[..., Any]) -> Sequence[Any]:
    return getattr(function, "__closure__", None) or ()


def _describe(value: object) -> Any:
    """Returns JSON that is equal for equal definitions; a function counts by its source text."""
    if isinstance(value, seqio.SentencePieceVocabulary):
        return ["sentencepiece", vocabulary_fingerprint(value), value.extra_ids]
    if isinstance(value, functools.partial):
        return ["partial", _describe(value.func), _describe(value.args), _describe(value.keywords)]
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return _describe_function(value)
    return f"{type(value).__qualname__}:{value!r}"


def _describe_function(function: Callable[..., Any]) -> Any:
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = ""
    cells = [cell.cell_contents for cell in _cells(function)]
    bound = [cell if isinstance(cell, (str, int, float, tuple)) else repr(cell) for cell in cells]
    return ["function", function.__module__, function.__qualname__, text, _describe(bound)]


def vocabulary_fingerprint(vocabulary: seqio.SentencePieceVocabulary) -> str:
    """Returns the SHA-256 of a sentencepiece model; raises UserError where it cannot be read."""
    path = vocabulary.sentencepiece_model_file

    def read() -> bytes:
        # Through gfile, as SeqIO reads it: published vocabularies lie in buckets.
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()

    try:
        content = storage.retrying(f"read {path}", read) if storage.is_remote(path) else read()
    except RemoteError:
        raise
    except (OSError, tf.errors.OpError) as error:
        said = getattr(error, "message", None) or error
        raise UserError(f"vocabulary {path} cannot be read: {said}") from None
    return hashlib.sha256(content).hexdigest()


# --- building --------------------------------------------------------------------------------------


def _build(task: seqio.Task, split: str, limits: Mapping[str, int], path: Path, seed: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        leftovers.clear(path.parent)
        with _replacing(path) as folder, TableWriter(folder, task.name, split) as writer:
            _fill(writer, task, split, limits, seed)
    except RemoteError:
        raise
    except OSError as error:
        raise UserError(f"index folder {path.parent} cannot be written: {error.strerror or error}") from None


def _build_for_once(
    task: seqio.Task, split: str, limits: Mapping[str, int], path: Path, seed: int, root: str
) -> IndexTable:
    """Builds a table that nobody else opens: its files go as soon as it is mapped, and live while it does."""
    own = leftovers.unfinished(path)
    try:
        _build(task, split, limits, own, seed)
        return IndexTable(own, root)
    finally:
        shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a folder beside `path` that comes to lie there, or is removed where something fails."""
    folder = leftovers.unfinished(path)
    folder.mkdir()
    try:
        yield folder
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        _rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename(folder: Path, path: Path) -> None:
    """Moves the folder of a table to a path, unless a whole one is there; a damaged one goes.

    A path says what is in its table, so that of several processes that build it the first one's serves all.
    It is never moved away again: another process may be about to open it.
    """
    while True:
        try:
            folder.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _open_cached(path, "") is not None:
            return
        aside = folder.with_name(f"{folder.name}.old")
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _fill(writer: TableWriter, task: seqio.Task, split: str, limits: Mapping[str, int], seed: int) -> None:
    hashes: list[np.ndarray] = []
    told = time.monotonic()
    count = 0
    for chunk in _chunks(task, split, seed):
        reasons = _reject_reasons(chunk, limits)
        for id_, reason in zip(chunk["id"], reasons, strict=True):
            if reason:
                logger.info("task %s, split %s: example %s is rejected: %s", task.name, split, id_, reason)
        writer.add(chunk, reasons)
        hashes.append(hashes_of(chunk["id"]))
        count += len(reasons)
        if time.monotonic() - told > _REPORT_SECONDS:
            told = time.monotonic()
            logger.info("task %s, split %s: %s references indexed", task.name, split, f"{count:,}")
    _check_ids(np.concatenate(hashes) if hashes else np.zeros(0, np.uint64), task, split, seed)
    writer.finish()


def _chunks(task: seqio.Task, split: str, seed: int) -> Iterator[Chunk]:
    """Yields what the preprocessors leave of the references, chunk by chunk, with the fields of the table."""
    if not Pipeline.fits(task):
        yield from _by_seqio(task, split, seed)
        return
    pipeline = Pipeline(task)
    for chunk in task.source.chunks(split):  # pyright: ignore[reportAttributeAccessIssue]
        yield _complete(pipeline(chunk))
    pipeline.check()


def _by_seqio(task: seqio.Task, split: str, seed: int) -> Iterator[Chunk]:
    # Without lengths SeqIO cuts nothing; what is too long is rejected by name instead.
    dataset = task.get_dataset(
        sequence_length=None, split=split, shuffle=False, seed=seed, try_in_mem_cache=False
    )
    wanted = ("id", "audio", "part", "samples", "language", "reject", "inputs", "inputs_speech", "targets")
    position = 0

    def select(example: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen = {name: example[name] for name in wanted if name in example}
        return chosen | {name: tf.cast(chosen[name], tf.int32) for name in ("inputs", "targets")}

    for found in dataset.map(select).ragged_batch(CHUNK):
        count = int(found["inputs"].nrows())
        chunk: Chunk = {}
        for name, values in found.items():
            if name in ("inputs", "inputs_speech", "targets"):
                chunk[name] = Ragged(values.values.numpy(), values.row_splits.numpy())
            elif name == "samples":
                chunk[name] = values.numpy()
            else:
                chunk[name] = np.array([value.decode() for value in values.numpy()], object)
        if "id" not in chunk:
            chunk["id"] = np.array([str(position + i) for i in range(count)], object)
        yield _complete(chunk)
        position += count


def _complete(chunk: Chunk) -> Chunk:
    """Returns a chunk with every field that the table has; those that no reference has are empty."""
    count = len(chunk["id"])
    empty = {name: np.full(count, "", object) for name in ("audio", "part", "language", "reject")}
    return empty | {"samples": np.zeros(count, np.int32)} | chunk


def _check_ids(hashes: np.ndarray, task: seqio.Task, split: str, seed: int) -> None:
    """Raises UserError where an id stands for two examples."""
    found = find_duplicate(hashes, (chunk["id"].tolist() for chunk in _chunks(task, split, seed)))
    if found:
        raise UserError(
            f"task {task.name!r}, split {split!r}: id {found.id!r} stands for two examples, references "
            f"{found.first} and {found.second} of {_where(task.source, split)}"
        )


def _where(source: Any, split: str) -> str:
    return ", ".join(source.list_shards(split)[:1])


def _reject_reasons(chunk: Chunk, limits: Mapping[str, int]) -> np.ndarray:
    """Returns the reason code of each reference, empty where it is kept."""
    markers = count_markers(chunk["inputs"])
    tokens = np.diff(chunk["inputs"].offsets) - markers
    targets = np.diff(chunk["targets"].offsets)
    spoken = markers > 0
    samples = np.where(spoken, chunk["samples"], 0)
    has_path = np.array([bool(path) for path in chunk["audio"]], bool)
    positions = -(-samples // limits.get("samples_per_position", 1))
    reasons = np.array(chunk["reject"], object)
    for reason, holds in (
        ("several_speech_markers", markers > 1),
        ("missing_audio", spoken & ~has_path),
        ("non_positive_duration", spoken & (samples <= 0)),
        ("speech_too_long", samples > limits.get("speech", 0)),
        ("inputs_too_long", tokens > limits["inputs"]),
        ("layout_too_long", positions + tokens > limits.get("layout", np.iinfo(np.int64).max)),
        ("empty_target", targets == 0),
        ("targets_too_long", targets > limits["targets"]),
    ):
        reasons[(reasons == "") & holds] = reason
    return reasons
