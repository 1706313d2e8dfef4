"""Batches of a frozen encoder's frames: each utterance is encoded once, before the first step, and kept.

Where the encoder is frozen and nothing augments the audio, its frames are the same in every epoch. They lie
in the memory of the one process that trains, in bfloat16: two bytes times D for each speech position.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

from slm_jax.data import audio_files
from slm_jax.data.batch import BatchShape
from slm_jax.data.iterator import HostBatch, LoadUtterance, PlacedBatch, TrainBatches, Utterance
from slm_jax.data.placement import place
from slm_jax.data.plan import Plan
from slm_jax.data.references import Reference
from slm_jax.errors import BadExample, UserError

_REPORT_SECONDS = 5.0

# speech int16 [B, K, S], speech_segments int32 [B, K, E, 3] -> frames [B, K, P, D]
Encode = Callable[[jax.Array, jax.Array], jax.Array]


class Encoded(NamedTuple):
    """An `iterator.Utterance` that was encoded.

    Attributes:
      speech: its frames, bfloat16 [p, D].
      length: samples at 16 kHz that it had.
      clipped, trimmed: as of `audio_files.Audio`.
    """

    speech: np.ndarray
    length: int
    clipped: int
    trimmed: int


class EncodedBatches(TrainBatches):
    """A `TrainBatches` whose rows hold `speech_frames`; the audio is read and encoded when it starts.

    Args:
      plan: the order of rows.
      shape: static sizes of the global batch, with a `frame_dim`.
      sharding: of the batch over the mesh.
      encoder: returns the frozen encoder with its reducer, for batches of `shape`'s rows on the mesh; called
        when there is something to encode, and what it returns is not kept.
      load: returns the audio of a reference; raises BadExample. An example that cannot be loaded is one
        that the batches reject, and `max_bad_share` counts from the encoding on.
      report: takes a line of progress now and then.
      options: of `TrainBatches`.

    Raises:
      UserError: several processes train; or as of `TrainBatches`.
    """

    def __init__(
        self,
        plan: Plan,
        shape: BatchShape,
        sharding: Sharding,
        *,
        encoder: Callable[[], Encode],
        load: LoadUtterance = audio_files.load_utterance,
        report: Callable[[str], None] = lambda line: None,
        **options: Any,
    ):
        if jax.process_count() > 1:
            raise UserError(
                "DataConfig.encode_once keeps frames in the memory of one process, "
                f"and {jax.process_count()} train; expected encode_once = False"
            )
        super().__init__(plan, shape, sharding, load=self._encoded, **options)
        self._encoder, self._load_audio, self._report, self._options = encoder, load, report, options
        self._utterances: dict[tuple[str, str, int], Encoded | BadExample] = {}

    def batches(
        self, rows_consumed: int, anchor: tuple[int, int] | None = None
    ) -> Generator[PlacedBatch, None, None]:
        """As of `TrainBatches`; the first call encodes every utterance of the plan, before it returns."""
        self._encode_all()
        return super().batches(rows_consumed, anchor)

    def host_batches(self, rows_consumed: int) -> Generator[HostBatch, None, None]:
        """As of `TrainBatches`; encodes as `batches` does."""
        self._encode_all()
        return super().host_batches(rows_consumed)

    def _encoded(self, reference: Reference) -> Encoded:
        found = self._utterances[_key(reference)]
        if isinstance(found, BadExample):
            # A new one each time: an exception keeps alive what every place that raised it held.
            raise BadExample(found.reason, found.detail)
        return found

    def _encode_all(self) -> None:
        if self._utterances:
            return
        table = _Utterances([table.take(np.arange(len(table))) for table in self.plan.tables])
        if not len(table):
            return
        audio: dict[tuple[str, str, int], Utterance] = {}

        def load(reference: Reference) -> Utterance:
            audio[_key(reference)] = found = self._load_audio(reference)
            return found

        began = told = time.monotonic()
        shape = dataclasses.replace(self.shape, frame_dim=0)
        plan = Plan([table], None, 0, shape.rows, shape, epochs=1, shuffle=False)
        batches = TrainBatches(plan, shape, self.sharding, load=load, **self._options)
        encode = self._encoder()
        utterances: dict[tuple[str, str, int], Encoded | BadExample] = {}
        for step, batch in enumerate(batches.host_batches(0)):
            arrays = place(batch.arrays, batch.rows, self.sharding, shape.rows)
            frames_BKPD = np.asarray(encode(arrays["speech"], arrays["speech_segments"]))
            bad = {_key(reject.reference): reject for reject in batch.rejects}
            for row, reference in enumerate(table.references[step * shape.rows :][: shape.rows]):
                key = _key(reference)
                if key in bad:
                    utterances[key] = BadExample(bad[key].reason, bad[key].detail)
                    continue
                heard = audio.pop(key)
                frames_PD = frames_BKPD[row, 0, : shape.speech_positions(heard.length)].copy()
                utterances[key] = Encoded(frames_PD, heard.length, heard.clipped, heard.trimmed)
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                self._report(f"encoded {len(utterances)} of {len(table)} utterances")
        held = sum(found.speech.nbytes for found in utterances.values() if isinstance(found, Encoded))
        seconds = time.monotonic() - began
        self._report(f"encoded {len(table)} utterances in {seconds:.0f} s; their frames take {held:,} bytes")
        self._utterances = utterances


class _Utterances:
    """A `plan.Table` of the utterances that tables speak of, each once."""

    task = "speech"
    fingerprint = ""
    shards = np.zeros(0, np.int64)

    def __init__(self, tables: Sequence[Sequence[Reference]]):
        with_audio = (reference for table in tables for reference in table if reference.audio is not None)
        self.references = list({_key(reference): reference for reference in with_audio}.values())

    def __len__(self) -> int:
        return len(self.references)

    @property
    def lengths(self) -> np.ndarray:
        lengths = [(r.samples, r.input_tokens, len(r.targets)) for r in self.references]
        return np.array(lengths, np.int32).reshape(-1, 3)

    def take(self, indices: np.ndarray) -> list[Reference]:
        return [self.references[index] for index in indices.tolist()]


def _key(reference: Reference) -> tuple[str, str, int]:
    """What decides the samples of a reference: the file, which part of it, and where it is cut."""
    return str(reference.audio), reference.part, reference.samples
