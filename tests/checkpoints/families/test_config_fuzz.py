"""Whatever a `config.json` holds, a family returns a configuration or says in a sentence why not."""

import contextlib
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import WHISPER

from slm_jax.checkpoints.families import gemma3n, t5, w2v_bert, wav2vec2, whisper
from slm_jax.checkpoints.sources.base import TensorInfo
from slm_jax.errors import UserError
from slm_jax.models.conformer import preset
from slm_jax.models.t5 import T5Config
from slm_jax.models.wav2vec2 import Wav2Vec2Config

EXAMPLES = int(os.environ.get("SLM_FUZZ_EXAMPLES", "60"))
# (family, a configuration of ours, what its feature extractor's file may say)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "t5": (t5.FAMILY, T5Config(encoder_layers=2, decoder_layers=2), {}),
    "whisper": (
        whisper.FAMILY,
        WHISPER,
        {"feature_size": 16, "hop_length": 160, "n_fft": 400, "chunk_length": 0.4, "dither": 0.0},
    ),
    "wav2vec2": (wav2vec2.FAMILY, Wav2Vec2Config(), {"do_normalize": True, "feature_size": 1}),
    "w2v_bert": (w2v_bert.FAMILY, preset("w2v_bert"), {"num_mel_bins": 80, "stride": 2}),
    "gemma3n": (
        gemma3n.FAMILY,
        preset("gemma3n"),
        {
            "feature_size": 128, "frame_length_ms": 32.0, "hop_length_ms": 10.0, "min_frequency": 125.0,
            "max_frequency": 7600.0, "preemphasis": 0.97, "mel_floor": 1e-5, "input_scale_factor": 1.0,
            "fft_overdrive": True, "per_bin_mean": None, "per_bin_stddev": None, "fft_length": 1024,
        },
    ),
}  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from([1 << 24, 1 << 63, -(1 << 63), 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "gelu", "relu", "gated-gelu", "none", "12", "é\n", "x" * 3000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def infos(family: Any, config: Any) -> dict[str, TensorInfo]:
    return {
        piece.source: TensorInfo(piece.layout.theirs, np.dtype(np.float32))
        for piece in family.hf_pieces(config)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_config_of_returns_or_says_why_not(name):
    family, config, extractor = FAMILIES[name]
    written, tensors = family.hf_config(config), infos(family, config)
    fields = [(False, field) for field in written] + [
        (True, field) for field in (*extractor, "sampling_rate")
    ]
    outcomes = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(
        st.lists(st.tuples(st.sampled_from(fields), VALUES), min_size=1, max_size=3),
        st.one_of(st.just(extractor), VALUES),
    )
    def run(changes, beside):
        found = dict(written)
        found["feature_extractor"] = dict(beside) if isinstance(beside, dict) else beside
        for (of_extractor, field), value in changes:
            inside = found["feature_extractor"]
            if not of_extractor:
                found[field] = value
            elif isinstance(inside, dict):
                inside[field] = value
        try:
            hash(family.config_of(found, tensors))
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
            outcomes.add("refused")

    assert family.config_of(written | {"feature_extractor": extractor}, tensors)
    run()
    assert outcomes == {"read", "refused"}


def test_no_field_of_a_wrong_sort_is_taken_for_a_size():
    """Every number of a size, one by one: a string, a fraction, a boolean and a list in its place."""
    for name, (family, config, _) in FAMILIES.items():
        written, tensors = family.hf_config(config), infos(family, config)
        read = family.config_of(written, tensors)
        for field, value in written.items():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            for wrong in (str(value), value + 0.5, [value], -value - 1, float("nan"), 10**400):
                with contextlib.suppress(UserError):
                    assert family.config_of(written | {field: wrong}, tensors) == read, (name, field, wrong)
