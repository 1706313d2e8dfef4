"""Where an encoder has fewer frames than an utterance's samples say, the LLM sees padding in their place."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from slm_jax.audio.kaldi_fbank import KaldiFbankConfig
from slm_jax.models import conformer, slm
from slm_jax.models.reducers import DropReducer, StackReducer

ENCODER = conformer.preset(
    "w2v_bert",
    layers=1,
    dim=16,
    heads=2,
    ffn_dim=32,
    conv_kernel=5,
    kaldi_fbank=KaldiFbankConfig(mel_bins=10),
)


@pytest.mark.parametrize("reducer", [DropReducer(4), StackReducer(4)])
def test_the_last_position_is_padding(rng, reducer):
    config = dataclasses.replace(slm.preset("tiny"), speech_encoder=ENCODER, reducer=reducer)
    model = slm.SLM(config)
    # Five positions by its samples, but 16 frames, none of which the fifth would hold.
    samples = 1280 * 4 + 300
    batch = {
        "speech": rng.integers(-9000, 9000, (1, 1, 1280 * 5)).astype(np.int16),
        "speech_segments": np.array([[[[1, 0, samples]]]], np.int32),
        "inputs": np.array([[5, 6, 7]], np.int32),
        "layout": np.arange(8, dtype=np.int32)[None],
        "layout_segment_ids": np.ones((1, 8), np.int32),
        "targets": np.array([[4, 5, 1]], np.int32),
        "target_segment_ids": np.ones((1, 3), np.int32),
        "target_positions": np.arange(3, dtype=np.int32)[None],
    }
    variables: Any = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch))

    @jax.jit
    def run(batch):
        scores: Any = model.apply(variables, batch)
        return model.apply(variables, batch, method="encode"), scores["token_losses"]

    (_, ids), losses = run(batch)
    np.testing.assert_array_equal(ids, [[1, 1, 1, 1, 0, 1, 1, 1]])
    # What is said in the layout of the absent position is of no effect, as nobody attends to it.
    hidden = np.array([[0, 1, 2, 3, -1, 5, 6, 7]], np.int32)
    explicit = batch | {"layout": hidden, "layout_segment_ids": np.where(hidden >= 0, 1, 0).astype(np.int32)}
    np.testing.assert_allclose(run(explicit)[1], losses, rtol=1e-5)

    arguments = (batch["speech"], batch["speech_segments"])
    frames, _ = jax.jit(lambda v: model.apply(v, *arguments, method="reduced_speech"))(variables)
    stored = {name: array for name, array in batch.items() if name != "speech"} | {
        "speech_frames": np.asarray(frames),
        "speech_segments": np.array([[[[1, 0, 1280 * 5]]]], np.int32),
    }
    (_, ids), found = run(stored)
    np.testing.assert_array_equal(ids, [[1, 1, 1, 1, 0, 1, 1, 1]])
    np.testing.assert_allclose(found, losses, rtol=1e-5)
