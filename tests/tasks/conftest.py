"""The vocabulary and registries that the tests of `data/` use, for the tasks as well."""

from pathlib import Path

import pytest
import sentencepiece


@pytest.fixture(scope="session")
def task_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with padding 0, EOS 1, unknown 2 and four sentinels as pieces."""
    prefix = tmp_path_factory.mktemp("vocabulary") / "tiny"
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(
            ["the quick brown fox jumps over the lazy dog", "Sphinx of black quartz, judge!"]
        ),
        model_prefix=str(prefix),
        vocab_size=60,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=[f"<extra_id_{i}>" for i in range(4)],
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(autouse=True)
def registries_stay_clean(clean_registries) -> None:
    """Every test of this room takes back what it registered."""
