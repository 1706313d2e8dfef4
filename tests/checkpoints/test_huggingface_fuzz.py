"""Damaged files of transformers: refused in a sentence or read; none crashes, hangs, or fills memory."""

import contextlib
import json
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import write_whisper

from slm_jax.checkpoints.conversion import plan_conversion
from slm_jax.checkpoints.sources.huggingface import HuggingFaceSource
from slm_jax.errors import UserError

EXAMPLES = int(os.environ.get("SLM_FUZZ_EXAMPLES", "2000"))
# Beyond the file's own size: what the libraries keep, and the sentence.
CONSTANT = 8 << 20
FILES = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")

# What can happen to a file: (kind, where as a share of its length, what with).
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "write", "cut", "insert", "drop", "number", "header", "double"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)
NUMBERS = [b"0", b"-1", b"1e999", b"18446744073709551615", b"9" * 5000, b"null", b"[]", b'"x"', b"NaN", b"{}"]


def mutated(data: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, what in mutations:
        if not data:
            return data
        at = int(share * len(data))
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << (what[0] % 8))]) + data[at + 1 :]
        elif kind == "write":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + what * (1 + what[0]) + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + what[0] :]
        elif kind == "number":
            # The digits at or after this place become something else that JSON can hold.
            start = next((i for i in range(at, len(data)) if data[i : i + 1].isdigit()), at)
            end = next((i for i in range(start, len(data)) if not data[i : i + 1].isdigit()), len(data))
            data = data[:start] + NUMBERS[what[0] % len(NUMBERS)] + data[end:]
        elif kind == "header":
            # The length of a safetensors header.
            data = what[:8].ljust(8, b"\0") + data[8:]
        else:
            data = data[:at] + data
    return data


class Original:
    """A checkpoint that is whole, and puts itself together again."""

    def __init__(self, folder):
        write_whisper(folder, shards=2)
        self.folder = folder
        self.files = {name: (folder / name).read_bytes() for name in FILES}
        self.bytes = sum(map(len, self.files.values()))

    @contextlib.contextmanager
    def with_file(self, name, data):
        (self.folder / name).write_bytes(data)
        try:
            yield
        finally:
            (self.folder / name).write_bytes(self.files[name])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Original(tmp_path_factory.mktemp("fuzz") / "hf")


def read_all(folder) -> None:
    source = HuggingFaceSource(folder)
    for name, info in source.tensors.items():
        values = source.read(name)
        assert values.shape == info.shape
        assert values.dtype == info.dtype
        if info.shape and info.shape[0]:
            np.testing.assert_array_equal(source.read(name, (slice(0, 1),)), values[:1])


def sentence(error: UserError) -> None:
    assert "\n" not in str(error)
    assert 10 < len(str(error)) < 1500


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=EXAMPLES, **SETTINGS)
@given(name=st.sampled_from(FILES), mutations=MUTATIONS)
def test_a_damaged_file_is_read_or_refused(original, name, mutations):
    damaged = mutated(original.files[name], mutations)
    with original.with_file(name, damaged):
        tracemalloc.start()
        try:
            read_all(original.folder)
        except UserError as error:
            sentence(error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    assert peak < 4 * original.bytes + len(damaged) + CONSTANT


@settings(max_examples=max(EXAMPLES // 20, 20), **SETTINGS)
@given(mutations=MUTATIONS)
def test_a_damaged_configuration_is_planned_or_refused(original, mutations):
    with original.with_file("config.json", mutated(original.files["config.json"], mutations)):
        try:
            plan_conversion(HuggingFaceSource(original.folder))
        except UserError as error:
            sentence(error)


@pytest.mark.parametrize("field", ["encoder_layers", "d_model", "encoder_attention_heads", "num_mel_bins"])
@pytest.mark.parametrize("value", [2**70, -(2**70), 1e300, {"a": 1}, [], "9" * 4000])
def test_a_size_beyond_sense_is_refused(original, field, value):
    config = json.loads(original.files["config.json"]) | {field: value}
    with original.with_file("config.json", json.dumps(config).encode()), pytest.raises(UserError):
        plan_conversion(HuggingFaceSource(original.folder))
