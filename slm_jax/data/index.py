"""Index tables: what the planner reads of a task, built once and memory-mapped.

A task's SeqIO pipeline runs over its references, never over audio; what comes out is filtered by rule
and written to an Arrow IPC file, named by the hash of everything it was made from.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import seqio

from slm_jax.data import preprocessors, sources
from slm_jax.data.batch import check_feature_lengths
from slm_jax.data.host_tensorflow import Tensor, tf
from slm_jax.data.references import SPEECH, Reference, audio_path
from slm_jax.errors import UserError, nearest

logger = logging.getLogger(__name__)

# References that pass through TensorFlow, and lie in the file, at a time.
_CHUNK = 16_384

_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "audio": pa.string(),
        "samples": pa.int32(),
        "inputs": pa.large_list(pa.int32()),
        "targets": pa.large_list(pa.int32()),
        "task": pa.string(),
        "language": pa.string(),
        "said_first": pa.int32(),
        "said_tokens": pa.int32(),
        "part": pa.string(),
    }
)


@dataclass(frozen=True)
class IndexReport:
    """What became of a task's references.

    Attributes:
      kept: how many are in the table.
      rejected: reason -> how many are not.
      examples: reason -> ids of the first of them.
    """

    kept: int
    rejected: dict[str, int]
    examples: dict[str, list[str]]

    def __str__(self) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self.rejected.items()))
        return f"{self.kept} references" + (f"; rejected: {counts}" if counts else "")


class IndexTable:
    """References of one task and split, memory-mapped.

    Args:
      path: of the Arrow file that `build_index` wrote.
      audio_root: folder that its audio paths are relative to.

    Attributes:
      task: name of the SeqIO task.
      split: its split.
      fingerprint: SHA-256 of the table's contents.
      report: what was kept and what was rejected.
    """

    def __init__(self, path: Path, audio_root: str = ""):
        # Chunks stay views of the mapped file; the mapping lives as long as they do.
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        metadata = json.loads(self._table.schema.metadata[b"slm_jax"])
        summary = json.loads(path.with_suffix(".json").read_text())
        if summary["kept"] != len(self._table):
            raise ValueError(f"{path} holds {len(self._table)} references, its report says {summary['kept']}")
        self._audio_root = audio_root
        self.task: str = metadata["task"]
        self.split: str = metadata["split"]
        self.fingerprint: str = summary.pop("fingerprint")
        self.report = IndexReport(**summary)

    def __len__(self) -> int:
        return len(self._table)

    @functools.cached_property
    def samples(self) -> np.ndarray:
        """Samples of each reference, int32 [n]."""
        return self._table["samples"].to_numpy()

    @functools.cached_property
    def input_lengths(self) -> np.ndarray:
        """Entries of each reference's `inputs`, the speech marker included, int64 [n]."""
        return _list_lengths(self._table["inputs"])

    @functools.cached_property
    def target_lengths(self) -> np.ndarray:
        """Target tokens of each reference, int64 [n]."""
        return _list_lengths(self._table["targets"])

    def reference(self, index: int) -> Reference:
        """Returns one reference."""
        return self.take(np.array([index]))[0]

    def references(self) -> Iterator[Reference]:
        """Yields all references in the order of the source."""
        for start in range(0, len(self), _CHUNK):
            yield from self.take(np.arange(start, min(start + _CHUNK, len(self))))

    def take(self, indices: np.ndarray) -> list[Reference]:
        """Returns the references at `indices`, int64 [n], in their order."""
        chosen = self._table.take(pa.array(indices)).combine_chunks()
        columns = {name: chosen[name] for name in chosen.column_names}
        root = self._audio_root
        audio = [None if path is None else audio_path(root, path) for path in columns["audio"].to_pylist()]
        return [
            Reference(*fields)
            for fields in zip(
                columns["id"].to_pylist(),
                audio,
                columns["samples"].to_pylist(),
                _list_arrays(columns["inputs"]),
                _list_arrays(columns["targets"]),
                [self.task] * len(indices),
                columns["language"].to_pylist(),
                zip(columns["said_first"].to_pylist(), columns["said_tokens"].to_pylist(), strict=True),
                columns["part"].to_pylist(),
                strict=True,
            )
        ]


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)


def _list_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy().tolist()
        values = chunk.values.to_numpy()
        arrays += [values[start:stop] for start, stop in itertools.pairwise(offsets)]
    return arrays


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
    limits = dict(sorted(feature_lengths.items())) | {"samples_per_position": samples_per_position}
    key = _content_key(task, split, limits, seed)
    path = Path(cache_dir) / f"{task.name.replace(':', '_')}-{split}-{key[:24]}.arrow"
    table = _open_cached(path, root)
    if table is None:
        _build(task, split, limits, path, seed)
        table = IndexTable(path, root)
    logger.info("index of task %s, split %s: %s", task.name, split, table.report)
    if not len(table):
        raise UserError(f"task {task.name!r}, split {split!r} yields nothing: {table.report}")
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
        logger.warning("index file %s is damaged (%s) and is built again", path, error)
        return None


# --- what an index is made from --------------------------------------------------------------------


def _content_key(task: seqio.Task, split: str, limits: Mapping[str, int], seed: int) -> str:
    source = task.source
    described = getattr(source, "content_fingerprint", None)
    parts = {
        "source": described(split) if described else _describe(source),
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
    sources_of = sorted(Path(str(sources.__file__)).parent.glob("*.py"))
    files = [preprocessors.__file__, __file__, *sources_of]
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()


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
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    bound = [cell if isinstance(cell, (str, int, float, tuple)) else repr(cell) for cell in cells]
    return ["function", function.__module__, function.__qualname__, text, _describe(bound)]


def vocabulary_fingerprint(vocabulary: seqio.SentencePieceVocabulary) -> str:
    """Returns the SHA-256 of a sentencepiece model; raises UserError where it cannot be read."""
    path = vocabulary.sentencepiece_model_file
    try:
        # Through gfile: published vocabularies lie in buckets.
        with tf.io.gfile.GFile(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except tf.errors.OpError as error:
        raise UserError(f"vocabulary {path} cannot be read: {error.message}") from None


# --- building --------------------------------------------------------------------------------------


def _build(task: seqio.Task, split: str, limits: Mapping[str, int], path: Path, seed: int) -> None:
    metadata = {b"slm_jax": json.dumps({"task": task.name, "split": split}).encode()}
    schema = _SCHEMA.with_metadata(metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as temporary:
            with temporary.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
                summary = _write_table(task, split, limits, seed, writer, schema)
            # The table comes last, and at once: a reader finds it with its report, or not at all.
            with _replacing(path.with_suffix(".json")) as report:
                report.write_text(json.dumps(summary))
    except OSError as error:
        raise UserError(f"index folder {path.parent} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` that takes its place at the end, or is removed where something fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_table(
    task: seqio.Task,
    split: str,
    limits: Mapping[str, int],
    seed: int,
    writer: Any,
    schema: pa.Schema,
) -> dict[str, Any]:
    """Writes what passes the rules and returns the report."""
    digest = hashlib.sha256()
    kept, rejected, examples = 0, Counter(), {}
    seen: set[str] = set()
    for columns in _chunks(task, split, seed):
        _check_ids(columns["id"], seen, task.name, split)
        reasons = _reject_reasons(columns, limits)
        for id_, reason in zip(columns["id"], reasons, strict=True):
            if reason:
                rejected[reason] += 1
                if len(first := examples.setdefault(reason, [])) < 100:
                    first.append(id_)
                logger.info("task %s, split %s: example %s is rejected: %s", task.name, split, id_, reason)
        batch = _record_batch(columns, reasons == "", task.name, schema)
        _update_digest(digest, batch)
        writer.write_batch(batch)
        kept += len(batch)
    return {"kept": kept, "rejected": dict(rejected), "examples": examples, "fingerprint": digest.hexdigest()}


def _chunks(task: seqio.Task, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yields columns of references; `inputs` and `targets` as pairs (values, offsets)."""
    # Without lengths SeqIO cuts nothing; what is too long is rejected by name instead.
    dataset = task.get_dataset(
        sequence_length=None, split=split, shuffle=False, seed=seed, try_in_mem_cache=False
    )
    wanted = ("id", "audio", "part", "samples", "language", "reject", "inputs", "inputs_speech", "targets")
    position = 0

    def select(example: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen = {name: example[name] for name in wanted if name in example}
        return chosen | {name: tf.cast(chosen[name], tf.int32) for name in ("inputs", "targets")}

    for chunk in dataset.map(select).ragged_batch(_CHUNK):
        count = int(chunk["inputs"].nrows())
        columns: dict[str, Any] = {}
        for name in {"inputs", "inputs_speech", "targets"} & chunk.keys():
            ragged = chunk[name]
            columns[name] = (ragged.values.numpy(), ragged.row_splits.numpy())
        for name in ("id", "audio", "part", "language", "reject"):
            values = chunk[name].numpy() if name in chunk else np.full(count, b"", object)
            columns[name] = np.array([value.decode() for value in values], object)
        if "id" not in chunk:
            columns["id"] = np.array([str(position + i) for i in range(count)], object)
        columns["samples"] = chunk["samples"].numpy() if "samples" in chunk else np.zeros(count, np.int32)
        yield columns
        position += count


def _check_ids(ids: Sequence[str], seen: set[str], task: str, split: str) -> None:
    for id_ in ids:
        if id_ in seen:
            raise UserError(f"task {task!r}, split {split!r}: id {id_!r} stands for more than one example")
        seen.add(id_)


def _reject_reasons(columns: Mapping[str, Any], limits: Mapping[str, int]) -> np.ndarray:
    """Returns the reason code of each reference, empty where it is kept."""
    values, offsets = columns["inputs"]
    markers = _sum_per_row(values == SPEECH, offsets)
    tokens = np.diff(offsets) - markers
    targets = np.diff(columns["targets"][1])
    spoken = markers > 0
    samples = np.where(spoken, columns["samples"], 0)
    has_path = np.array([bool(path) for path in columns["audio"]], bool)
    positions = -(-samples // limits["samples_per_position"])
    reasons = np.array(columns["reject"], object)
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


def _sum_per_row(flags: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return total[offsets[1:]] - total[offsets[:-1]]


def _record_batch(
    columns: Mapping[str, Any], keep: np.ndarray, task: str, schema: pa.Schema
) -> pa.RecordBatch:
    values, offsets = columns["inputs"]
    spoken = _sum_per_row(values == SPEECH, offsets) > 0
    # A prompt without a place for speech is text alone, whatever the manifest holds beside it.
    audio = [path if is_spoken else None for path, is_spoken in zip(columns["audio"], spoken, strict=True)]
    part = [name if is_spoken else "" for name, is_spoken in zip(columns["part"], spoken, strict=True)]
    lists = {
        name: pa.LargeListArray.from_arrays(columns[name][1], columns[name][0])
        for name in ("inputs", "targets")
    }
    arrays = [
        pa.array(columns["id"], pa.string()),
        pa.array(audio, pa.string()),
        pa.array(np.where(spoken, columns["samples"], 0).astype(np.int32)),
        lists["inputs"],
        lists["targets"],
        pa.array([task] * len(keep), pa.string()),
        pa.array(columns["language"], pa.string()),
        *_said_columns(columns, spoken),
        pa.array(part, pa.string()),
    ]
    return pa.record_batch(arrays, schema=schema).filter(pa.array(keep))


def _said_columns(columns: Mapping[str, Any], spoken: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """First and count of the input tokens that stand in place of speech; zeros where there is speech."""
    if "inputs_speech" not in columns:
        nothing = np.zeros(len(spoken), np.int32)
        return pa.array(nothing), pa.array(nothing)
    flags, offsets = columns["inputs_speech"]
    tokens = np.where(spoken, 0, _sum_per_row(flags, offsets)).astype(np.int32)
    places = np.flatnonzero(flags)
    # The first flag at or after the start of its row; one past the last row's flags is never used.
    found = np.append(places, 0)[np.searchsorted(places, offsets[:-1])]
    first = np.where(tokens > 0, found - offsets[:-1], 0).astype(np.int32)
    return pa.array(first), pa.array(tokens)


def _update_digest(digest: Any, batch: pa.RecordBatch) -> None:
    # Lengths separate the values of a column, so that no two tables run into the same bytes.
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_large_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False)
            lengths = np.diff(column.offsets.to_numpy())
            parts = [lengths.tobytes(), values.tobytes()]
        elif pa.types.is_string(column.type):
            parts = [json.dumps(column.to_pylist()).encode()]
        else:
            parts = [column.to_numpy(zero_copy_only=False).tobytes()]
        for part in (name.encode(), *parts):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
