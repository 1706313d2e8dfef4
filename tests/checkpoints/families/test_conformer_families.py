"""Gemma 3n and w2v-BERT 2.0 as families: every tensor has its place, and goes back unchanged."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from slm_jax.checkpoints.families import gemma3n, w2v_bert
from slm_jax.checkpoints.safetensors import save_safetensors
from slm_jax.checkpoints.sources.base import TensorInfo
from slm_jax.errors import UserError
from slm_jax.models import conformer
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.networks import abstract_params

FAMILIES: dict[str, Any] = {"gemma3n": gemma3n.FAMILY, "w2v_bert": w2v_bert.FAMILY}
SMALL_GEMMA: dict[str, Any] = {
    "hidden_size": 12, "conf_num_attention_heads": 3, "conf_num_hidden_layers": 2, "input_feat_size": 9,
    "sscp_conv_channel_size": (4, 6), "gradient_clipping": 1.5, "conf_attention_context_left": 5,
    "conf_conv_kernel_size": 3, "conf_reduction_factor": 4,
}  # fmt: skip
SMALL_W2V: dict[str, Any] = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20,
    "vocab_size": 7, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3,
    "left_max_position_embeddings": 4,
}  # fmt: skip


def theirs(name: str, **changes):
    """A small published model: bare, or with what else its checkpoints hold."""
    import transformers

    if name == "gemma3n":
        return transformers.Gemma3nAudioEncoder(transformers.Gemma3nAudioConfig(**SMALL_GEMMA | changes))
    return transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**SMALL_W2V | changes))


def state_of(model, rng) -> dict[str, np.ndarray]:
    """The names and shapes of a model's tensors, with values that are all different."""
    return {name: rng.normal(size=t.shape).astype(np.float32) for name, t in model.state_dict().items()}


def infos(state):
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in state.items()}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def filled(family, config, state):
    """Our parameters by path; each of their elements must come from exactly one piece."""
    shapes = {path: leaf.shape for path, leaf in flat(abstract_params(config)).items()}
    params = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for piece in family.pieces(config, infos(state)):
        place = ... if piece.layer is None else piece.layer
        assert np.all(np.isnan(params[piece.parameter][place])), piece
        params[piece.parameter][place] = piece.layout.to_ours(state[piece.source])
    for path, values in params.items():
        assert not np.any(np.isnan(values)), path
    return params


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3n", {}),
        ("w2v_bert", {}),
        ("w2v_bert", {"position_embeddings_type": "relative"}),
        ("w2v_bert", {"position_embeddings_type": None}),
    ],
)
def test_every_tensor_goes_there_and_back(rng, name, changes):
    family, model = FAMILIES[name], theirs(name, **changes)
    state = state_of(model, rng)
    config = family.config_of(model.config.to_dict(), infos(state))
    params = filled(family, config, state)
    back = {}
    for piece in family.hf_pieces(config):
        assert piece.source not in back
        values = params[piece.parameter]
        back[piece.source] = piece.layout.to_theirs(values if piece.layer is None else values[piece.layer])
    for tensor in state:
        if family.unused(tensor) is None:
            np.testing.assert_array_equal(back.pop(tensor), state[tensor], err_msg=tensor)
        else:
            assert tensor == "masked_spec_embed"
    assert not back


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_what_is_written_back(rng, tmp_path, name):
    import torch
    import transformers

    family, model = FAMILIES[name], theirs(name)
    state = state_of(model, rng)
    config = family.config_of(model.config.to_dict(), infos(state))
    written = {piece.source: state[piece.source] for piece in family.hf_pieces(config)}
    save_safetensors(tmp_path / "model.safetensors", written, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(family.hf_config(config)))
    load: Any = type(model).from_pretrained
    loaded, report = load(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type in family.model_types
    if name == "gemma3n":
        assert loaded.config.conf_reduction_factor == 1
    for tensor, values in loaded.state_dict().items():
        assert torch.equal(values, torch.from_numpy(state[tensor])), tensor
    assert family.config_of(loaded.config.to_dict(), {}) == config


@pytest.mark.parametrize("prefix", ["model.audio_tower.", "audio_tower."])
def test_the_audio_tower_inside_gemma(rng, prefix):
    family, model = gemma3n.FAMILY, theirs("gemma3n")
    bare = state_of(model, rng)
    outer = prefix.removesuffix("audio_tower.")
    state = {prefix + name: values for name, values in bare.items()}
    others = ["language_model.layers.0.mlp.up_proj.weight", "vision_tower.timm_model.x.weight",
              "embed_audio.embedding.weight", "embed_vision.embedding.weight",
              "audio_tower.conformer.0.attention.attn.softcap"]  # fmt: skip
    full = (
        state | {outer + name: np.zeros(1, np.float32) for name in others} | {"lm_head.weight": np.zeros(1)}
    )
    config = family.config_of(
        {"model_type": "gemma3n", "hidden_size": 5, "audio_config": model.config.to_dict()}, infos(full)
    )
    assert config == family.config_of(model.config.to_dict(), infos(bare))
    one, other = filled(family, config, full), filled(family, config, bare)
    for path, values in one.items():
        np.testing.assert_array_equal(values, other[path])
    assert {name for name in full if family.unused(name) is None} == set(state)
    assert family.unused(outer + others[0]) == "Gemma's language model"


def test_w2v_bert_below_a_ctc_head(rng):
    import transformers

    model = transformers.Wav2Vec2BertForCTC(transformers.Wav2Vec2BertConfig(**SMALL_W2V))
    family, state = w2v_bert.FAMILY, state_of(model, rng)
    config = family.config_of(model.config.to_dict(), infos(state))
    filled(family, config, state)
    used = {piece.source for piece in family.pieces(config, infos(state))}
    assert {name for name in state if family.unused(name) is None} == used
    assert {family.unused(name) for name in state} - {None} == {
        "the CTC head",
        "the vector of masked frames, of pretraining alone",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_are_the_published_sizes(name):
    """transformers' defaults are those of google/gemma-3n-E4B and facebook/w2v-bert-2.0."""
    import torch
    import transformers

    with torch.device("meta"):
        if name == "gemma3n":
            model = transformers.Gemma3nAudioEncoder(transformers.Gemma3nAudioConfig())
        else:
            model = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig())
    family, config = FAMILIES[name], conformer.preset(name)
    assert family.config_of(model.config.to_dict(), {}) == config
    state = {tensor: tuple(values.shape) for tensor, values in model.state_dict().items()}
    ours = {path: leaf.shape for path, leaf in flat(abstract_params(config)).items()}
    for piece in family.pieces(config, {}):
        assert state.pop(piece.source) == piece.layout.theirs
        assert ours[piece.parameter] == (config.layers,) * (piece.layer is not None) + piece.layout.ours
    assert all(family.unused(tensor) for tensor in state)
    assert family.hf_config(config)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma3n", {"hidden_size": None}, "hidden_size None, expected a whole number"),
        ("gemma3n", {"hidden_size": "12"}, "hidden_size '12', expected a whole number"),
        ("gemma3n", {"conf_num_hidden_layers": 0}, "conf_num_hidden_layers 0, expected a whole number"),
        ("gemma3n", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05, expected 1e-06"),
        (
            "gemma3n",
            {"sscp_conv_kernel_size": [[5, 3], [3, 3]]},
            r"kernel_size \[\[5, 3\], \[3, 3\]\], expected",
        ),
        ("gemma3n", {"sscp_conv_stride_size": [[2, 2], [1, 2]]}, "has sscp_conv_stride_size"),
        ("gemma3n", {"sscp_conv_channel_size": [4]}, r"sscp_conv_channel_size \[4\], expected two"),
        ("gemma3n", {"conf_attention_logit_cap": 0.0}, "expected a number above 0"),
        ("gemma3n", {"conf_num_attention_heads": 5}, "does not divide dim 12"),
        ("gemma3n", {"audio_config": None}, "audio_config None, expected the audio tower's"),
        ("w2v_bert", {"add_adapter": True}, "add_adapter True, expected False"),
        (
            "w2v_bert",
            {"position_embeddings_type": "rotary"},
            "type 'rotary', expected one of 'relative_key'",
        ),
        ("w2v_bert", {"hidden_act": "selu"}, "hidden_act 'selu'.*did you mean"),
        ("w2v_bert", {"hidden_act": ["relu"]}, "has hidden_act"),
        (
            "w2v_bert",
            {"feature_projection_input_dim": 81},
            "input_dim 81, expected an even number",
        ),
        (
            "w2v_bert",
            {"conv_depthwise_kernel_size": 30},
            "kernel_size 30, expected an odd number",
        ),
        ("w2v_bert", {"layer_norm_eps": True}, "layer_norm_eps True, expected a number"),
        ("w2v_bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps nan, expected a number"),
        ("w2v_bert", {"layer_norm_eps": float("inf")}, "layer_norm_eps inf, expected a number"),
        ("gemma3n", {"gradient_clipping": 1e39}, r"gradient_clipping 1e\+39, expected a number"),
        ("gemma3n", {"conf_residual_weight": 10**400}, "conf_residual_weight 1000"),
        ("gemma3n", {"conf_num_hidden_layers": 1 << 62}, "expected less than 16777216"),
        ("w2v_bert", {"num_hidden_layers": 2.5}, "num_hidden_layers 2.5, expected a whole number"),
    ],
)
def test_a_configuration_that_we_do_not_compute_is_refused(name, changes, says):
    base = SMALL_GEMMA if name == "gemma3n" else SMALL_W2V
    with pytest.raises(UserError, match=says):
        FAMILIES[name].config_of(base | changes, {})


def test_exact_gelu_is_read_and_written():
    config = w2v_bert.FAMILY.config_of(SMALL_W2V | {"hidden_act": "gelu"}, {})
    assert config.activation == "gelu_exact"
    assert w2v_bert.FAMILY.config_of(w2v_bert.FAMILY.hf_config(config), {}) == config


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma3n", {"clip": None}, "ConformerConfig.clip is None, expected a number"),
        ("gemma3n", {"conv_padding": "same"}, "ConformerConfig.conv_padding is 'same', expected 'causal'"),
        ("w2v_bert", {"clip": 1.0}, "ConformerConfig.clip is 1.0, expected None"),
        ("w2v_bert", {"norm": "final"}, "ConformerConfig.norm is 'final', expected 'block'"),
    ],
)
def test_another_network_is_not_written_as_theirs(name, changes, says):
    with pytest.raises(UserError, match=says):
        FAMILIES[name].hf_config(dataclasses.replace(conformer.preset(name), **changes))
    with pytest.raises(UserError):
        FAMILIES[name].hf_config(ConformerConfig())


def test_fields_that_change_no_number_are_written():
    tuned = conformer.preset("w2v_bert", dtype="bfloat16", remat="full", ffn_dim=None, chunk_frames=3)
    assert w2v_bert.FAMILY.hf_config(tuned)["intermediate_size"] == 4096
