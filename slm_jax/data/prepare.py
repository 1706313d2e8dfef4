"""Any source of references becomes speech shards: which reference goes where, and what one shard takes.

The same source and options give the same bytes, whoever writes which shard and however often the writing was
broken off. Of N shards, shard k has the references k n // N to (k + 1) n // N - 1 of the source's n; where
they are shuffled, those whose id's BLAKE2b (64 bits, little endian) is k modulo N, so that each shard is a
sample of the source. Within a shard the order is the source's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from slm_jax import storage
from slm_jax.data import shards
from slm_jax.data.audio_files import REASONS, load_utterance
from slm_jax.data.duplicate_ids import find_duplicate, hashes_of
from slm_jax.data.references import SAMPLE_RATE, Reference, audio_path
from slm_jax.data.shards import Record, ShardEntry, SplitEntry
from slm_jax.errors import BadExample, RemoteError, UserError, check_whole, nearest

if TYPE_CHECKING:
    from slm_jax.data.sources import Columns, ReferenceSource

logger = logging.getLogger(__name__)

REJECTS_FILE = "rejects.jsonl"
# A shard has so much speech where the number of shards is not given: about 300 MB of FLAC.
_SHARD_SECONDS = 4 * 3600
# References that are held while they are shared out.
_HELD = 1 << 20
_ROWS = 1024
_NOTHING = np.zeros(0, np.int32)
_REPORT_SECONDS = 30.0
_FILE = rf".+-\d{{5}}-of-\d{{5}}\.(array_record|parquet)|{shards.SHARDS_FILE}|{REJECTS_FILE}"
_OURS = re.compile(rf"\.prepare-.+|{_FILE}")
# Of a command that was killed.
_UNFINISHED = re.compile(rf"\.({_FILE})\.[0-9a-f]{{32}}{shards.PARTIAL}")


class ShardJob(NamedTuple):
    """All that decides one shard.

    Attributes:
      directory: that it goes to.
      name: of its files.
      lists: Arrow files with its references, in their order.
      audio_root: folder that their audio paths are relative to.
      codec: one of `shards.CODECS`.
      made_from: of source and options, kept in its index.
    """

    directory: str
    name: str
    lists: tuple[str, ...]
    audio_root: str
    codec: str
    made_from: Mapping[str, Any]


RunJobs = Callable[[Callable[[ShardJob], None], Sequence[ShardJob]], None]


def prepare(
    source: ReferenceSource,
    split: str,
    directory: str | os.PathLike[str],
    run_jobs: RunJobs,
    *,
    count: int | None = None,
    codec: str = "flac",
    shuffle: bool = False,
    max_bad_share: float = 0.05,
    report: Callable[[str], None] = logger.info,
) -> SplitEntry:
    """Writes the references of a split with their audio as speech shards; goes on where it was broken off.

    A reference whose audio cannot be used, or that its source rejects so, is left out with one of the reasons
    of `audio_files` or `non_positive_duration`, and listed in `rejects.jsonl`.

    Args:
      source: of the references.
      split: of the source; the directory may hold others.
      directory: local or remote; made where it is not there.
      run_jobs: applies a function to each job, in any order and any process that sees these files.
      count: of shards; by default one for each four hours of speech.
      codec: one of `shards.CODECS`.
      shuffle: whether a reference's shard is drawn from its id.
      max_bad_share: most references that may be left out, as a share of all.
      report: takes lines of progress.

    Returns:
      What `shards.json` says of the split.

    Raises:
      UserError: the split's name is none of files, an id stands twice, the source is empty or changes
        meanwhile, the directory cannot be written, holds something else or was made from another source or by
        other options, or more is left out than `max_bad_share` allows.
    """
    if codec not in shards.CODECS:
        raise UserError(f"--format is {codec!r}{nearest(codec, shards.CODECS)}")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"--max_bad_share is {max_bad_share}, expected a share from 0 to 1")
    if "/" in split:
        raise UserError(f"split {split!r} is to name files of shards, expected a name without '/'")
    directory = storage.absolute(directory).rstrip("/")
    fingerprint = source.content_fingerprint(split)
    survey = _survey(source, split)
    count = survey.number_of_shards(count)
    made_from = {
        "source": fingerprint,
        "references": survey.references,
        "shards": count,
        "format": codec,
        "shuffle": shuffle,
    }
    with _naming_trouble(directory), _claimed(directory):
        described = _described(directory)
        _check_same(directory, split, made_from, described)
        names = [shards.shard_name(split, number, count) for number in range(count)]
        finished = _finished(directory, names)
        pending = [number for number, name in enumerate(names) if name not in finished]
        report(f"{directory}: {len(pending)} of {count} shards of split {split} are to be written")
        with _lists_folder(directory, split) as folder:
            lists = _share_out(source, split, made_from, pending, folder)
            root = source.audio_root(split)
            jobs = [
                ShardJob(directory, names[number], tuple(lists[number]), root, codec, made_from)
                for number in pending
            ]
            if jobs:
                with _progress(jobs, report):
                    run_jobs(write_shard, jobs)
        finished |= _finished(directory, [job.name for job in jobs])
        if missing := [name for name in names if name not in finished]:
            raise UserError(f"{directory}: shard {missing[0]} was not written; run the command again")
        return _complete(directory, split, [finished[name] for name in names], made_from, max_bad_share)


# ---- the source


class _Survey(NamedTuple):
    references: int
    samples: int

    def number_of_shards(self, asked: int | None) -> int:
        if asked is None:
            return min(self.references, max(1, -(-self.samples // (_SHARD_SECONDS * SAMPLE_RATE))))
        check_whole("--shards", asked)
        if asked > self.references:
            raise UserError(f"--shards is {asked}, and there are {self.references} references to share out")
        return asked


def _survey(source: ReferenceSource, split: str) -> _Survey:
    """Counts a split and sees that no id stands twice; raises UserError."""
    hashes, samples = [], 0
    for columns in source.chunks(split):
        hashes.append(hashes_of(columns["id"]))
        samples += int(columns["samples"].sum(dtype=np.int64))
    if not (count := sum(map(len, hashes))):
        raise UserError(f"split {split!r} of {_name(source, split)} has no references")
    _check_ids(source, split, np.concatenate(hashes))
    return _Survey(count, samples)


def _check_ids(source: ReferenceSource, split: str, hashes: np.ndarray) -> None:
    """Raises UserError where an id stands twice."""
    found = find_duplicate(hashes, (columns["id"] for columns in source.chunks(split)))
    if found:
        raise UserError(
            f"id {found.id!r} stands for two references, numbers {found.first} and {found.second} of split "
            f"{split!r} of {_name(source, split)}"
        )


def _name(source: ReferenceSource, split: str) -> str:
    return ", ".join(source.list_shards(split)[:1])


def _by_id(count: int) -> Callable[[int, Columns], np.ndarray]:
    return lambda start, columns: (hashes_of(columns["id"]) % np.uint64(count)).astype(np.int64)


def _by_position(references: int, count: int) -> Callable[[int, Columns], np.ndarray]:
    firsts = np.array([number * references // count for number in range(count)])
    return lambda start, columns: (
        np.searchsorted(firsts, start + np.arange(len(columns["id"])), side="right") - 1
    )


def _share_out(
    source: ReferenceSource, split: str, made_from: Mapping[str, Any], pending: Sequence[int], folder: str
) -> dict[int, list[str]]:
    """Writes the references of each pending shard to files of their own.

    Args:
      source: of the references.
      split: of it.
      made_from: as of `ShardJob`.
      pending: numbers of the shards to be written.
      folder: of the files.

    Returns:
      Number of a shard -> its files, in the order of the source.

    Raises:
      UserError: the source is another one than `made_from` says.
    """
    count = made_from["shards"]
    shard_of = _by_id(count) if made_from["shuffle"] else _by_position(made_from["references"], count)
    lists: dict[int, list[str]] = {number: [] for number in pending}
    held: dict[int, list[pa.Table]] = {}

    def put_down() -> None:
        for number, tables in held.items():
            path = f"{folder}/{number:05d}-{len(lists[number]):05d}.arrow"
            table = pa.concat_tables(tables, promote_options="default")
            with shards.put_in_place(path) as file, pa.ipc.new_file(str(file), table.schema) as writer:
                writer.write_table(table, max_chunksize=_ROWS)
            lists[number].append(path)
        held.clear()

    if not pending:
        return lists
    start = holding = 0
    for columns in source.chunks(split):
        numbers = shard_of(start, columns)
        start += len(numbers)
        (wanted,) = np.nonzero(np.isin(numbers, pending))
        wanted = wanted[np.argsort(numbers[wanted], kind="stable")]
        table = pa.table({name: pa.array(values) for name, values in columns.items()}).take(pa.array(wanted))
        found, firsts = np.unique(numbers[wanted], return_index=True)
        for number, first, stop in zip(found.tolist(), firsts, [*firsts[1:], len(wanted)], strict=True):
            held.setdefault(number, []).append(table.slice(first, stop - first))
        holding += len(wanted)
        if holding >= _HELD:
            put_down()
            holding = 0
    put_down()
    # Shards of two states of a source would have references twice, or lack some.
    if start != made_from["references"] or source.content_fingerprint(split) != made_from["source"]:
        raise UserError(
            f"split {split!r} of {_name(source, split)} changed while it was read ({made_from['references']} "
            f"references at first, {start} then), expected one that stays as it is; run the command again"
        )
    return lists


# ---- one shard


def write_shard(job: ShardJob) -> None:
    """Reads the audio of a shard's references and writes it, whole or not at all."""
    rejected: list[dict[str, str]] = []

    def records() -> Iterator[Record]:
        for path in job.lists:
            for row in _rows(path):
                try:
                    yield _record(row, job)
                except BadExample as bad:
                    rejected.append({"id": row["id"], "reason": bad.reason, "detail": bad.detail})

    shards.write_shard(
        job.directory, job.name, records(), lambda: {"made_from": job.made_from, "rejected": rejected}
    )


def _rows(path: str) -> Iterator[dict[str, Any]]:
    with storage.open_binary(path) as opened, pa.ipc.open_file(opened) as file:
        for number in range(file.num_record_batches):
            yield from file.get_batch(number).to_pylist()


def _record(row: Mapping[str, Any], job: ShardJob) -> Record:
    """Returns a reference with its speech; raises BadExample."""
    own = ("id", "audio", "part", "samples")
    fields = {name: text for name, text in row.items() if name not in own and text}
    # Other reasons are of tasks, and go with the reference.
    if (reason := row.get("reject")) in REASONS:
        raise BadExample(reason, f"the source says so of {row['id']}")
    if not row.get("audio"):
        return Record(row["id"], "text", 0, fields)
    if row["samples"] <= 0:
        raise BadExample("non_positive_duration", f"{row['audio']} has a duration that is no positive number")
    reference = Reference(
        id=row["id"],
        audio=audio_path(job.audio_root, row["audio"]),
        samples=row["samples"],
        inputs=_NOTHING,
        targets=_NOTHING,
        task="",
        language="",
        part=row.get("part") or "",
    )
    samples = load_utterance(reference).samples
    data = shards.encode_speech(samples, job.codec)
    return Record(row["id"], "audio", len(samples), fields, data, job.codec)


# ---- the directory


def _names(directory: str) -> list[str]:
    """Names in the directory; a bucket has none before something lies in it."""
    try:
        return storage.list_folder(directory)
    except FileNotFoundError:
        return []


class _Finished(NamedTuple):
    entry: ShardEntry
    rejected: list[dict[str, str]]


def _finished(directory: str, names: Sequence[str]) -> dict[str, _Finished]:
    """Returns those shards that are whole, with their indices."""
    there = set(_names(directory))
    found: dict[str, _Finished] = {}
    for name in names:
        if f"{name}.parquet" in there:
            with contextlib.suppress(UserError):
                index = shards.read_index(directory, name)
                found[name] = _Finished(index.entry(name), index.about["rejected"])
    return found


def _described(directory: str) -> dict[str, SplitEntry]:
    """Returns the splits that are complete; raises UserError where the directory holds something else."""
    there = _names(directory)
    if shards.SHARDS_FILE in there:
        return shards.read_description(directory)
    strangers = [name for name in there if not _OURS.fullmatch(name)]
    if strangers:
        raise UserError(
            f"--to {directory} holds {strangers[0]!r}, expected an empty directory or one of speech shards"
        )
    return {}


def _check_same(
    directory: str, split: str, made_from: Mapping[str, Any], described: Mapping[str, SplitEntry]
) -> None:
    """Raises UserError where a shard of the split was made from something else."""
    if split in described:
        _compare(directory, split, described[split].about, made_from)
    for name in _names(directory):
        shard = name.removesuffix(".parquet")
        if shard != name and shard.rpartition("-of-")[0].rpartition("-")[0] == split:
            try:
                index = shards.read_index(directory, shard)
            except UserError as error:
                # A shard that is broken is written again.
                logger.info("%s", error)
            else:
                _compare(directory, split, index.about.get("made_from", {}), made_from)


def _compare(directory: str, split: str, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    for name, value in asked.items():
        if (there := found.get(name)) == value:
            continue
        if name == "source":
            what = "from another source, or before this one was changed"
        else:
            what = f"with {name} {there}, and {value} is asked for"
        raise UserError(
            f"--to {directory}: split {split!r} was made {what}; name another directory, or remove this one"
        )


def _complete(
    directory: str,
    split: str,
    finished: Sequence[_Finished],
    made_from: Mapping[str, Any],
    max_bad_share: float,
) -> SplitEntry:
    """Writes what is true of the whole directory, once all shards of a split are there."""
    rejected = [found for shard in finished for found in shard.rejected]
    reasons = Counter(found["reason"] for found in rejected)
    _write_rejects(directory, split, rejected)
    entries = [shard.entry for shard in finished]
    entry = SplitEntry("audio", made_from["format"], made_from, entries, dict(reasons))
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    total = made_from["references"]
    if not entry.records or len(rejected) > max_bad_share * total:
        raise UserError(
            f"{len(rejected)} of {total} references are rejected ({counts}), more than --max_bad_share "
            f"{max_bad_share:g}; they are listed in {directory}/{REJECTS_FILE}"
        )
    described = _described(directory)
    if described.get(split) != entry:
        shards.write_description(directory, {**described, split: entry})
    return entry


def read_rejects(directory: str) -> list[dict[str, str]]:
    """Returns what was left out of a directory: `split`, `id`, `reason` and `detail` of each.

    Raises:
      UserError: the list is damaged.
    """
    path = f"{directory}/{REJECTS_FILE}"
    found: list[dict[str, str]] = []
    with contextlib.suppress(FileNotFoundError):
        for number, line in enumerate(storage.read(path).splitlines(), 1):
            reject: Any = None
            with contextlib.suppress(ValueError):
                reject = json.loads(line)
            if not isinstance(reject, dict) or not {"split", "id", "reason"} <= reject.keys():
                raise UserError(
                    f"{path}, line {number} is damaged; remove the file and prepare its splits again"
                )
            found.append(reject)
    return found


def _write_rejects(directory: str, split: str, rejected: Sequence[Mapping[str, str]]) -> None:
    path = f"{directory}/{REJECTS_FILE}"
    lines = [line for line in read_rejects(directory) if line["split"] != split]
    lines += [{"split": split, **found} for found in rejected]
    # Lines of other splits stay; which of them was prepared first does not show.
    lines.sort(key=lambda line: line["split"])
    with shards.put_in_place(path) as file:
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


@contextlib.contextmanager
def _naming_trouble(directory: str) -> Iterator[None]:
    """Turns an OSError, which is one of this directory, into a UserError that names it."""
    try:
        yield
    except RemoteError:
        raise
    except OSError as error:
        raise UserError(f"--to {directory} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _claimed(directory: str) -> Iterator[None]:
    """Makes a directory, and keeps a second command of this machine out of a local one."""
    try:
        storage.make_folder(directory)
    except RemoteError:
        raise
    except OSError as error:
        raise UserError(f"--to {directory} cannot be made: {error.strerror or error}") from None
    if storage.is_remote(directory):
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--to {directory}: another command is writing there") from None
        for name in storage.list_folder(directory):
            if _UNFINISHED.fullmatch(name):
                storage.remove(f"{directory}/{name}")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lists_folder(directory: str, split: str) -> Iterator[str]:
    """Gives an empty folder for the references of shards that are not written yet."""
    folder = f"{directory}/.prepare-{split}"
    storage.remove_folder(folder)
    storage.make_folder(folder)
    yield folder
    storage.remove_folder(folder)


@contextlib.contextmanager
def _progress(jobs: Sequence[ShardJob], report: Callable[[str], None]) -> Iterator[None]:
    """Reports now and then how many shards are there."""
    done = threading.Event()
    names = {f"{job.name}.parquet" for job in jobs}

    def watch() -> None:
        while not done.wait(_REPORT_SECONDS):
            with contextlib.suppress(OSError):
                report(f"{len(names.intersection(_names(jobs[0].directory)))} of {len(names)}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
