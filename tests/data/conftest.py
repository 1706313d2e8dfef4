"""A tiny vocabulary, manifests and audio files for the tests of `data/`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import seqio
import soundfile

WORDS = ["please", "book", "a", "table", "for", "two", "at", "the", "grand", "hotel", "station", "call"]


@pytest.fixture(scope="session")
def vocabulary_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with padding 0, EOS 1, unknown 2 and ten sentinels as pieces."""
    prefix = tmp_path_factory.mktemp("vocabulary") / "tiny"
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.permutation(WORDS)) for _ in range(50)]
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([*sentences, "Transcribe the speech: Was it this? Translate into German!"]),
        model_prefix=str(prefix),
        vocab_size=90,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=[f"<extra_id_{i}>" for i in range(10)],
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def vocabulary(vocabulary_path: Path) -> seqio.SentencePieceVocabulary:
    return seqio.SentencePieceVocabulary(str(vocabulary_path), extra_ids=0)


@pytest.fixture(autouse=True)
def registries_stay_clean(clean_registries) -> None:
    """Every test of this room takes back what it registered."""


WriteManifest = Callable[..., Path]


@pytest.fixture
def write_manifest(tmp_path: Path) -> WriteManifest:
    """Writes lines, objects or raw text, as a manifest."""

    def write(lines: list[object], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_corpus(
    tmp_path: Path, rng: np.random.Generator, write_manifest: WriteManifest
) -> Callable[[int], Path]:
    """Writes real audio files of 0.1 to 0.6 s and their manifest."""

    def write(count: int) -> Path:
        lines: list[object] = []
        for i in range(count):
            samples = int(rng.integers(1_600, 9_600))
            wave = rng.integers(-20_000, 20_000, samples).astype(np.int16)
            soundfile.write(tmp_path / f"u{i}.wav", wave, 16_000)
            lines.append(
                {
                    "id": f"u{i}",
                    "audio": f"u{i}.wav",
                    "duration": samples / 16_000,
                    "language": "en",
                    "text": " ".join(rng.choice(WORDS, rng.integers(1, 6))),
                    "translations": {"de": "Was it"},
                }
            )
        return write_manifest(lines)

    return write
