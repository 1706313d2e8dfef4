"""Which of a directory's files hold the weights, and what is said of those that cannot be read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from published import write_whisper

from slm_jax.checkpoints.sources.huggingface import HuggingFaceSource
from slm_jax.errors import UserError


@pytest.mark.parametrize(
    "stale", ["{", json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})]
)
def test_the_whole_file_counts_and_not_an_index_left_beside_it(tmp_path, stale):
    tensors = write_whisper(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(stale)
    source = HuggingFaceSource(tmp_path)
    assert source.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_must_not_be_read_is_not_called_absent(tmp_path, monkeypatch, name):
    write_whisper(tmp_path)
    # Whoever runs the tests may read everything.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name and access(path, mode))
    with pytest.raises(UserError, match=f"{name} cannot be read: permission denied"):
        HuggingFaceSource(tmp_path)
