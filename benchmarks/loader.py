"""Hours of audio a second: decoding alone, the whole loader, the loader with augmentation.

    python benchmarks/loader.py --to runs/loader

Writes FLAC files of 5 to 20 s at 16 kHz that compress as speech does, a manifest, noises and rooms into the
folder, once; then reads them with two threads, each way in turn and several times over, so that whatever else
the machine does meets all ways alike. Prints JSON: medians, and their ratios to decoding alone.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import sentencepiece
import soundfile

RATE = 16_000
SHORTEST, LONGEST = 5, 20
# Rows hold several utterances, as in training.
ROWS, ROW_SECONDS = 8, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--to", type=Path, required=True, help="folder for the files; used again by the next run"
    )
    parser.add_argument("--files", type=int, default=400, help="utterances")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    manifest, vocabulary = write_corpus(args.to.absolute(), args.files)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    paths = [manifest.parent / line["audio"] for line in lines]
    hours = sum(line["duration"] for line in lines) / 3600

    ways = {"decode alone": lambda: decode_alone(paths, args.threads)}
    read = make_loader(manifest, vocabulary, args.to / "cache", args.threads)
    ways["loader"] = lambda: read(None)
    for name, config in augmentations(args.to.absolute()).items():
        ways[f"loader, {name}"] = functools.partial(read, augmented(config))
    seconds = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(args.repetitions):
        for name, way in ways.items():
            began = time.monotonic()
            samples = way()
            seconds[name].append(time.monotonic() - began)
            # Another speed has other lengths; what counts is what was read.
            assert abs(samples / RATE / 3600 / hours - 1) < 0.2, (name, samples)
    rates = {name: hours / statistics.median(found) for name, found in seconds.items()}
    size = sum(path.stat().st_size for path in paths)
    result = {
        "hours_per_second": {name: round(rate, 4) for name, rate in rates.items()},
        "of_decode_alone": {name: round(rate / rates["decode alone"], 3) for name, rate in rates.items()},
        "spread": {name: round(max(found) / min(found), 2) for name, found in seconds.items()},
        "threads": args.threads,
        "cores": os.cpu_count(),
        "files": len(paths),
        "hours": round(hours, 3),
        "flac_bytes_per_second": round(size / hours / 3600),
        "repetitions": args.repetitions,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "soundfile": soundfile.__version__,
            "libsndfile": soundfile.__libsndfile_version__,
        },
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def decode_alone(paths: list[Path], threads: int) -> int:
    """Returns the samples of all files, each decoded to int16 and dropped."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda path: len(soundfile.read(path, dtype="int16")[0]), paths))


def make_loader(
    manifest: Path, vocabulary: Path, cache: Path, threads: int
) -> Callable[[Callable[[Any], Any] | None], int]:
    """Returns what reads one epoch of the corpus as a run does, to arrays of the host."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from slm_jax.data import host_tensorflow  # noqa: F401
    from slm_jax.data.batch import BatchShape
    from slm_jax.data.iterator import TrainBatches
    from slm_jax.data.plan import Packing, plan_mixture
    from slm_jax.tasks.asr import register_asr

    register_asr("loader", manifests={"train": manifest}, vocabulary=vocabulary)
    lengths = {"speech": ROW_SECONDS * RATE, "inputs": 256, "targets": 256}
    shape = BatchShape.from_feature_lengths(
        lengths, rows=ROWS, samples_per_position=2560, segments=ROW_SECONDS // SHORTEST
    )
    packing = Packing(pack=True)
    plan = plan_mixture("loader", "train", lengths, shape, cache_dir=cache, seed=0, epochs=1, packing=packing)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def read(load: Callable[[Any], Any] | None) -> int:
        options: dict[str, Any] = {"load": load} if load else {}
        source = TrainBatches(plan, shape, sharding, threads=threads, **options)
        seconds = sum(batch.stats["audio_seconds"] for batch in source.host_batches(0))
        return round(seconds * RATE)

    return read


def augmentations(folder: Path) -> dict[str, Any]:
    """Returns each effect on every utterance, and all of them as often as is usual."""
    from slm_jax.data.augmentation import (
        AugmentationConfig,
        CodecConfig,
        GainConfig,
        NoiseConfig,
        RoomConfig,
        SpeedConfig,
    )

    noises, rooms = [str(folder / "noises")], [str(folder / "rooms")]
    return {
        "speed": AugmentationConfig(speed=SpeedConfig([1.1])),
        "gain": AugmentationConfig(gain=GainConfig()),
        "noise": AugmentationConfig(noise=NoiseConfig(noises, probability=1.0)),
        "pink noise": AugmentationConfig(noise=NoiseConfig(generated=["pink"], probability=1.0)),
        "room": AugmentationConfig(room=RoomConfig(rooms, probability=1.0)),
        **{
            name: AugmentationConfig(codec=CodecConfig([name], probability=1.0))
            for name in ("mu_law", "gsm", "mp3", "vorbis", "opus")
        },
        "usual mix": AugmentationConfig(
            speed=SpeedConfig([1.0, 1.1]),
            room=RoomConfig(rooms, probability=0.3),
            noise=NoiseConfig(noises, ["white", "pink"], probability=0.5),
            gain=GainConfig(),
            codec=CodecConfig(probability=0.2),
        ),
    }


def augmented(config: Any) -> Callable[[Any], Any]:
    """Returns a `load` that augments every utterance, by a draw of its own: the same one in every epoch.

    The plan's rows are those of the files, so that all ways read the same; a speed above 1 leaves room.
    """
    from slm_jax.data.augmentation import Augmenter, samples_at

    augmenter = Augmenter(config)

    def load(reference: Any) -> Any:
        draw = int.from_bytes(hashlib.sha256(reference.id.encode()).digest()[:8], "little")
        speed = float(config.speed.speeds([draw])[0]) if config.speed else 1.0
        samples = int(samples_at(reference.samples, speed))
        return augmenter(dataclasses.replace(reference, draw=draw, speed=speed, samples=samples))

    return load


def write_corpus(folder: Path, files: int) -> tuple[Path, Path]:
    """Returns manifest and vocabulary of a corpus in the folder, made where it is not there."""
    manifest, vocabulary = folder / "train.jsonl", folder / "pieces.model"
    if manifest.exists() and len(manifest.read_text().splitlines()) == files:
        return manifest, vocabulary
    for name in ("audio", "noises", "rooms"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(20):
        soundfile.write(folder / f"noises/{i}.wav", 0.1 * rng.standard_normal(30 * RATE).clip(-8, 8), RATE)
        decay = np.exp(-np.arange(RATE // 2) / (RATE * rng.uniform(0.02, 0.1)))
        soundfile.write(folder / f"rooms/{i}.wav", 0.2 * decay * rng.standard_normal(RATE // 2), RATE)
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(["some words to say in a row", "and more Transcribe the speech:"] * 50),
        model_prefix=str(vocabulary.with_suffix("")), vocab_size=60, model_type="bpe", minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    lines = []
    for i in range(files):
        wave = speech_like(rng, rng.integers(SHORTEST * RATE, LONGEST * RATE))
        soundfile.write(folder / f"audio/{i}.flac", wave, RATE)
        line = {"id": f"u{i}", "audio": f"audio/{i}.flac", "duration": len(wave) / RATE, "language": "en"}
        lines.append(json.dumps(line | {"text": "some words to say"}))
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, vocabulary


def speech_like(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Returns int16 [n]: pulses and noise through formants, in syllables, over a floor of noise."""
    seconds = np.arange(samples) / RATE
    turns = np.cumsum(rng.uniform(90, 220) * (1 + 0.2 * np.sin(2 * np.pi * 0.4 * seconds))) / RATE
    source = np.diff(np.floor(turns), prepend=0) * 8 + 0.3 * rng.standard_normal(samples)
    starts = np.arange(0, LONGEST, 0.12)
    syllables = np.interp(seconds, starts, rng.random(len(starts)) ** 2)
    spectrum = np.fft.rfft(source * syllables)
    hertz = np.fft.rfftfreq(samples, 1 / RATE)
    formants = sum(1 / (1 + ((hertz - f) / (0.1 * f)) ** 2) for f in (500, 1500, 2500, 3800))
    wave = np.fft.irfft(spectrum * (formants + 0.02) / (1 + hertz / 1000), samples)
    wave = wave / np.abs(wave).max() * rng.uniform(0.1, 0.8) + 0.001 * rng.standard_normal(samples)
    return np.rint(32767 * wave.clip(-1, 1)).astype(np.int16)


if __name__ == "__main__":
    main()
