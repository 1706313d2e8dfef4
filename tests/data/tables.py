"""Index tables of drawn lengths, for tests of plans."""

import dataclasses

import numpy as np

from slm_jax.data.batch import BatchShape
from slm_jax.data.references import SPEECH, Reference

SPP = 640


def shape_of(rows=2, slots=1, positions=20, segments=5, inputs=12, layout=None, targets=16) -> BatchShape:
    return BatchShape(
        rows=rows,
        slots=slots,
        samples=positions * SPP,
        segments=segments,
        inputs=inputs,
        layout=layout or slots * positions + inputs,
        targets=targets,
        samples_per_position=SPP,
    )


@dataclasses.dataclass
class DrawnTable:
    """References of these lengths; their tokens tell which they are."""

    task: str
    lengths: np.ndarray
    fingerprint: str = "contents"
    shards = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: np.ndarray) -> list[Reference]:
        found = []
        for i in indices.tolist():
            samples, inputs, targets = self.lengths[i].tolist()
            tokens = np.full(inputs, i % 90 + 2, np.int32)
            tokens = np.append([SPEECH], tokens) if samples else tokens
            found.append(
                Reference(
                    str(i),
                    f"{i}.wav" if samples else None,
                    samples,
                    tokens.astype(np.int32),
                    np.full(targets, i % 90 + 2, np.int32),
                    self.task,
                    "en",
                )
            )
        return found


def draw_table(seed: int, count: int, shape: BatchShape, task: str = "t") -> DrawnTable:
    """Ragged references that fit a row, every tenth of text alone."""
    rng = np.random.default_rng(seed)
    samples = rng.integers(1, shape.samples + 1, count)
    samples[rng.random(count) < 0.1] = 0
    room = np.minimum(shape.inputs, shape.layout - -(-samples // SPP))
    inputs = np.minimum(rng.integers(0, shape.inputs + 1, count), room)
    inputs = np.maximum(inputs, samples == 0)
    targets = rng.integers(1, shape.targets + 1, count)
    return DrawnTable(task, np.stack([samples, inputs, targets], 1).astype(np.int32))
