"""Rows of references become arrays of fixed shapes.

Shape suffixes: B rows, K slots of a row, S samples, E segments of a slot, T decoder tokens,
N text-input tokens, L positions of the LLM encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from slm_jax.data.references import SAMPLE_RATE, SPEECH, Reference
from slm_jax.errors import BadExample, UserError, nearest

FEATURES = ("speech", "inputs", "targets", "layout")


class Placed(NamedTuple):
    """A reference and its place in a row.

    Attributes:
      reference: the example.
      slot: which of the row's K slots holds its speech.
      first_sample: where in the slot its speech starts, a multiple of samples per position.
    """

    reference: Reference
    slot: int = 0
    first_sample: int = 0


Row = Sequence[Placed]


class Reject(NamedTuple):
    """A reference that could not be loaded, and why."""

    reference: Reference
    reason: str
    detail: str


@dataclass(frozen=True)
class BatchShape:
    """Static sizes of a batch.

    Attributes:
      rows: B, rows of the global batch.
      slots: K, slots of a row; 0 in a text-only run.
      samples: S, samples of a slot, a multiple of `samples_per_position`; 0 in a text-only run.
      segments: E, most utterances that a slot holds; 0 in a text-only run.
      inputs: N, text-input tokens of a row.
      layout: L, positions of the LLM encoder.
      targets: T, decoder tokens of a row.
      samples_per_position: samples behind one speech position of the LLM encoder.
      frame_dim: D, features of a speech position where the encoder's frames were computed before; 0 where
        rows hold samples.
    """

    rows: int
    slots: int
    samples: int
    segments: int
    inputs: int
    layout: int
    targets: int
    samples_per_position: int
    frame_dim: int = 0

    @classmethod
    def from_feature_lengths(
        cls,
        feature_lengths: Mapping[str, int],
        *,
        rows: int,
        samples_per_position: int,
        slots: int = 1,
        segments: int = 1,
    ) -> BatchShape:
        """Returns the shape that holds the feature lengths of one row.

        Args:
          feature_lengths: `inputs` and `targets` in tokens; `speech` in samples at 16 kHz, absent or 0 in
            a text-only run; `layout` in positions, by default all speech positions plus `inputs`.
          rows: global batch size.
          samples_per_position: samples behind one speech position.
          slots: utterance slots of a row.
          segments: most utterances of a slot.

        Raises:
          UserError: a length is unknown, missing or not positive.
        """
        check_feature_lengths(feature_lengths)
        if rows < 1:
            raise UserError(f"BATCH_SIZE is {rows}, expected at least 1")
        positions = -(-feature_lengths.get("speech", 0) // samples_per_position)
        if not positions:
            slots = segments = 0
        everything = slots * positions + feature_lengths["inputs"]
        return cls(
            rows=rows,
            slots=slots,
            samples=positions * samples_per_position,
            segments=segments,
            inputs=feature_lengths["inputs"],
            layout=feature_lengths.get("layout", everything),
            targets=feature_lengths["targets"],
            samples_per_position=samples_per_position,
        )

    @property
    def has_speech(self) -> bool:
        """Whether batches hold the speech arrays."""
        return self.samples > 0

    @property
    def positions(self) -> int:
        """Speech positions of one slot."""
        return self.samples // self.samples_per_position

    def speech_positions(self, samples: int) -> int:
        """Speech positions that an utterance of `samples` takes."""
        return -(-samples // self.samples_per_position)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each array of the global batch, by name."""
        b, k, e = self.rows, self.slots, self.segments
        int16, int32, float32 = np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.float32)
        if self.frame_dim:
            heard = {"speech_frames": ((b, k, self.positions, self.frame_dim), np.dtype(jnp.bfloat16))}
        else:
            heard = {"speech": ((b, k, self.samples), int16)}
        speech = heard | {"speech_segments": ((b, k, e, 3), int32)}
        text = {
            "inputs": ((b, self.inputs), int32),
            "layout": ((b, self.layout), int32),
            "layout_segment_ids": ((b, self.layout), int32),
            "targets": ((b, self.targets), int32),
            "target_segment_ids": ((b, self.targets), int32),
            "target_positions": ((b, self.targets), int32),
            "loss_weights": ((b, self.targets), float32),
        }
        if self.has_speech:
            return speech | text
        return text | {"inputs_said": ((b, self.inputs), np.dtype(bool))}

    def misfit(self, reference: Reference) -> BadExample | None:
        """Returns why a reference does not fit into a row of its own, or None where it fits."""
        tokens = reference.input_tokens
        positions = self.speech_positions(reference.samples)
        if reference.samples > self.samples:
            seconds, room = (samples / SAMPLE_RATE for samples in (reference.samples, self.samples))
            return BadExample("speech_too_long", f"{seconds:g} s, the row holds {room:g} s of speech")
        for reason, size, room, unit in (
            ("inputs_too_long", tokens, self.inputs, "tokens"),
            ("targets_too_long", len(reference.targets), self.targets, "tokens"),
            ("layout_too_long", positions + tokens, self.layout, "positions"),
        ):
            if size > room:
                return BadExample(reason, f"{size} {unit}, the row holds {room}")
        return None


def check_feature_lengths(feature_lengths: Mapping[str, int]) -> None:
    """Raises UserError unless the lengths are known, complete and positive."""
    for name, length in feature_lengths.items():
        if name not in FEATURES:
            raise UserError(f"TASK_FEATURE_LENGTHS has unknown feature {name!r}{nearest(name, FEATURES)}")
        least = 0 if name == "speech" else 1
        if isinstance(length, bool) or not isinstance(length, int) or length < least:
            raise UserError(
                f"TASK_FEATURE_LENGTHS[{name!r}] is {length!r}, expected a whole number of at least {least}"
            )
    for name in ("inputs", "targets"):
        if name not in feature_lengths:
            raise UserError(f"TASK_FEATURE_LENGTHS lacks {name!r}, expected a length in tokens")


def collate(
    rows: Sequence[Row],
    shape: BatchShape,
    load: Callable[[Reference], np.ndarray],
    rejects: list[Reject] | None = None,
) -> dict[str, np.ndarray]:
    """Returns the arrays of `rows`, as the batch table of docs/architecture.md says.

    Args:
      rows: references and their places; their number is the leading size of every array.
      shape: static sizes; its `rows` is not used, so that a host collates its own rows only.
      load: returns the samples of a reference, int16 [n] at 16 kHz with n <= its `samples`, or its frames
        [p, D] where the shape has a `frame_dim`; called for references with audio only. Where it raises
        BadExample, the example's place stays empty (segment 0, weight 0, layout -1) and the rest of the
        row is where it was planned.
      rejects: receives each reference whose load failed.

    Raises:
      ValueError: the plan placed more into a row than it holds, or `load` returned too much.
    """
    arrays = {name: np.zeros((len(rows), *size[1:]), dtype) for name, (size, dtype) in shape.arrays().items()}
    arrays["layout"].fill(-1)
    for r, row in enumerate(rows):
        _fill_row({name: array[r] for name, array in arrays.items()}, row, shape, load, rejects)
    return arrays


def _fill_row(
    arrays: dict[str, np.ndarray],
    row: Row,
    shape: BatchShape,
    load: Callable[[Reference], np.ndarray],
    rejects: list[Reject] | None,
) -> None:
    input_start = layout_start = target_start = 0
    utterances = [0] * shape.slots
    for number, placed in enumerate(row, 1):
        reference = placed.reference
        tokens = reference.input_tokens
        length = shape.speech_positions(reference.samples) + tokens
        if (
            input_start + tokens > shape.inputs
            or layout_start + length > shape.layout
            or target_start + len(reference.targets) > shape.targets
        ):
            raise ValueError(f"row overflows at example {reference.id!r} of task {reference.task!r}")
        try:
            speech = None if reference.audio is None else load(reference)
        except BadExample as bad:
            if rejects is not None:
                rejects.append(Reject(reference, bad.reason, bad.detail))
        else:
            positions = 0
            if speech is not None:
                positions = _fill_speech(arrays, placed, number, utterances, speech, shape)
            _fill_inputs(arrays, placed, number, input_start, layout_start, positions, shape)
            _fill_targets(arrays, reference.targets, number, target_start)
        # What was planned, not what was loaded, says where the next example starts.
        input_start += tokens
        layout_start += length
        target_start += len(reference.targets)


def _fill_speech(
    arrays: dict[str, np.ndarray],
    placed: Placed,
    number: int,
    utterances: list[int],
    speech: np.ndarray,
    shape: BatchShape,
) -> int:
    """Writes samples, or frames, into the row; returns how many speech positions they take."""
    reference, slot, first = placed
    name, step = ("speech_frames", shape.samples_per_position) if shape.frame_dim else ("speech", 1)
    samples = len(speech) * step
    planned = shape.speech_positions(reference.samples) * step if shape.frame_dim else reference.samples
    if samples > planned:
        raise ValueError(f"example {reference.id!r}: {samples} samples, planned {reference.samples}")
    if first % shape.samples_per_position:
        raise ValueError(f"example {reference.id!r} starts at sample {first}, off the grid of positions")
    if first + samples > shape.samples or utterances[slot] == shape.segments:
        raise ValueError(f"slot {slot} overflows at example {reference.id!r}")
    arrays[name][slot, first // step : first // step + len(speech)] = speech
    arrays["speech_segments"][slot, utterances[slot]] = (number, first, samples)
    utterances[slot] += 1
    return shape.speech_positions(samples)


def _fill_inputs(
    arrays: dict[str, np.ndarray],
    placed: Placed,
    number: int,
    input_start: int,
    layout_start: int,
    positions: int,
    shape: BatchShape,
) -> None:
    tokens_and_marker = placed.reference.inputs
    is_text = tokens_and_marker != SPEECH
    tokens = tokens_and_marker[is_text]
    arrays["inputs"][input_start : input_start + len(tokens)] = tokens
    if "inputs_said" in arrays:
        first, count = placed.reference.said
        arrays["inputs_said"][input_start + first : input_start + first + count] = True
    text = shape.slots * shape.positions + input_start + np.arange(len(tokens))
    # Text tokens before the marker come before the speech; without a marker there is no speech.
    split = int(np.argmin(is_text)) if not is_text.all() else len(tokens)
    first = placed.slot * shape.positions + placed.first_sample // shape.samples_per_position
    order = np.concatenate([text[:split], first + np.arange(positions), text[split:]])
    span = slice(layout_start, layout_start + len(order))
    arrays["layout"][span] = order
    arrays["layout_segment_ids"][span] = number


def _fill_targets(arrays: dict[str, np.ndarray], targets: np.ndarray, number: int, start: int) -> None:
    span = slice(start, start + len(targets))
    arrays["targets"][span] = targets
    arrays["target_segment_ids"][span] = number
    arrays["target_positions"][span] = np.arange(len(targets))
    arrays["loss_weights"][span] = 1.0
