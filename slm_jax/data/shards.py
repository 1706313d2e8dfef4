"""Speech shards: utterances as records of ArrayRecord files, each file with its index beside it.

shards.json                            what the directory holds; written last, so that with it all is there
train-00017-of-00128.array_record      one record an utterance, in any order of access
train-00017-of-00128.parquet           its index: all that planning reads, and which record is whose

A record is a map in MessagePack: `id`, `kind` (`audio`; `text` where there is no speech; `frames` for what an
encoder made of it), `samples` (int, at 16 kHz), `fields` (name -> str: language, text, ...), `data` (bytes),
`encoding` of the data (`flac` or `pcm16`, a whole FLAC or WAV file; the dtype of frames) and `shape` (of
frames). The index has a row for each record, in their order: `@record` (its number), `@check` (CRC-32 of its
bytes), `id`, `samples` and the fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from slm_jax import storage
from slm_jax.data.handles import Handles
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.errors import BadExample, RemoteError, UserError, nearest

SHARDS_FILE = "shards.json"
FORMAT = "slm_jax speech shards"
VERSION = 1
KINDS = ("audio", "text", "frames")
# Ends the names of files that are not finished.
PARTIAL = ".partial"
# What speech is kept as: both are whole files, and both give back every bit of 16-bit samples.
CODECS = ("flac", "pcm16")

# Columns of an index that are not fields of its references.
_OWN_COLUMNS = ("@record", "@check", "id", "samples", "audio", "part")
# Speech is compressed already; a group of one record is read without its neighbours.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
# In errors of ArrayRecord's own client of `gs://`, which tries a request again for a quarter of an hour.
_GAVE_UP, _REFUSED = ("Retry policy exhausted", "Retry loop cancelled"), "Permanent error"
_OPEN_SHARDS = 128
_OPEN_COPIES = 16
_BLOCK = 1 << 20
_METADATA = b"slm_jax"


@dataclasses.dataclass(frozen=True)
class Record:
    """One utterance in a shard.

    Attributes:
      id: of its reference.
      kind: one of `KINDS`.
      samples: of the utterance at 16 kHz; 0 in text.
      fields: name -> text: `language`, `text` and whatever else the reference has.
      data: the speech; empty in text.
      encoding: of `data`: one of `CODECS`, or the dtype of frames.
      shape: of frames: positions, features.
    """

    id: str
    kind: str
    samples: int
    fields: Mapping[str, str]
    data: bytes = b""
    encoding: str = ""
    shape: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        """Returns the record in MessagePack; equal records give equal bytes."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"fields": dict(sorted(self.fields.items())), "shape": list(self.shape)}
        return cast(bytes, msgpack.packb(values))

    @classmethod
    def from_bytes(cls, packed: bytes) -> Record:
        """Returns the record that `to_bytes` packed; raises ValueError where it is none."""
        try:
            values = msgpack.unpackb(packed)
            return cls(**{**values, "shape": tuple(values["shape"])})
        except (msgpack.UnpackException, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"no record of a speech shard: {error}") from None


def encode_speech(samples: np.ndarray, codec: str) -> bytes:
    """Returns a file that holds samples without loss.

    Args:
      samples: int16 [n] at 16 kHz.
      codec: one of `CODECS`.
    """
    file = io.BytesIO()
    container = {"flac": "FLAC", "pcm16": "WAV"}[codec]
    soundfile.write(file, samples, SAMPLE_RATE, format=container, subtype="PCM_16")
    return file.getvalue()


# ---- one shard


class ShardEntry(NamedTuple):
    """A finished shard as `shards.json` names it.

    Attributes:
      name: of its files, without their endings.
      records: how many it has.
      samples: of all its records.
      bytes: size of the ArrayRecord file.
      index: SHA-256 of the index file, and so of what the records hold.
    """

    name: str
    records: int
    samples: int
    bytes: int
    index: str


def shard_name(split: str, number: int, count: int) -> str:
    """Returns the name of a shard's files, without their endings."""
    return f"{split}-{number:05d}-of-{count:05d}"


def shard_path(directory: str, name: str) -> str:
    """Returns the ArrayRecord file of a shard."""
    return f"{directory}/{name}.array_record"


def index_path(directory: str, name: str) -> str:
    """Returns the index of a shard."""
    return f"{directory}/{name}.parquet"


def write_shard(
    directory: str, name: str, records: Iterable[Record], about: Callable[[], Any] = dict
) -> ShardEntry:
    """Writes a shard and then its index, each whole or not at all; what had their names is replaced.

    Args:
      directory: local or remote; it exists.
      name: of `shard_name`.
      records: one at a time; equal ones give equal files.
      about: returns JSON that `read_index` gives back; asked once all records are drawn.

    Raises:
      UserError: a field has the name of a column that every index has.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    index = _IndexColumns()
    with put_in_place(shard_path(directory, name)) as file:
        writer = ArrayRecordWriter(str(file), _WRITER_OPTIONS)
        for record in records:
            packed = record.to_bytes()
            writer.write(packed)
            index.add(record, zlib.crc32(packed))
        writer.close()
        size = file.stat().st_size
    table = index.table().replace_schema_metadata(
        {_METADATA: json.dumps({"version": VERSION, "bytes": size, "about": about()}, sort_keys=True)}
    )
    with put_in_place(index_path(directory, name)) as file:
        pq.write_table(table, file, compression="zstd")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return ShardEntry(name, len(table), sum(index.samples), size, digest)


class _IndexColumns:
    """The columns of an index while its shard is written."""

    def __init__(self):
        self.checks: list[int] = []
        self.ids: list[str] = []
        self.samples: list[int] = []
        self.fields: dict[str, list[str]] = {"language": [], "text": []}

    def add(self, record: Record, check: int) -> None:
        """Adds a row."""
        for name in record.fields.keys() - self.fields.keys():
            if name in _OWN_COLUMNS:
                raise UserError(f"a reference has a field {name!r}, which is a column of every shard's index")
            self.fields[name] = [""] * len(self.ids)
        for name, values in self.fields.items():
            values.append(record.fields.get(name, ""))
        self.checks.append(check)
        self.ids.append(record.id)
        self.samples.append(record.samples)

    def table(self) -> pa.Table:
        """Returns the index."""
        own = {
            "@record": pa.array(np.arange(len(self.ids), dtype=np.int32)),
            "@check": pa.array(self.checks, pa.uint32()),
            "id": pa.array(self.ids, pa.string()),
            "samples": pa.array(self.samples, pa.int32()),
        }
        fields = {name: pa.array(self.fields[name], pa.string()) for name in sorted(self.fields)}
        return pa.table(own | fields)


@contextlib.contextmanager
def put_in_place(path: str) -> Iterator[Path]:
    """Gives a local file to write, which takes the place of `path` when all is written, or goes."""
    with contextlib.ExitStack() as stack:
        remote = storage.is_remote(path)
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if remote else storage.parent(path)
        name = path.rpartition("/")[2]
        temporary = Path(folder) / f".{name}.{uuid.uuid4().hex}{PARTIAL}"
        stack.callback(temporary.unlink, missing_ok=True)
        yield temporary
        if remote:
            # An object of a bucket is there whole, or not at all.
            storage.put(temporary, path)
        else:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)


class ShardIndex(NamedTuple):
    """What lies beside a shard.

    Attributes:
      table: a row for each record.
      about: as given to `write_shard`.
      bytes: size of the ArrayRecord file.
      fingerprint: SHA-256 of the index file.
    """

    table: pa.Table
    about: Any
    bytes: int
    fingerprint: str

    def entry(self, name: str) -> ShardEntry:
        """Returns the shard as `shards.json` names it."""
        samples = int(np.sum(self.table["samples"].to_numpy(), dtype=np.int64))
        return ShardEntry(name, len(self.table), samples, self.bytes, self.fingerprint)


def read_index(directory: str, name: str) -> ShardIndex:
    """Returns the index of a shard, having seen that the shard has the size that it says.

    Raises:
      UserError: index or shard is missing or damaged, or they are out of step.
    """
    path, shard = index_path(directory, name), shard_path(directory, name)
    try:
        content = storage.read(path)
    except FileNotFoundError:
        raise UserError(f"shard {shard} has no index: {path} is missing") from None
    except RemoteError:
        raise
    except OSError as error:
        raise UserError(f"index {path} cannot be read: {error}") from None
    try:
        table = pq.read_table(pa.BufferReader(content))
        record = json.loads((table.schema.metadata or {})[_METADATA])
        about, expected = record["about"], record["bytes"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"index {path} is damaged: {error}") from None
    try:
        found = storage.stat(shard).size
    except RemoteError:
        raise
    except OSError:
        raise UserError(f"shard {shard} is missing, and its index is there") from None
    if found != expected:
        raise UserError(
            f"shard {shard} has {found} bytes, and its index says {expected}: it is cut off, or another one"
        )
    return ShardIndex(table, about, expected, hashlib.sha256(content).hexdigest())


# ---- one record


def record_parts(index: pa.Table) -> list[str]:
    """Returns the `Reference.part` of each row of an index: `record=<number>&check=<CRC-32, hexadecimal>`."""
    numbers, checks = (index[name].to_pylist() for name in ("@record", "@check"))
    return [f"record={number}&check={check:08x}" for number, check in zip(numbers, checks, strict=True)]


def read_record(path: str, number: int, check: str = "") -> Record:
    """Returns a record of a shard.

    Args:
      path: of the ArrayRecord file.
      number: of the record, from 0.
      check: CRC-32 of its bytes in hexadecimal, as its index says; not compared where it is empty.

    Raises:
      BadExample: `out_of_step`, there is no such record, or another one than the index says; or
        `damaged_container`.
      OSError: the file cannot be opened.
      RemoteError: storage is away.
    """
    try:
        reader = _reader(path)
        count = reader.num_records()
        if number >= count:
            raise BadExample("out_of_step", f"{path} has {count} records, and its index speaks of {number}")
        (packed,) = reader.read([number])
    except RuntimeError as error:
        _check_reached(path, str(error))
        raise BadExample("damaged_container", f"{path}, record {number}: {error}") from None
    if check and f"{zlib.crc32(packed):08x}" != check:
        raise BadExample("out_of_step", f"{path}, record {number} is another one than its index says")
    try:
        return Record.from_bytes(packed)
    except ValueError as error:
        raise BadExample("damaged_container", f"{path}, record {number}: {error}") from None


def _reader(path: str) -> Any:
    # ArrayRecord itself knows local files and `gs://` at Google; a shard elsewhere is copied.
    if not storage.is_remote(path):
        return _SHARDS.get(path, storage.stat(path))
    at_google = path.startswith("gs://") and not os.environ.get("STORAGE_EMULATOR_HOST")
    return _SHARDS.get(path, None) if at_google else _COPIES.get(path)


def _check_reached(path: str, said: str) -> None:
    """Raises what ArrayRecord's own client of `gs://` has met, where its error says nothing of a record."""
    if any(words in said for words in _GAVE_UP):
        raise RemoteError(f"cannot read {path}: {said.splitlines()[0]}")
    if _REFUSED in said:
        kind = FileNotFoundError if "Not Found" in said else PermissionError
        raise kind(said.splitlines()[0])


def _open_shard(path: str, changed: object) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, _READER_OPTIONS)
    if not reader.ok():
        # Where it knows why, it tells when it is asked for a record.
        reader.read([0])
        raise RuntimeError("it is no whole ArrayRecord file")
    return reader


def _open_copy(path: str) -> Any:
    # The open reader holds the file, which goes with it.
    with tempfile.NamedTemporaryFile() as copy, storage.open_binary(path) as file:
        shutil.copyfileobj(file, copy, _BLOCK)
        copy.flush()
        return _open_shard(copy.name, None)


_SHARDS = Handles(_open_shard, _OPEN_SHARDS)
_COPIES = Handles(_open_copy, _OPEN_COPIES)


# ---- a directory of shards


@dataclasses.dataclass(frozen=True)
class SplitEntry:
    """A finished split as `shards.json` describes it.

    Attributes:
      kind: of its records, one of `KINDS` (`audio` may have text among it).
      encoding: of their data.
      about: what it was made from, as JSON.
      shards: in their order.
      rejected: reason -> how many references are not in it.
    """

    kind: str
    encoding: str
    about: Any
    shards: Sequence[ShardEntry]
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def records(self) -> int:
        """How many records it has."""
        return sum(shard.records for shard in self.shards)

    @property
    def samples(self) -> int:
        """Samples of all its records."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with any reference or record."""
        return hashlib.sha256(json.dumps([self.kind, self.encoding, list(self.shards)]).encode()).hexdigest()


def write_description(directory: str, splits: Mapping[str, SplitEntry]) -> None:
    """Writes `shards.json`, which makes the directory complete."""
    described = {
        split: {
            "kind": entry.kind,
            "encoding": entry.encoding,
            "records": entry.records,
            "samples": entry.samples,
            "rejected": dict(sorted(entry.rejected.items())),
            "about": entry.about,
            "shards": [shard._asdict() for shard in entry.shards],
        }
        for split, entry in sorted(splits.items())
    }
    text = json.dumps({"format": FORMAT, "version": VERSION, "splits": described}, indent=1) + "\n"
    with put_in_place(f"{directory}/{SHARDS_FILE}") as file:
        file.write_text(text, encoding="utf-8")


def read_description(directory: str) -> dict[str, SplitEntry]:
    """Returns the splits of a directory of shards.

    Raises:
      UserError: there is no such directory, it is no finished one, damaged, or of a later version.
    """
    path = f"{directory}/{SHARDS_FILE}"
    try:
        described = json.loads(storage.read(path))
    except FileNotFoundError:
        raise UserError(_without_description(directory)) from None
    except RemoteError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(f'{path} does not describe speech shards: expected "format": {FORMAT!r}')
    if described.get("version") != VERSION:
        raise UserError(f"{path} has version {described.get('version')}, expected {VERSION}; write it anew")
    try:
        return {split: _split_entry(entry) for split, entry in described["splits"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); remove it and write it anew") from None


def _split_entry(entry: Mapping[str, Any]) -> SplitEntry:
    shards = [ShardEntry(**shard) for shard in entry["shards"]]
    return SplitEntry(entry["kind"], entry["encoding"], entry["about"], shards, entry["rejected"])


def _without_description(directory: str) -> str:
    if not storage.is_folder(directory):
        parent = storage.parent(directory)
        siblings = storage.list_folder(parent) if storage.is_folder(parent) else []
        near = nearest(directory.rpartition("/")[2], [name for name in siblings if not name.startswith(".")])
        return f"the directory of shards {directory} does not exist{near}"
    if any(name.endswith(".array_record") for name in storage.list_folder(directory)):
        unfinished = "they are unfinished; run slm data prepare or encode again"
        return f"{directory} has shards and no {SHARDS_FILE}: {unfinished}"
    return f"{directory} has no {SHARDS_FILE}, expected a directory of speech shards"
