"""A corpus of which 2 % of the files are broken, in every way there is, is read to its end and counted."""

import json
import logging
import threading
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.data.audio_files import load_utterance
from slm_jax.data.batch import BatchShape
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.plan import Packing, Plan, plan_mixture
from slm_jax.errors import UserError
from slm_jax.tasks.asr import register_asr

COUNT, SAMPLES = 600, 1_600
LENGTHS = {"speech": 16_000, "inputs": 200, "targets": 60}
SHAPE = BatchShape.from_feature_lengths(LENGTHS, rows=8, samples_per_position=640, segments=8)


def broken(path: Path, reason: str, rng: np.random.Generator) -> None:
    """Breaks a WAV file of a tenth of a second."""
    wave = rng.integers(-20_000, 20_000, SAMPLES).astype(np.int16)
    if reason == "missing_file":
        path.unlink()
    elif reason == "unreadable_audio":
        path.write_bytes(rng.bytes(3_000))
    elif reason == "empty_audio":
        soundfile.write(path, wave[:0], 16_000)
    elif reason == "non_finite_audio":
        soundfile.write(path, np.where(wave > 19_000, np.nan, wave / 32768), 16_000, subtype="FLOAT")
    elif reason == "bad_sample_rate":
        soundfile.write(path, wave, 500)
    elif reason == "longer_than_reference":
        soundfile.write(path, np.tile(wave, 8), 16_000)
    else:
        assert reason == "shorter_than_reference"
        soundfile.write(path, wave[:200], 16_000)


REASONS = (
    "missing_file", "unreadable_audio", "empty_audio", "non_finite_audio", "bad_sample_rate",
    "longer_than_reference", "shorter_than_reference",
)  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path, rng: np.random.Generator, vocabulary_path: Path) -> tuple[Plan, Counter, Counter]:
    """The plan of one pass, what is rejected by the index, and what is when it is read."""
    lines, unread, unheard = [], Counter(), Counter()
    where = rng.permutation(COUNT)
    for i in range(COUNT):
        samples = SAMPLES + (6_000 if i in where[:2] else 0)
        soundfile.write(tmp_path / f"{i}.wav", rng.integers(-9_000, 9_000, samples).astype(np.int16), 16_000)
        line = {
            "id": f"u{i}",
            "audio": f"{i}.wav",
            "duration": samples / 16_000,
            "language": "en",
            "text": "a",
        }
        lines.append(line)
    for number, i in enumerate(where[: COUNT // 50].tolist()):
        # The first two are long, as a file that lacks 250 ms must be.
        reason = "shorter_than_reference" if number < 2 else REASONS[number % (len(REASONS) - 1)]
        broken(tmp_path / f"{i}.wav", reason, rng)
        unheard[reason] += 1
    for reason, change in {
        "empty_target": {"text": " "},
        "non_positive_duration": {"duration": -1},
        "speech_too_long": {"duration": 2},
        "missing_audio": {"audio": ""},
    }.items():
        lines.append({**lines[0], "id": reason, **change})
        unread[reason] += 1
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    register_asr("t", manifests={"train": tmp_path / "m.jsonl"}, vocabulary=vocabulary_path)
    packing = Packing(True, block=64)
    plan = plan_mixture(
        "t", "train", LENGTHS, SHAPE, cache_dir=tmp_path / "cache", seed=1, epochs=1, packing=packing
    )
    return plan, unread, unheard


def source(plan: Plan, share: float) -> TrainBatches:
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    return TrainBatches(plan, SHAPE, NamedSharding(mesh, PartitionSpec("data")), max_bad_share=share)


def test_a_corpus_with_broken_files_is_read_to_its_end_and_counted(corpus, caplog):
    plan, unread, unheard = corpus
    assert Counter(plan.tables[0].report.rejected) == unread
    totals: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING, "slm_jax.data.iterator"):
        for batch in source(plan, 0.05).host_batches(0):
            totals.update(batch.stats)
    assert totals["examples"] == COUNT
    assert {name: n for name, n in totals.items() if "/" in name} == {
        f"rejected/{reason}": n for reason, n in unheard.items()
    }
    assert unheard.total() == COUNT // 50 and set(unheard) == set(REASONS)
    assert len(caplog.records) == unheard.total()
    assert totals["target_tokens"] > 0


def test_a_smaller_share_stops_it_with_the_counts(corpus):
    plan, _, _ = corpus
    with pytest.raises(
        UserError, match=r"^\d+ of \d+ examples could not be used, more than the share of 0.001"
    ):
        for _ in source(plan, 0.001).host_batches(0):
            pass


def test_a_reader_that_hangs_is_named(corpus, caplog):
    plan, _, _ = corpus
    go_on, asked = threading.Event(), []

    def load(reference):
        if not asked:
            asked.append(reference)
            assert go_on.wait(60)
        return load_utterance(reference)

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    batches = TrainBatches(
        plan, SHAPE, NamedSharding(mesh, PartitionSpec("data")), load=load, stalled_seconds=0.2
    ).host_batches(0)
    release = threading.Timer(0.7, go_on.set)
    release.start()
    with caplog.at_level(logging.WARNING, "slm_jax.data.iterator"):
        next(batches)
    batches.close()
    release.join()
    (stalled,) = {
        r.getMessage().split(" has been")[0] for r in caplog.records if "no batch" in r.getMessage()
    }
    assert stalled == f"no batch is ready: example {asked[0].id} of task t"
