"""Real audio, and the way from a source through the index to samples."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import seqio
import soundfile

from slm_jax.data import preprocessors
from slm_jax.data.audio_files import load_audio, load_utterance
from slm_jax.data.index import build_index
from slm_jax.data.references import Reference
from slm_jax.data.sources import ReferenceSource, fields
from slm_jax.errors import BadExample

FORMATS = {"wav": {}, "flac": {}, "ogg": {}, "mp3": {}, "opus": {"format": "OGG", "subtype": "OPUS"}}


class Clip(NamedTuple):
    """An audio file and what was said in it."""

    name: str
    path: Path
    text: str
    rate: int
    seconds: float

    @property
    def samples(self) -> np.ndarray:
        return load_audio(self.path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def clips(tmp_path: Path, rng: np.random.Generator) -> list[Clip]:
    """Two clips of each format, at several rates."""
    (tmp_path / "clips").mkdir()
    found: list[Clip] = []
    for i, (suffix, options) in enumerate([*FORMATS.items()] * 2):
        rate = 16_000 if suffix == "opus" else int(rng.choice([8_000, 16_000, 44_100]))
        path = tmp_path / "clips" / f"clip-{i:02d}.{suffix}"
        wave = 0.1 * rng.standard_normal(int(rate * rng.uniform(0.3, 1.0)))
        soundfile.write(path, wave, rate, **options)
        found.append(Clip(path.stem, path, f"said in {path.name} ü", rate, soundfile.info(path).duration))
    return found


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A stretch of time in which no header inside a shard can be read."""

    def fail(path: str, part: str) -> int:
        raise BadExample("unreadable_audio", f"{path}: too many open files")

    @contextlib.contextmanager
    def stretch() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(fields, "count_samples", fail)
            yield

    return stretch


Loaded = dict[str, tuple[Reference, np.ndarray]]


@pytest.fixture
def load_all(tmp_path: Path, vocabulary: seqio.Vocabulary) -> Callable[..., Loaded]:
    """Returns id -> reference and samples of a source, by a task, its index and the loader."""

    def load(source: ReferenceSource, split: str = "train") -> Loaded:
        feature = seqio.Feature(vocabulary, add_eos=True)
        task = seqio.Task(
            "t",
            source=source,
            preprocessors=[
                preprocessors.add_language_names,
                functools.partial(
                    preprocessors.render_prompts, templates=("{speech}",), target="{text}", salt="t"
                ),
                preprocessors.tokenize_prompts,
            ],
            output_features={"inputs": feature, "targets": feature},
            metric_fns=[],
        )
        limits = {"speech": 1_000_000, "inputs": 100, "targets": 200}
        table = build_index(task, split, limits, tmp_path / "index")
        assert table.report.rejected == {}
        assert source.num_input_examples(split) == len(table)
        return {
            reference.id: (reference, load_utterance(reference).samples) for reference in table.references()
        }

    return load


@pytest.fixture
def check_audio(load_all: Callable[..., Loaded]) -> Callable[..., None]:
    """Says whether a source's split has these samples by id, up to what durations round off."""

    def check(source: ReferenceSource, expected: dict[str, np.ndarray], split: str = "train") -> None:
        loaded = load_all(source, split)
        assert loaded.keys() == expected.keys()
        for id_, (reference, samples) in loaded.items():
            wanted = expected[id_]
            assert abs(len(samples) - len(wanted)) <= 160, id_
            assert len(samples) == min(reference.samples, len(wanted))
            np.testing.assert_array_equal(samples, wanted[: len(samples)], err_msg=id_)

    return check
