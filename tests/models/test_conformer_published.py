"""Published Conformers against transformers, with random weights: Gemma 3n's audio tower and w2v-BERT 2.0."""

import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.audio.kaldi_fbank import KaldiFbankConfig
from slm_jax.checkpoints.families import gemma3n, w2v_bert
from slm_jax.models import conformer
from slm_jax.models.conformer import ConformerConfig, ConformerEncoder
from slm_jax.models.networks import abstract_params, boxed_params

SAMPLES = 640 * 24

GEMMA: dict[str, Any] = {
    "three heads": {
        "hidden_size": 24, "conf_num_attention_heads": 3, "conf_num_hidden_layers": 2, "input_feat_size": 18,
        "conf_attention_chunk_size": 4, "conf_attention_context_left": 5, "conf_attention_context_right": 0,
        "conf_attention_logit_cap": 2.0, "conf_conv_kernel_size": 5, "conf_residual_weight": 0.5,
        "sscp_conv_channel_size": (4, 6), "gradient_clipping": 1.5, "conf_reduction_factor": 4,
    },
    "sees ahead": {
        "hidden_size": 20, "conf_num_attention_heads": 5, "conf_num_hidden_layers": 3, "input_feat_size": 13,
        "conf_attention_chunk_size": 3, "conf_attention_context_left": 3, "conf_attention_context_right": 2,
        "conf_attention_logit_cap": 50.0, "conf_conv_kernel_size": 4, "conf_residual_weight": 0.25,
        "sscp_conv_channel_size": (3, 5), "sscp_conv_group_norm_eps": 1e-2, "gradient_clipping": 0.7,
        "conf_reduction_factor": 2,
    },
    "wide window": {
        "hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 2, "input_feat_size": 16,
        "conf_attention_chunk_size": 5, "conf_attention_context_left": 9, "conf_attention_context_right": 1,
        "conf_attention_logit_cap": 5.0, "conf_conv_kernel_size": 7, "conf_residual_weight": 0.8,
        "sscp_conv_channel_size": (8, 4), "gradient_clipping": 2.0, "conf_reduction_factor": 1,
    },
}  # fmt: skip
W2V: dict[str, Any] = {
    "shaw": {
        "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
        "feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 7, "hidden_act": "swish",
        "left_max_position_embeddings": 6, "right_max_position_embeddings": 2,
    },
    "sinusoids": {
        "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 28,
        "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3, "hidden_act": "gelu_new",
        "position_embeddings_type": "relative", "layer_norm_eps": 1e-3,
    },
    "no positions": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 33,
        "feature_projection_input_dim": 26, "conv_depthwise_kernel_size": 31, "hidden_act": "relu",
        "position_embeddings_type": None,
    },
}  # fmt: skip
CASES = [("gemma3n", name) for name in GEMMA] + [("w2v_bert", name) for name in W2V]
# With the published number of mel bins, on which the published extractors insist.
GEMMA["all mel bins"] = GEMMA["three heads"] | {"input_feat_size": 128}
W2V["all mel bins"] = W2V["shaw"] | {"feature_projection_input_dim": 160}


@dataclasses.dataclass
class Case:
    """A published model with its weights, and ours with the same."""

    model: Any
    config: ConformerConfig
    variables: dict

    @property
    def step(self) -> int:
        return self.config.samples_per_frame

    def frames(self, samples: int) -> int:
        """How many frames of an utterance hold speech."""
        if self.step == 320:
            return (samples - 240) // 320
        mel_frames = (-(-samples // 128) * 128 - 513) // 160 + 1
        return -(-mel_frames // 4)


@functools.cache
def case(family: str, name: str, seed: int) -> Case:
    import torch
    from transformers import Gemma3nAudioConfig, Gemma3nAudioEncoder, Wav2Vec2BertConfig, Wav2Vec2BertModel

    rng = np.random.default_rng(seed)
    if family == "gemma3n":
        ours, theirs = gemma3n.FAMILY, Gemma3nAudioEncoder(Gemma3nAudioConfig(**GEMMA[name]))
    else:
        ours, theirs = w2v_bert.FAMILY, Wav2Vec2BertModel(Wav2Vec2BertConfig(**W2V[name]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            noise = torch.from_numpy(rng.normal(size=parameter.shape).astype(np.float32))
            if parameter.ndim == 1:
                parameter += 0.3 * noise
            else:
                parameter.copy_(noise / np.sqrt(noise[0].numel()))
    config = ours.config_of(theirs.config.to_dict(), {})
    return Case(theirs.eval(), config, {"params": filled(ours, config, theirs.state_dict())})


def filled(family, config, state):
    """Our parameters with the values of a torch state, through the family's pieces."""
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), abstract_params(config))
    for piece in family.pieces(config, dict.fromkeys(state)):
        target = functools.reduce(lambda tree, key: tree[key], piece.parameter.split("/"), params)
        target[... if piece.layer is None else piece.layer] = piece.layout.to_ours(
            state[piece.source].numpy()
        )
    return params


@pytest.fixture
def drawn(request, rng):
    # The weights are drawn once for all tests of a run, the speech for each.
    return case(*request.param, seed=int(os.environ["SLM_TEST_SEED"]))


each_case = pytest.mark.parametrize("drawn", CASES, indirect=True, ids=lambda found: f"{found[0]}-{found[1]}")


@functools.partial(jax.jit, static_argnums=0)
def features(config, speech, segments):
    return ConformerEncoder(config).features(speech, segments)


@functools.partial(jax.jit, static_argnums=0)
def encode(config, variables, mel, mel_ids):
    return ConformerEncoder(config).apply(variables, mel, mel_ids, method="encode_features")


def ragged_speech(rng, step):
    """int16 [2, 1, SAMPLES]: three utterances in the first row, of no whole frames, and a short one."""
    speech = rng.integers(-32000, 32000, (2, 1, SAMPLES)).astype(np.int16)
    segments = np.zeros((2, 1, 4, 3), np.int32)
    lengths = [int(n) for n in rng.integers(1300, SAMPLES // 3 - 640, 3)]
    starts = np.cumsum([0] + [-(-n // step) * step for n in lengths])
    places = [(0, 3, starts[0], lengths[0]), (0, 1, starts[1], lengths[1]), (0, 2, starts[2], lengths[2])]
    for index, (row, number, start, count) in enumerate([*places, (1, 4, 1920, 2000)]):
        wave = np.cumsum(rng.normal(size=count)) * 300 + rng.normal(size=count) * 1000
        speech[row, 0, start : start + count] = np.clip(wave, -32000, 32000)
        segments[row, 0, index] = number, start, count
    return speech, segments


def utterances(segments):
    """(row, number, first sample, samples) of each utterance."""
    return [(row, *segments[row, 0, e]) for row in range(2) for e in range(4) if segments[row, 0, e, 0]]


def theirs_alone(drawn: Case, mel_TM):
    """transformers' frames of one utterance, without padding, before any of them is dropped."""
    import torch

    mel = torch.tensor(np.asarray(mel_TM))[None]
    with torch.no_grad():
        if drawn.step == 320:
            return drawn.model(mel).last_hidden_state[0].numpy()
        drawn.model.config.conf_reduction_factor = 1
        return drawn.model(mel, torch.zeros(mel.shape[:2], dtype=torch.bool)).last_hidden_state[0].numpy()


@each_case
def test_packed_frames_match_transformers(rng, drawn):
    speech, segments = ragged_speech(rng, drawn.step)
    mel, mel_ids = features(drawn.config, speech, segments)
    frames, ids = encode(drawn.config, drawn.variables, mel, mel_ids)
    for row, number, start, samples in utterances(segments):
        expected = theirs_alone(drawn, np.asarray(mel[row, 0])[np.asarray(mel_ids[row, 0]) == number])
        count = drawn.frames(samples)
        assert len(expected) == count
        first = start // drawn.step
        np.testing.assert_array_equal(ids[row, 0, first : first + count], number)
        found = np.asarray(frames[row, 0, first : first + count])
        scale = np.abs(expected).max()
        error = np.abs(found - expected).max() / scale
        print(f"relative error {error:.1e} of {scale:.2f}")
        assert error <= 1e-4
        # The last frames of the contract's ceil(n / step) that the original has not.
        rest = slice(first + count, first + -(-samples // drawn.step))
        assert not np.any(ids[row, 0, rest]) and not np.any(frames[row, 0, rest])
    assert not np.any(np.asarray(frames)[np.asarray(ids) == 0])


@each_case
def test_packed_equals_alone(rng, drawn):
    speech, segments = ragged_speech(rng, drawn.step)
    packed, packed_ids = encode(drawn.config, drawn.variables, *features(drawn.config, speech, segments))
    singles, single_segments = np.zeros_like(speech), np.zeros_like(segments)
    for row, number, start, samples in utterances(segments):
        singles[:] = 0
        single_segments[:] = 0
        singles[0, 0, :samples] = speech[row, 0, start : start + samples]
        single_segments[0, 0, 2] = 1, 0, samples
        frames, ids = encode(drawn.config, drawn.variables, *features(drawn.config, singles, single_segments))
        count = drawn.frames(samples)
        assert (np.asarray(ids[0]) == 1).sum() == (np.asarray(packed_ids[row]) == number).sum() == count
        found = np.asarray(packed[row])[np.asarray(packed_ids[row]) == number]
        # Of order 1, and summed in another order in float32.
        np.testing.assert_allclose(found, np.asarray(frames[0, 0, :count]), atol=1e-4)


@pytest.mark.parametrize("drawn", [("gemma3n", "all mel bins"), ("w2v_bert", "all mel bins")], indirect=True)
def test_waveform_to_frames_matches_transformers(rng, drawn):
    """With the published front end, on an utterance alone: the same number of frames, and the same values."""
    import torch
    import transformers

    samples = int(rng.integers(6000, SAMPLES))
    wave = np.cumsum(rng.normal(size=samples)) * 100 + rng.normal(size=samples) * 1000
    speech = np.zeros((2, 1, SAMPLES), np.int16)
    speech[0, 0, :samples] = np.clip(wave, -32000, 32000)
    segments = np.zeros((2, 1, 4, 3), np.int32)
    segments[0, 0, 1] = 1, 0, samples
    frames, ids = encode(drawn.config, drawn.variables, *features(drawn.config, speech, segments))
    floats = (speech[0, 0, :samples] / 32768).astype(np.float32)
    with torch.no_grad():
        if drawn.step == 320:
            extractor = transformers.SeamlessM4TFeatureExtractor()
            inputs = extractor([floats], sampling_rate=16_000, return_tensors="pt")
            expected = drawn.model(**inputs).last_hidden_state[0, inputs["attention_mask"][0] == 1]
        else:
            drawn.model.config.conf_reduction_factor = 1
            inputs = transformers.Gemma3nAudioFeatureExtractor()([floats], return_tensors="pt")
            expected = drawn.model(inputs["input_features"], ~inputs["input_features_mask"])
            expected = expected.last_hidden_state[0]
    found, expected = np.asarray(frames[0, 0])[np.asarray(ids[0, 0]) > 0], expected.numpy()
    assert len(found) == len(expected) == drawn.frames(samples)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}")
    assert error <= 1e-4


@pytest.mark.parametrize("drawn", [("w2v_bert", name) for name in W2V], indirect=True)
def test_w2v_bert_matches_a_padded_batch(rng, drawn):
    """With its attention mask transformers leaks nothing of the padding into valid frames."""
    import torch

    counts = rng.integers(3, 40, 2)
    mel = rng.normal(size=(2, 48, drawn.config.kaldi_fbank.mel_bins * 2)).astype(np.float32)
    mask = np.arange(48) < counts[:, None]
    with torch.no_grad():
        expected = drawn.model(torch.tensor(mel), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    frames, ids = encode(drawn.config, drawn.variables, mel[:, None], mask[:, None].astype(np.int32))
    np.testing.assert_array_equal(ids[:, 0], mask)
    assert np.abs(np.asarray(frames)[:, 0] - expected)[mask].max() <= 1e-4 * np.abs(expected[mask]).max()


@pytest.mark.parametrize("drawn", [("gemma3n", "three heads")], indirect=True)
def test_gemma3n_matches_a_padded_batch_where_padding_does_not_leak(rng, drawn):
    """transformers' subsampling sees the padding: what it gives for the last two frames depends on it."""
    import torch

    counts = np.array([31, 77])
    mel = rng.normal(size=(2, 96, 18)).astype(np.float32)
    mask = np.arange(96) < counts[:, None]
    drawn.model.config.conf_reduction_factor = 4
    with torch.no_grad():
        output = drawn.model(torch.tensor(mel), torch.tensor(~mask))
    expected = output.last_hidden_state.numpy()
    mel_ids = np.where(mask, 5, 0)[:, None].astype(np.int32)
    frames, ids = encode(drawn.config, drawn.variables, mel[:, None], mel_ids)
    kept, kept_ids = np.asarray(frames)[:, 0, ::4], np.asarray(ids)[:, 0, ::4]
    np.testing.assert_array_equal(kept_ids > 0, ~output.audio_mel_mask.numpy())
    # Frame f sees the mel frames from 4 f to 4 f + 6, and its window reaches back alone.
    clean = (kept_ids > 0) & (np.arange(6) * 16 + 6 < counts[:, None])
    assert clean.sum() == 2 + 5
    assert np.abs(kept - expected)[clean].max() <= 1e-4 * np.abs(expected[clean]).max()


@pytest.mark.parametrize(
    ("drawn", "change"),
    [
        (("gemma3n", "three heads"), {"clip": None}),
        (("gemma3n", "three heads"), {"logit_cap": None}),
        (("gemma3n", "three heads"), {"left_context": 0}),
        (("w2v_bert", "shaw"), {"norm_epsilon": 1e-1}),
    ],
    indirect=["drawn"],
)
def test_each_switch_matters(rng, drawn, change):
    """So that parity says something: what these weights compute depends on it far beyond the tolerance."""
    mel, mel_ids = features(drawn.config, *ragged_speech(rng, drawn.step))
    exact, _ = encode(drawn.config, drawn.variables, mel, mel_ids)
    other, _ = encode(dataclasses.replace(drawn.config, **change), drawn.variables, mel, mel_ids)
    assert np.abs(np.asarray(exact) - np.asarray(other)).max() > 1e-2


@pytest.mark.parametrize("name", ["gemma3n", "w2v_bert"])
def test_presets_from_shapes_alone(name):
    encoder = ConformerEncoder(conformer.preset(name))
    step = encoder.samples_per_frame
    speech = jax.ShapeDtypeStruct((2, 1, 20 * step), jnp.int16)
    segments = jax.ShapeDtypeStruct((2, 1, 3, 3), jnp.int32)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), speech, segments)
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim and None not in leaf.names
    frames, ids = jax.eval_shape(encoder.apply, nn.unbox(boxed), speech, segments)
    assert encoder.packs and frames.shape == (2, 1, 20, encoder.dim) and ids.shape == (2, 1, 20)
    assert step == {"gemma3n": 640, "w2v_bert": 320}[name]


@pytest.mark.parametrize("drawn", [("gemma3n", "three heads"), ("w2v_bert", "shaw")], indirect=True)
def test_bfloat16_computes_close_to_float32(rng, drawn):
    mel, mel_ids = features(drawn.config, *ragged_speech(rng, drawn.step))
    exact, _ = encode(drawn.config, drawn.variables, mel, mel_ids)
    rough, _ = encode(dataclasses.replace(drawn.config, dtype="bfloat16"), drawn.variables, mel, mel_ids)
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rough, np.float32) - np.asarray(exact))
    assert 0 < error.mean() < 0.05 * np.abs(np.asarray(exact)).mean()


@pytest.mark.parametrize("name", ["gemma3n", "w2v_bert"])
def test_large_matrices_are_named_as_such(name):
    """By its axes int8 knows a matrix from a convolution, and Muon what a product sums over."""
    boxed: Any = boxed_params(conformer.preset(name))
    assert boxed["layers"]["conv"]["value_gate"]["kernel"].names == ("layers", "embed", "gates", "mlp")
    if name == "w2v_bert":
        assert boxed["projection"]["out"]["kernel"].names == ("mlp", "embed")


def test_refuses_samples_that_do_not_fill_frames():
    config = ConformerConfig(
        front_end="kaldi_fbank", subsampling="projection", kaldi_fbank=KaldiFbankConfig()
    )
    with pytest.raises(ValueError, match="no multiple of the frame's 320"):
        ConformerEncoder(config).features(
            jnp.zeros((1, 1, 800), jnp.int16), jnp.zeros((1, 1, 1, 3), jnp.int32)
        )
