"""Audio inside the records of TensorFlow Datasets: decoded as TFDS does, handed on as a WAV file in memory.

The part of one is `example=N&feature=NAME&rate=HZ` in an ArrayRecord file, N from 0, and
`example=OFFSET,LENGTH&...` in a TFRecord file. `channels`, `bits`, `dtype` and `zlib` stand beside it where
they are not 1, 16 and nothing. TFDS keeps audio as a list of numbers by default; with `lazy_decode` it keeps
the audio file itself, and an encoding keeps the array as bytes of a `dtype`, compressed with `zlib=1`.
"""

from __future__ import annotations

import io
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import soundfile

from slm_jax import storage
from slm_jax.data.handles import Handles
from slm_jax.data.parts import quoted, whole_number, whole_numbers
from slm_jax.data.ranges import read_range
from slm_jax.errors import BadExample

FURTHER_KEYS = ("feature", "rate", "channels", "bits", "dtype", "zlib")

# Head of a TFRecord: length in 8 bytes and their checksum; after the data comes its checksum.
_HEAD, _TAIL = 12, 4
_RECORDS_AT_ONCE = 32


class AudioFeature(NamedTuple):
    """How a TFDS feature keeps audio.

    Attributes:
      name: of the feature, `/` between nested ones.
      rate: sample rate in Hz.
      channels: of the audio.
      bits: that a whole number has; 16, 24 or 32.
      dtype: of arrays kept as bytes; empty for lists of numbers and for audio files.
      is_zlib: whether such bytes are compressed.
    """

    name: str
    rate: int
    channels: int = 1
    bits: int = 16
    dtype: str = ""
    is_zlib: bool = False

    def part(self, place: str) -> str:
        """Returns the part of a record at a place."""
        items = [f"example={place}", f"feature={quoted(self.name)}", f"rate={self.rate}"]
        for key, value, usual in (
            ("channels", self.channels, 1),
            ("bits", self.bits, 16),
            ("dtype", self.dtype, ""),
            ("zlib", int(self.is_zlib), 0),
        ):
            if value != usual:
                items.append(f"{key}={value}")
        return "&".join(items)


def array_records(path: str) -> Iterator[tuple[str, bytes]]:
    """Yields place and bytes of the records of an ArrayRecord file; raises OSError or RuntimeError."""
    reader = _Reader(path)
    for start in range(0, reader.count, _RECORDS_AT_ONCE):
        stop = min(start + _RECORDS_AT_ONCE, reader.count)
        yield from zip(map(str, range(start, stop)), reader.read(start, stop), strict=True)


def tf_records(path: str) -> Iterator[tuple[str, bytes]]:
    """Yields place and bytes of the records of a TFRecord file.

    Raises:
      OSError: it cannot be read.
      EOFError: it breaks off within a record.
    """
    offset, size = 0, storage.stat(path).size
    with storage.open_binary(path) as file:
        while head := file.read(_HEAD):
            length = int.from_bytes(head[:8], "little")
            # A damaged length may be more than there is memory.
            data = file.read(length + _TAIL) if length < size else b""
            if len(data) < length + _TAIL:
                raise EOFError(f"it breaks off in the record at byte {offset}")
            yield f"{offset + _HEAD},{length}", data[:length]
            offset += _HEAD + length + _TAIL


def read_example(path: str, values: Mapping[str, str]) -> bytes:
    """Returns the audio of a part as the bytes of an audio file.

    Raises:
      BadExample: `missing_part`, `truncated_part`, `damaged_container`, `bad_part` or `unreadable_audio`.
    """
    place = values["example"]
    if "," in place:
        record = read_range(path, *whole_numbers(values, "example", 2))
    else:
        record = _array_record(path, whole_number(values, "example"))
    given = {"rate": "0", "channels": "1", "bits": "16"} | dict(values)
    rate, channels, bits = (whole_number(given, key) for key in ("rate", "channels", "bits"))
    name = values.get("feature", "")
    feature = AudioFeature(name, rate, channels, bits, values.get("dtype", ""), values.get("zlib") == "1")
    return audio_file(_value(record, feature, path), feature, f"{path}, example {place}")


def audio_file(value: np.ndarray | bytes, feature: AudioFeature, where: str) -> bytes:
    """Returns the value of an audio feature as the bytes of an audio file.

    Args:
      value: numbers [n * channels], or bytes.
      feature: how they are kept.
      where: they come from, for errors.

    Raises:
      BadExample: `unreadable_audio` or `bad_sample_rate`.
    """
    if isinstance(value, bytes):
        if not feature.dtype:
            return value
        try:
            data = zlib.decompress(value) if feature.is_zlib else value
            value = np.frombuffer(data, feature.dtype)
        except (zlib.error, ValueError, TypeError) as error:
            raise BadExample("unreadable_audio", f"{where}: {error}") from None
    if not 1 <= feature.rate <= np.iinfo(np.int32).max:
        raise BadExample("bad_sample_rate", f"{where} says {feature.rate} Hz")
    if len(value) % feature.channels:
        raise BadExample("unreadable_audio", f"{where}: {len(value)} values of {feature.channels} channels")
    wave, subtype = value.reshape(-1, feature.channels), "FLOAT"
    if wave.dtype.kind in "iu":
        limit = 1 << (feature.bits - 1)
        if len(wave) and (wave.max() >= limit or wave.min() < -limit):
            raise BadExample("unreadable_audio", f"{where}: a sample has more than {feature.bits} bits")
        subtype = "PCM_16" if feature.bits == 16 else "PCM_32"
        wave = wave.astype(np.int16) if feature.bits == 16 else wave.astype(np.int32) << (32 - feature.bits)
    else:
        wave = wave.astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, wave, feature.rate, format="WAV", subtype=subtype)
    return file.getvalue()


def _value(record: bytes, feature: AudioFeature, path: str) -> np.ndarray | bytes:
    """Returns the numbers or bytes of a feature of a serialised tf.train.Example."""
    from slm_jax.data.host_tensorflow import tf

    # The parser is told one type; TensorFlow's own is many times as fast as protobuf's lists in Python.
    for dtype in (tf.int64, tf.float32, tf.string):
        specs = {feature.name: tf.io.FixedLenSequenceFeature([], dtype, allow_missing=True)}
        try:
            values = tf.io.parse_single_example(record, specs)[feature.name].numpy()
        except tf.errors.InvalidArgumentError as error:
            if "Data types don't match" in error.message:
                continue
            raise BadExample("damaged_container", f"{path}: {error.message}") from None
        except UnicodeDecodeError:
            # Of the message: TensorFlow puts the bytes into it.
            raise BadExample("damaged_container", f"{path}: the record is no tf.train.Example") from None
        if dtype != tf.string:
            return values
        if len(values) == 1:
            return bytes(values[0])
        break
    raise BadExample("missing_part", f"{path}: the record has no audio in feature {feature.name!r}")


class _Reader:
    """An ArrayRecord file whose records threads read by number."""

    def __init__(self, path: str, changed: object = None):
        from array_record.python.array_record_module import ArrayRecordReader

        if storage.is_remote(path):
            raise OSError("ArrayRecord files are read from local paths alone")
        storage.stat(path)
        self._reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        # A file that is none opens without an error, and has no records.
        if not self._reader.ok():
            raise RuntimeError("it is no whole ArrayRecord file")
        self.count: int = self._reader.num_records()
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> list[bytes]:
        """Returns the records from `start` to before `stop`; raises RuntimeError."""
        with self._lock:
            return self._reader.read(start, stop)


def _array_record(path: str, number: int) -> bytes:
    try:
        reader = _READERS.get(path, None if storage.is_remote(path) else storage.stat(path))
        if number >= reader.count:
            raise BadExample("missing_part", f"{path} has no record {number}")
        return reader.read(number, number + 1)[0]
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadExample("damaged_container", f"{path}, record {number}: {error}") from None


_READERS = Handles(_Reader, 64)
