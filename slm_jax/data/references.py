"""What planning knows of an example: everything but its samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16_000

# Stands in `Reference.inputs` where the speech of the example goes. Token ids are never negative.
SPEECH = -1


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """One example of a task, with the audio still on disk.

    Attributes:
      id: name of the example, unique within its task.
      audio: path of the audio file; None for a text-only example.
      samples: length of the audio in samples at 16 kHz; 0 without audio.
      inputs: int32 [n], text tokens of instruction and context; `SPEECH` marks where the speech goes.
      targets: int32 [t], tokens to be learned, with their EOS.
      task: name of the SeqIO task.
      language: language code of the speech, such as `en`; empty where it is not known.
    """

    id: str
    audio: str | None
    samples: int
    inputs: np.ndarray
    targets: np.ndarray
    task: str
    language: str

    @property
    def input_tokens(self) -> int:
        """Count of text-input tokens; the speech marker is none."""
        return int(np.count_nonzero(self.inputs != SPEECH))
