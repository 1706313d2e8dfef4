"""Whisper's encoder against transformers', in float32, with every weight drawn at random."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exchange import check_shapes, infos, named, perturb, to_ours, to_theirs
from safetensors.numpy import save_file
from transformers import WhisperConfig as TheirConfig
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TheirEncoder
from with_encoder import check_in_slm

from slm_jax.checkpoints.families.whisper import FAMILY
from slm_jax.errors import UserError
from slm_jax.models import whisper
from slm_jax.models.encoders import encoder_class, encoder_kind
from slm_jax.models.networks import abstract_params
from slm_jax.models.whisper import WhisperConfig, WhisperEncoder

# 50 positions are one second.
FIELDS = (
    "num_mel_bins", "encoder_layers", "d_model", "encoder_attention_heads", "encoder_ffn_dim",
    "max_source_positions", "activation_function",
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    name: dict(zip(FIELDS, values, strict=True))
    for name, values in {
        "three heads": (80, 2, 36, 3, 40, 50, "gelu"),
        "128 bins": (128, 1, 40, 5, 160, 100, "gelu"),
        "relu": (80, 3, 14, 7, 30, 150, "relu"),
    }.items()
}
DECODER: dict[str, Any] = {
    "decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 8, "vocab_size": 60,
    "pad_token_id": 0,
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def encode(config: WhisperConfig, params, speech, segments):
    return WhisperEncoder(config).apply({"params": params}, speech, segments)


def theirs(rng, name: str) -> Any:
    model = TheirEncoder(TheirConfig(**CONFIGS[name], **DECODER)).eval()
    perturb(model, rng)
    return model


def ragged(rng, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 [2, 2, S]: one utterance that fills the slot, two ragged ones and none; noise behind them."""
    speech = rng.integers(-32000, 32000, (2, 2, samples)).astype(np.int16)
    lengths = np.array([[samples, rng.integers(1, 320)], [rng.integers(700, samples), 0]])
    segments = np.zeros((2, 2, 1, 3), np.int32)
    segments[..., 0, 0], segments[..., 0, 2] = [[1, 2], [1, 0]], lengths
    for index in np.ndindex(2, 2):
        wave = rng.normal(size=lengths[index]) * rng.uniform(20, 9000)
        speech[index][: lengths[index]] = np.clip(wave, -32000, 32000)
    return speech, segments


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_matches_transformers(rng, name):
    model = theirs(rng, name)
    config = FAMILY.config_of(model.config.to_dict(), infos(named(model)))
    params = to_ours(FAMILY, config, named(model))
    window = config.positions * 320
    for samples in (window, 320 * (config.positions // 2 + 3)):
        speech, segments = ragged(rng, samples)
        frames, ids = encode(config, params, speech, segments)
        assert frames.shape == (2, 2, samples // 320, config.dim) and ids.dtype == jnp.int32
        mel, _ = WhisperEncoder(config).features(jnp.asarray(speech), jnp.asarray(segments))
        features = torch.from_numpy(np.array(mel).reshape(4, -1, config.mel_bins).swapaxes(1, 2))
        with torch.no_grad():
            expected = model(features).last_hidden_state.numpy()
        expected = expected[:, : samples // 320].reshape(frames.shape)
        for index in np.ndindex(2, 2):
            number, _, length = segments[index][0]
            count = -(-length // 320)
            np.testing.assert_array_equal(ids[index], np.where(np.arange(samples // 320) < count, number, 0))
            assert not np.any(frames[index][count:])
            error = np.abs(frames[index][:count] - expected[index][:count])
            assert error.max(initial=0) <= 1e-4 * np.abs(expected).max()
            print(name, "relative error", error.max(initial=0) / np.abs(expected).max())


def test_from_waveform_matches_transformers(rng):
    """Extractor and encoder together; features differ by rounding, so the tolerance is wider."""
    model = theirs(rng, "128 bins")
    config = FAMILY.config_of(model.config.to_dict(), {})
    speech, segments = ragged(rng, 320 * 70)
    frames, _ = encode(config, to_ours(FAMILY, config, named(model)), speech, segments)
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=2)
    wave = speech[1, 0, : segments[1, 0, 0, 2]] / np.float32(32768)
    features = extractor(wave, sampling_rate=16_000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = model(features).last_hidden_state.numpy()[0]
    count = -(-len(wave) // 320)
    error = np.abs(frames[1, 0, :count] - expected[:count])
    assert error.max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("prefix", ["", "encoder.", "model.encoder."])
def test_round_trip_is_exact(rng, prefix):
    model = theirs(rng, "three heads")
    tensors = named(model, prefix)
    config = FAMILY.config_of(model.config.to_dict(), infos(tensors))
    params = to_ours(FAMILY, config, tensors)
    back = to_theirs(FAMILY.pieces(config, infos(tensors)), params)
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_whole_whisper_converts_and_transformers_reads_what_is_written(rng, tmp_path):
    model = WhisperForConditionalGeneration(TheirConfig(**CONFIGS["relu"], **DECODER)).eval()
    perturb(model, rng)
    tensors = named(model)
    config = FAMILY.config_of(model.config.to_dict(), infos(tensors))
    params = to_ours(FAMILY, config, tensors)
    assert FAMILY.unused("model.decoder.layer_norm.weight") == "the decoder"
    assert FAMILY.unused("model.encoder.layer_norm.weight") is None

    written = to_theirs(FAMILY.hf_pieces(config), params)
    save(tmp_path, FAMILY.hf_config(config), written)
    loaded: Any = TheirEncoder.from_pretrained(tmp_path, output_loading_info=True)
    read, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    encoder = model.get_encoder()
    features = torch.from_numpy(rng.normal(size=(1, config.mel_bins, 2 * config.positions))).float()
    with torch.no_grad():
        expected = encoder(features).last_hidden_state
        assert torch.equal(read.eval()(features).last_hidden_state, expected)
    assert FAMILY.config_of(read.config.to_dict(), infos(written)) == config


def save(folder, config: dict, tensors: dict[str, np.ndarray]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "selu"}, "activation_function 'selu'"),
        ({"encoder_attention_heads": 5}, "encoder_attention_heads 5.*d_model, 36"),
        ({"d_model": "36"}, "d_model '36'.*whole number"),
        ({"num_mel_bins": None}, "num_mel_bins None"),
        ({"encoder_layers": True}, "encoder_layers True"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    config = TheirConfig(**CONFIGS["three heads"]).to_dict()
    with pytest.raises(UserError, match=message):
        FAMILY.config_of(config | change, {})
    del config[next(iter(change))]
    if "activation_function" not in change:
        with pytest.raises(UserError, match=f"no {next(iter(change))}"):
            FAMILY.config_of(config, {})


def test_fresh_positions_are_whispers(rng):
    config = WhisperConfig(layers=1, dim=20, heads=2, mlp_dim=8, positions=50)
    segments = np.array([[[[1, 0, 320]]]])
    init: Any = jax.jit(WhisperEncoder(config).init)
    init = init(jax.random.key(0), np.zeros((1, 1, 320), np.int16), segments)
    model = TheirEncoder(TheirConfig(d_model=20, encoder_attention_heads=2, max_source_positions=50))
    table = init["params"]["position_embedding"].value
    np.testing.assert_allclose(table, model.embed_positions.weight.detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "utterances", "message"),
    [
        (330, 1, "330 samples.*320"),
        (3520, 1, r"3520 samples \(0.22 s\).*3200 \(0.2 s\)"),
        (640, 2, "2 utter"),
    ],
)
def test_speech_that_does_not_fit_is_refused(samples, utterances, message):
    speech, segments = jnp.zeros((1, 1, samples), jnp.int16), jnp.zeros((1, 1, utterances, 3), jnp.int32)
    with pytest.raises(ValueError, match=message):
        WhisperEncoder(WhisperConfig(positions=10)).features(speech, segments)


def test_remat_and_unrolling_change_nothing(rng):
    model = theirs(rng, "three heads")
    config = FAMILY.config_of(model.config.to_dict(), {})
    params = to_ours(FAMILY, config, named(model))
    speech, segments = ragged(rng, 6400)

    def gradients(config):
        loss = jax.value_and_grad(lambda p: jnp.sum(encode(config, p, speech, segments)[0] ** 2))
        return jax.tree.leaves(jax.jit(loss)(params))

    for one, other in zip(
        gradients(config), gradients(dataclasses.replace(config, remat="full", scan_unroll=2)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(one).max()))


def test_dropout_acts_only_when_not_deterministic(rng):
    model = theirs(rng, "three heads")
    config = dataclasses.replace(FAMILY.config_of(model.config.to_dict(), {}), dropout=0.5)
    params = to_ours(FAMILY, config, named(model))
    speech, segments = ragged(rng, 6400)
    without = dataclasses.replace(config, dropout=0.0)
    plain: Any = encode(config, params, speech, segments)[0]
    np.testing.assert_array_equal(plain, encode(without, params, speech, segments)[0])

    @jax.jit
    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        variables = {"params": params}
        return WhisperEncoder(config).apply(variables, speech, segments, deterministic=False, rngs=rngs)[0]

    assert np.abs(dropped(1) - plain).max() > 0.1
    np.testing.assert_array_equal(dropped(1), dropped(1))


def test_bfloat16_computes_close_to_float32(rng):
    model = theirs(rng, "three heads")
    config = FAMILY.config_of(model.config.to_dict(), {})
    params = to_ours(FAMILY, config, named(model))
    speech, segments = ragged(rng, 6400)
    exact: Any = encode(config, params, speech, segments)[0]
    rough: Any = encode(dataclasses.replace(config, dtype="bfloat16"), params, speech, segments)[0]
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rough, np.float32) - np.asarray(exact))
    assert 0 < error.mean() < 0.03 * np.abs(exact).mean()


def test_encoder_in_an_slm(rng):
    config = WhisperConfig(layers=2, dim=12, heads=3, mlp_dim=16, positions=20)
    assert encoder_kind(config) == "whisper" and encoder_class(config) is WhisperEncoder
    check_in_slm(rng, config)


def test_presets_are_the_published_sizes():
    for name in ("tiny", "large_v3"):
        config = whisper.preset(name)
        with torch.device("meta"):
            model = TheirEncoder(TheirConfig(**FAMILY.hf_config(config)))
        check_shapes(FAMILY, config, model)
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(leaf.size for leaf in leaves) == 636_968_960
    assert whisper.preset("tiny", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(UserError, match="did you mean 'large_v3'"):
        whisper.preset("large-v3")


@pytest.mark.parametrize(
    ("file", "name"),
    [("whisper_large", "large_v2"), ("distil_large_v3", "large_v3"), ("whisper_large_v3", "large_v3")],
)
def test_gin_files_of_the_same_network(file, name):
    folder = Path(__file__).parent.parent.parent / "gin" / "models" / "encoders"
    assert f"whisper.preset.name = {name!r}\n" in (folder / f"{file}.gin").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads is 5.*dim 384"),
        ({"dim": 0}, "dim is 0"),
        ({"activation": "gelu_exac"}, "did you mean 'gelu_exact'"),
        ({"remat": "yes"}, "remat is 'yes'"),
        ({"dim": 9, "heads": 3}, "dim is 9"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        WhisperConfig(**change)
