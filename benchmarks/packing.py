"""How full rows are: fixed length, eight buckets and packing, on durations drawn like published corpora's.

Planning needs lengths alone, so nothing is read. Durations in seconds, after the corpora's descriptions:
- librispeech: three of four normal around 14.5, deviation 1.2, cut to 10 .. 17.3, the rest uniform 1.3 .. 13;
- common_voice: log-normal, median 4.9, sigma 0.38, cut to 1 .. 15;
- mls: uniform 10 .. 20.
A prompt has 10 to 15 tokens; a target 3 tokens a second, give or take a fifth. A speech position is 160 ms.

    python benchmarks/packing.py [--references 200000] [--row_seconds 120] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slm_jax.data.batch import BatchShape
from slm_jax.data.plan import Packing, Plan
from slm_jax.data.references import SAMPLE_RATE

SAMPLES_PER_POSITION = 2_560
ROWS = 16


def librispeech(rng: np.random.Generator, count: int) -> np.ndarray:
    """Seconds of utterances like LibriSpeech's."""
    long = np.clip(rng.normal(14.5, 1.2, count), 10, 17.3)
    return np.where(rng.random(count) < 0.75, long, rng.uniform(1.3, 13, count))


def common_voice(rng: np.random.Generator, count: int) -> np.ndarray:
    """Seconds of utterances like Common Voice's."""
    return np.clip(rng.lognormal(np.log(4.9), 0.38, count), 1, 15)


def mls(rng: np.random.Generator, count: int) -> np.ndarray:
    """Seconds of utterances like MLS's."""
    return rng.uniform(10, 20, count)


CORPORA: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "librispeech": librispeech,
    "common_voice": common_voice,
    "mls": mls,
}


class DrawnTable:
    """An index table of lengths alone.

    Args:
      seconds: of each utterance.
      rng: draws prompts and targets.
    """

    fingerprint = "drawn"
    shards = np.zeros(0, np.int64)

    def __init__(self, task: str, seconds: np.ndarray, rng: np.random.Generator):
        self.task = task
        targets = np.maximum(2, seconds * 3 * rng.uniform(0.8, 1.2, len(seconds)))
        prompts = rng.integers(10, 16, len(seconds))
        self.lengths = np.stack([seconds * SAMPLE_RATE, prompts, targets], axis=1).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: np.ndarray) -> list:
        """Returns nothing: there are no references."""
        raise NotImplementedError


def shape_of(table: DrawnTable, seconds: float, segments: int) -> BatchShape:
    """Returns rows of so many seconds, with room for the text that goes with them."""
    samples = round(seconds * SAMPLE_RATE / SAMPLES_PER_POSITION) * SAMPLES_PER_POSITION
    longest = table.lengths.max(axis=0)
    if segments == 1:
        inputs, targets = int(longest[1]), int(longest[2])
        layout = samples // SAMPLES_PER_POSITION + inputs
    else:
        examples = samples / table.lengths[:, 0].mean()
        positions = samples / SAMPLES_PER_POSITION + examples * table.lengths[:, 1].mean()
        inputs, layout = int(examples * 13 * 1.4), int(positions * 1.04)
        targets = int(examples * table.lengths[:, 2].mean() * 1.12)
    return BatchShape(
        ROWS, 1, samples, segments, inputs, layout, targets, samples_per_position=SAMPLES_PER_POSITION
    )


def useful(table: DrawnTable, shape: BatchShape, packing: Packing) -> dict[str, float]:
    """Returns the shares of rows that are no padding over one pass, rows that it took, and its speed."""
    plan = Plan([table], None, 0, ROWS, shape, epochs=1, packing=packing)
    used, room, rows, start = np.zeros(3), np.zeros(3), 0, time.perf_counter()
    while found := plan.blocks(rows, 1):
        block, first, _ = found[0]
        assert not first
        sizes = block.sizes
        used += [block.samples.sum(), (sizes.positions + sizes.inputs).sum(), sizes.targets.sum()]
        for bucket, count in zip(*np.unique(block.bucket, return_counts=True), strict=True):
            own = plan.shapes[bucket]
            room += count * np.array([own.samples, own.layout, own.targets])
        rows += block.rows
    seconds = time.perf_counter() - start
    shares = dict(zip(("speech", "encoder", "decoder"), (used / room).tolist(), strict=True))
    return {**shares, "rows": rows, "references_per_second": len(table) / seconds}


def measure(references: int, row_seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Returns corpus -> way -> shares."""
    results = {}
    for name, draw in CORPORA.items():
        rng = np.random.default_rng(0)
        table = DrawnTable(name, draw(rng, references), rng)
        samples = table.lengths[:, 0]
        alone = shape_of(table, float(samples.max()) / SAMPLE_RATE + 0.1, 1)
        buckets = tuple(int(length) for length in np.quantile(samples, np.arange(1, 8) / 8))
        results[name] = {
            "fixed": useful(table, alone, Packing()),
            "8 buckets": useful(table, alone, Packing(True, buckets=buckets)),
            "packed": useful(table, shape_of(table, row_seconds, int(row_seconds)), Packing(True)),
        }
    return results


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--references", type=int, default=200_000)
    parser.add_argument("--row_seconds", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = measure(args.references, args.row_seconds)
    print("corpus        rows       speech  encoder  decoder  references/s")
    for corpus, ways in results.items():
        for way, found in ways.items():
            shares = "  ".join(f"{100 * found[part]:5.1f} %" for part in ("speech", "encoder", "decoder"))
            print(f"{corpus:13} {way:10} {shares}  {found['references_per_second']:12,.0f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
