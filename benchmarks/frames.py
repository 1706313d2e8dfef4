"""Precomputed frames against the live encoder: bytes an hour, time of a step, losses.

    python benchmarks/frames.py --to runs/frames

Makes the demo's corpus in the folder, encodes it in bfloat16 and in int8, and trains the quickstart's adapter
on speech and on both, each in turn and several times over. Also writes an hour of frames as wide as USM 2B's.
Prints JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from slm_jax.cli import gin_config
from slm_jax.cli.run import Run
from slm_jax.cli.wiring import Wiring
from slm_jax.data import shards
from slm_jax.data.frames import DTYPES, Encoded, to_record
from slm_jax.demo.corpus import CorpusConfig, build_corpus
from slm_jax.demo.vocabulary import place_vocabularies
from slm_jax.models.reducers import StackReducer
from slm_jax.training.loop import train

RATE = 16_000
# Positions of 160 ms, features of USM 2B.
STEP, DIM = 2560, 1536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--utterances", type=int, default=400, help="of the demo's corpus")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    folder = args.to.absolute()
    config = CorpusConfig(train=args.utterances, dev=6, test=6, names=4, text=1000)
    place_vocabularies(
        build_corpus(folder / "corpus", config, report=lambda line: print(line, file=sys.stderr))
    )
    bindings = [
        f"CORPUS_DIR={str(folder / 'corpus')!r}",
        f"TRAIN_STEPS={args.steps}",
        "WARMUP_STEPS=10",
        "LOG_PERIOD=10",
        "EVALUATION=None",
        "run.DataConfig.encode_once=False",
    ]
    ways = {"live encoder": ""}
    sizes: dict[str, Any] = {}
    for dtype in DTYPES:
        to = str(folder / f"frames_{dtype}")
        entry = wired_of(folder, bindings).frames.encode(to, dtype=dtype)
        sizes[dtype] = per_second(sum(shard.bytes for shard in entry.shards), entry.samples)
        ways[f"frames, {dtype}"] = to
    sizes |= audio_sizes(folder / "corpus")

    rates: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {}
    for _ in range(args.repetitions):
        for name, frames in ways.items():
            more = [f"run.DataConfig.frames={frames!r}"] if frames else []
            found, losses[name] = trained(folder, [*bindings, *more])
            rates[name] += found
    with rounded_frames():
        _, losses[ROUNDED] = trained(folder, bindings)
    live = statistics.median(rates["live encoder"])
    result = {
        "kB_per_second_of_speech, demo encoder": sizes,
        "kB_per_second_of_speech, as wide as USM 2B": {dtype: wide(folder, dtype) for dtype in DTYPES},
        "steps_per_second": {name: round(statistics.median(found), 3) for name, found in rates.items()},
        "step_time_of_live": {
            name: round(live / statistics.median(found), 3) for name, found in rates.items()
        },
        "relative_difference_of_losses": {
            "frames, bfloat16 to live encoder": differences(losses, "frames, bfloat16", "live encoder"),
            "frames, int8 to live encoder": differences(losses, "frames, int8", "live encoder"),
            f"frames, bfloat16 to {ROUNDED}": differences(losses, "frames, bfloat16", ROUNDED),
        },
        "mean_loss": {name: round(float(np.mean(found)), 4) for name, found in losses.items()},
        "steps": args.steps,
        "repetitions": args.repetitions,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    json.dump(result, sys.stdout, indent=2)
    print()


ROUNDED = "live encoder, rounded to bfloat16"


@contextlib.contextmanager
def rounded_frames() -> Iterator[None]:
    """Makes the live encoder's frames what bfloat16 keeps of them, as they are on disk."""
    kept = StackReducer.__call__

    def rounded(self: StackReducer, frames_BKFD: jax.Array, ids_BKF: jax.Array) -> Any:
        frames_BKPD, ids_BKP = kept(self, frames_BKFD, ids_BKF)
        return frames_BKPD.astype("bfloat16"), ids_BKP

    StackReducer.__call__ = rounded
    try:
        yield
    finally:
        StackReducer.__call__ = kept


def differences(losses: dict[str, list[float]], found: str, expected: str) -> dict[str, float]:
    """Returns how far the losses of two runs are apart, relative to the second's."""
    each = np.abs(np.array(losses[found]) / np.array(losses[expected]) - 1)
    return {
        name: float(f"{value:.2g}")
        for name, value in (("first step", each[0]), ("mean", each.mean()), ("largest", each.max()))
    }


def wired_of(folder: Path, bindings: list[str]) -> Wiring:
    gin_config.parse(["recipes/quickstart.gin"], [f"MODEL_DIR={str(folder / 'run')!r}", *bindings])
    return Wiring(gin_config.build(Run))


def trained(folder: Path, bindings: list[str]) -> tuple[list[float], list[float]]:
    """Trains anew; returns steps a second of each log period but that which compiles, and all losses."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    wired = wired_of(folder, bindings)
    run, rates = wired.run, Rates()
    train(
        run.objective,
        wired.train_batches(),
        model_dir=folder / "run",
        config=dataclasses.replace(run.loop, checkpoint_period=run.loop.train_steps),
        optimizer=run.optimizer,
        mesh=wired.mesh,
        rules=run.mesh.rules,
        load_variables=wired.load_foundations,
        writer=rates,
    )
    lines = (folder / "run" / "steps.jsonl").read_text().splitlines()
    return rates.found[1:], [json.loads(line)["loss"] for line in lines]


class Rates:
    """A writer that keeps the steps a second."""

    def __init__(self):
        self.found: list[float] = []

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self.found += [rate for name, rate in scalars.items() if name.endswith("/steps_per_second")]

    def flush(self) -> None: ...


def per_second(size: int, samples: int) -> float:
    """Returns kB for each second of speech."""
    return round(size / 1000 / (samples / RATE), 2)


def audio_sizes(corpus: Path) -> dict[str, float]:
    """Returns the same of the corpus as PCM, and as FLAC."""
    import soundfile

    samples = flac = 0
    for path in sorted(corpus.rglob("*.flac")):
        samples += soundfile.info(path).frames
        flac += path.stat().st_size
    return {"pcm": per_second(2 * samples, samples), "flac": per_second(flac, samples)}


def wide(folder: Path, dtype: str) -> float:
    """Returns the same of an hour of frames of USM 2B's width, in utterances of 12 s."""
    rng, samples = np.random.default_rng(0), 12 * RATE
    frames = rng.standard_normal((samples // STEP, DIM), np.float32)
    records = (
        to_record(
            f"corpus/audio/speaker/chapter/{number:06d}.flac#@{samples}", Encoded(frames, samples), dtype
        )
        for number in range(300)
    )
    (folder / "wide").mkdir(exist_ok=True)
    return per_second(shards.write_shard(str(folder / "wide"), dtype, records).bytes, 300 * samples)


if __name__ == "__main__":
    main()
