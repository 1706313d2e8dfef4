"""A tiny corpus, built once."""

from pathlib import Path

import pytest

from slm_jax.demo import corpus


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "corpus"
    return corpus.build_corpus(directory, corpus.preset("tiny"), processes=1, report=lambda line: None)
