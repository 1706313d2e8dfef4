"""What planning knows of an example: everything but its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm_jax.errors import BadExample

SAMPLE_RATE = 16_000

# Stands in `Reference.inputs` where the speech of the example goes. Token ids are never negative.
SPEECH = -1


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """One example of a task, with the audio still on disk.

    Attributes:
      id: name of the example, unique within its task.
      audio: path of the audio file, local or remote; None for a text-only example.
      samples: length of the audio in samples at 16 kHz; 0 without audio.
      inputs: int32 [n], text tokens of instruction and context; `SPEECH` marks where the speech goes.
      targets: int32 [t], tokens to be learned, with their EOS.
      task: name of the SeqIO task.
      language: language code of the speech, such as `en`; empty where it is not known.
      said: first and count of those `inputs` that stand in place of speech, as a transcript does in a task
        of text alone; (0, 0) where none do.
      part: which part of the file the audio is, as `audio_files` reads it; empty for all of it.
      draw: random 64 bits of this example in this epoch of this run, of which augmentation is made; 0 where
        nothing is augmented.
      speed: how much faster than its file the speech is; `samples` counts after the change.
    """

    id: str
    audio: str | None
    samples: int
    inputs: np.ndarray
    targets: np.ndarray
    task: str
    language: str
    said: tuple[int, int] = (0, 0)
    part: str = ""
    draw: int = 0
    speed: float = 1.0

    @property
    def input_tokens(self) -> int:
        """Count of text-input tokens; the speech marker is none."""
        return int(np.count_nonzero(self.inputs != SPEECH))


def reference_of(example: Mapping[str, Any], task: str, audio_root: str = "") -> Reference:
    """Returns the reference that a SeqIO example of a task stands for.

    Args:
      example: feature name -> NumPy value, as the preprocessors leave it.
      task: name of the task.
      audio_root: folder that `audio` is relative to.

    Raises:
      BadExample: the task rejects it, or it asks for speech that it does not have; the codes are the index's.
    """
    inputs = np.asarray(example["inputs"], np.int32)
    spoken = np.count_nonzero(inputs == SPEECH)
    audio = _text(example.get("audio"))
    samples = int(example.get("samples", 0)) if spoken else 0
    for reason, holds in (
        (_text(example.get("reject")), True),
        ("several_speech_markers", spoken > 1),
        ("missing_audio", spoken and not audio),
        ("non_positive_duration", spoken and samples <= 0),
    ):
        if reason and holds:
            raise BadExample(reason)
    return Reference(
        id=_text(example.get("id")),
        audio=audio_path(audio_root, audio) if spoken else None,
        samples=samples,
        inputs=inputs,
        targets=np.asarray(example["targets"], np.int32),
        task=task,
        language=_text(example.get("language")),
        said=said_span(example["inputs_speech"]) if "inputs_speech" in example and not spoken else (0, 0),
        part=_text(example.get("part")) if spoken else "",
    )


def audio_path(root: str, audio: str) -> str:
    """Returns the path of an audio file that is absolute, remote (`gs://...`) or relative to `root`."""
    is_whole = not root or "://" in audio or audio.startswith("/")
    return audio if is_whole else f"{root.rstrip('/')}/{audio}"


def said_span(is_said: Any) -> tuple[int, int]:
    """Returns the first and the count of the true values, which stand together: bool [n]."""
    (places,) = np.nonzero(np.asarray(is_said))
    return (int(places[0]), len(places)) if len(places) else (0, 0)


def in_text(reference: Reference, said: Sequence[int]) -> Reference:
    """Returns the reference with the tokens of what is said in place of its speech; one without stays.

    Args:
      reference: what is asked.
      said: tokens of the transcript, without EOS.
    """
    (places,) = np.nonzero(reference.inputs == SPEECH)
    if not len(places):
        return reference
    before, after = reference.inputs[: places[0]], reference.inputs[places[0] + 1 :]
    inputs = np.concatenate([before, np.asarray(said, np.int32), after])
    return dataclasses.replace(
        reference, audio=None, samples=0, inputs=inputs, said=(int(places[0]), len(said))
    )


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
