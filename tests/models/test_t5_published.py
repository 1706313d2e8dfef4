"""Published sorts of T5 against transformers with random weights: states, logits, greedy tokens, files."""

import functools
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from slm_jax.checkpoints.families.t5 import FAMILY
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.checkpoints.sources.base import TensorInfo
from slm_jax.decoding.greedy import greedy_decode_encoded
from slm_jax.errors import UserError
from slm_jax.models import t5
from slm_jax.models.networks import abstract_params
from slm_jax.models.t5 import T5, T5Config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

# That a head is not tied is what these tests are about.
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)

CLASSES: dict[str, Any] = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
    "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration),
}
# Of each family what was published, then two that its configuration also allows.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_v1_0": ("t5", {"feed_forward_proj": "relu", "tie": True}),
    "t5_v1_0_untied": ("t5", {"feed_forward_proj": "relu", "tie": False}),
    "t5_v1_0_exact_gelu": ("t5", {"feed_forward_proj": "gelu", "tie": True}),
    "flan_t5": ("t5", {"feed_forward_proj": "gated-gelu", "tie": False}),
    "flan_t5_tied": ("t5", {"feed_forward_proj": "gated-gelu", "tie": True}),
    "flan_t5_silu": ("t5", {"feed_forward_proj": "gated-silu", "tie": False}),
    "mt5": ("mt5", {"feed_forward_proj": "gated-gelu", "tie": False}),
    "mt5_tied": ("mt5", {"feed_forward_proj": "gated-gelu", "tie": True}),
    "mt5_relu": ("mt5", {"feed_forward_proj": "relu", "tie": False}),
    "umt5": ("umt5", {"feed_forward_proj": "gated-gelu", "tie": False}),
    "umt5_tied": ("umt5", {"feed_forward_proj": "gated-gelu", "tie": True}),
    "umt5_relu": ("umt5", {"feed_forward_proj": "gated-relu", "tie": False}),
    "byt5": ("t5", {"feed_forward_proj": "gated-gelu", "tie": False, "vocab_size": 384, "deep": True}),
    "byt5_tied": ("t5", {"feed_forward_proj": "gated-gelu", "tie": True, "vocab_size": 384, "deep": True}),
    "byt5_tanh": ("t5", {"feed_forward_proj": "gelu_new", "tie": False, "vocab_size": 384, "deep": True}),
}
TOKENS = 32


def random_model(rng, model_type: str, *, tie: bool, deep: bool = False, **fields) -> Any:
    """A model of transformers, every weight of it random, norms and biases too.

    Its sizes are those of the case in every run, so that the compilation cache serves them.
    """
    config_class, model_class = CLASSES[model_type]
    weights, rng = rng, np.random.default_rng([*map(ord, f"{model_type}{tie}{fields}")])
    depth = int(rng.integers(1, 3))
    buckets, distance = [(8, 12), (32, 128), (32, 20)][rng.integers(3)]
    sizes = {
        "vocab_size": int(rng.integers(60, 130)),
        "d_model": int(rng.choice([16, 24])),
        "d_kv": int(rng.choice([5, 6, 10])),
        "d_ff": int(rng.integers(20, 50)),
        "num_layers": depth + (3 if deep else int(rng.integers(0, 2))),
        "num_decoder_layers": depth,
        "num_heads": int(rng.choice([3, 5])),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": distance,
        "layer_norm_epsilon": float(rng.choice([1e-6, 1e-3])),
    }
    theirs = model_class(
        config_class(**(sizes | fields), dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=tie)
    )
    if not tie:
        theirs.lm_head = torch.nn.Linear(theirs.config.d_model, theirs.config.vocab_size, bias=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            mean, std = (1.0, 0.2) if "norm" in name else (0.0, 1.0 if "shared" in name else 0.2)
            parameter.copy_(torch.tensor(weights.normal(mean, std, tuple(parameter.shape))))
    return theirs.eval()


def saved(theirs: Any, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and tensors, by way of the files that transformers writes."""
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "model.safetensors")


def infos(tensors: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def filled(config: T5Config, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters from their tensors, each filled once, and every tensor of theirs used or explained."""
    table = flatten(abstract_params(config))
    params = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in table.items()}
    times = {name: np.zeros(leaf.shape, int) for name, leaf in table.items()}
    used = set()
    for piece in FAMILY.pieces(config, infos(tensors)):
        tensor = tensors[piece.source]
        assert tensor.shape == piece.layout.theirs
        ours = piece.layout.to_ours(tensor)
        np.testing.assert_array_equal(piece.layout.to_theirs(ours), tensor)
        place = () if piece.layer is None else piece.layer
        params[piece.parameter][place] = ours
        times[piece.parameter][place] += 1
        used.add(piece.source)
    assert all((count == 1).all() for count in times.values())
    assert all(name in used or FAMILY.unused(name) for name in tensors)
    return unflatten(params)


def ragged(rng, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, int32 [4, L]: rows of random lengths, padded before or after."""
    length = 21
    mask = np.zeros((4, length), np.int32)
    for row, size in enumerate([length, *rng.integers(1, length + 1, 3)]):
        mask[row, slice(length - size, None) if row % 2 else slice(0, size)] = 1
    return (rng.integers(2, vocab, mask.shape) * mask).astype(np.int32), mask


@functools.partial(jax.jit, static_argnums=0)
def ours(config: T5Config, params, inputs, mask, targets):
    """Encoder states, logits of all targets, and the greedy tokens."""
    model, variables = T5(config), {"params": params}
    bound = model.bind(variables)
    encoded = bound.encode(bound.embed(inputs), mask)
    logits = bound.logits(bound.decode(encoded, mask, targets, jnp.ones_like(targets)))
    return encoded, logits, greedy_decode_encoded(model, variables, encoded, mask, max_tokens=TOKENS)


def theirs_of(theirs: Any, inputs, mask, targets) -> tuple[np.ndarray, np.ndarray]:
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    with torch.no_grad():
        found = theirs(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.tensor(mask),
            decoder_input_ids=torch.tensor(shifted).long(),
            use_cache=False,
        )
    return found.encoder_last_hidden_state.numpy(), found.logits.numpy()


def assert_close(found, expected, what: str) -> None:
    """Within 1e-4 of the scale of what is expected."""
    error = float(np.abs(np.asarray(found) - expected).max())
    scale = max(1.0, float(np.abs(expected).max()))
    print(f"{what}: largest error {error:.2e} of {scale:.1f}")
    assert error <= 1e-4 * scale, what


def assert_greedy(theirs: Any, inputs, mask, tokens) -> None:
    """The same tokens, up to where transformers' own two best differ by less than rounding."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = theirs.generate(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=TOKENS,
            use_cache=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    written = found.sequences.numpy()[:, 1:]
    expected = np.pad(written, ((0, 0), (0, TOKENS - written.shape[1])))
    best = np.stack([np.sort(step.numpy(), axis=-1)[:, -2:] for step in found.logits], axis=1)
    clear = np.ones(expected.shape, bool)
    clear[:, : best.shape[1]] = best[..., 1] - best[..., 0] > 1e-4 * np.abs(best).max()
    clear = np.logical_and.accumulate(clear, axis=1)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(np.where(clear, tokens, 0), np.where(clear, expected, 0))


@pytest.mark.parametrize("case", CASES)
def test_states_logits_and_tokens_are_those_of_transformers(rng, tmp_path, case):
    model_type, fields = CASES[case]
    theirs = random_model(rng, model_type, **fields)
    config, tensors = saved(theirs, tmp_path)
    assert ("lm_head.weight" in tensors) is not fields["tie"]
    shape = FAMILY.config_of(config, infos(tensors))
    params = filled(shape, tensors)
    inputs, mask = ragged(rng, shape.vocab_size)
    targets = rng.integers(2, shape.vocab_size, (4, 9)).astype(np.int32)
    encoded, logits, tokens = ours(shape, params, inputs, mask, targets)
    expected_states, expected_logits = theirs_of(theirs, inputs, mask, targets)
    real = mask == 1
    assert_close(np.asarray(encoded)[real], expected_states[real], f"{case} states")
    assert_close(logits, expected_logits, f"{case} logits")
    assert_greedy(theirs, inputs, mask, tokens)


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_what_is_written_back_is_the_model(rng, tmp_path, model_type, tie):
    theirs = random_model(rng, model_type, tie=tie, feed_forward_proj="gated-gelu")
    config, tensors = saved(theirs, tmp_path / "theirs")
    shape = FAMILY.config_of(config, infos(tensors))
    params = flatten(filled(shape, tensors))
    written = {
        piece.source: np.ascontiguousarray(
            piece.layout.to_theirs(params[piece.parameter][() if piece.layer is None else piece.layer])
        )
        for piece in FAMILY.hf_pieces(shape)
    }
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    again = FAMILY.hf_config(shape)
    assert FAMILY.config_of(again, infos(written)) == shape
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(again), encoding="utf-8")
    save_file(written, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    loaded: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    inputs, mask = ragged(rng, shape.vocab_size)
    targets = rng.integers(2, shape.vocab_size, (4, 9)).astype(np.int32)
    for found, expected in zip(
        theirs_of(loaded, inputs, mask, targets), theirs_of(theirs, inputs, mask, targets), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


# What a file without marks of transformers 5 says, and what was trained: tied, scaled.
PUBLISHED = [
    ("t5", {}, True, (True, True)),
    ("t5", {"tie_word_embeddings": True}, False, (True, True)),
    ("t5", {"tie_word_embeddings": False}, True, (False, False)),
    ("mt5", {"tie_word_embeddings": False}, True, (False, False)),
    ("mt5", {}, True, (False, False)),
    ("mt5", {}, False, (True, True)),
    ("umt5", {"tie_word_embeddings": False}, True, (False, False)),
    ("umt5", {"tie_word_embeddings": False, "transformers_version": "4.31.0.dev0"}, True, (False, False)),
    ("umt5", {"tie_word_embeddings": True}, True, (True, True)),
    ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, (False, False)),
    ("t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, False, (True, False)),
    ("mt5", {"tie_word_embeddings": True, "transformers_version": "5.2.0"}, True, (False, False)),
    ("mt5", {"tie_word_embeddings": True, "transformers_version": "5.2.0"}, False, (True, False)),
    ("umt5", {"tie_word_embeddings": True, "transformers_version": "5.2.0"}, True, (False, True)),
]


@pytest.fixture(scope="module")
def names() -> dict[str, TensorInfo]:
    """Names of an untied model's tensors, of every sort of stack."""
    shape = T5Config(encoder_layers=8, decoder_layers=8)
    pieces = FAMILY.hf_pieces(shape)
    return {piece.source: TensorInfo(piece.layout.theirs, np.dtype(np.float32)) for piece in pieces}


@pytest.mark.parametrize(("model_type", "fields", "has_table", "expected"), PUBLISHED)
def test_head_of_published_files(names, model_type, fields, has_table, expected):
    tensors = {name: info for name, info in names.items() if has_table or name != "lm_head.weight"}
    found = FAMILY.config_of({"model_type": model_type, "num_layers": 8, **fields}, tensors)
    scaled = found.scale_tied_logits if found.tied_logits else found.scale_untied_logits
    assert (found.tied_logits, scaled) == expected


def test_published_umt5_has_the_logits_that_it_was_trained_with(rng, tmp_path):
    # Its config.json names no model_type and is of transformers 4; version 5 scales what it did not.
    theirs = random_model(rng, "umt5", tie=False, feed_forward_proj="gated-gelu")
    config, tensors = saved(theirs, tmp_path)
    del config["model_type"]
    config |= {
        "tie_word_embeddings": False,
        "transformers_version": "4.31.0.dev0",
        "scalable_attention": True,
    }
    shape = FAMILY.config_of(config, infos(tensors))
    assert shape.relative_bias == "layer" and not shape.tied_logits and not shape.scale_untied_logits
    inputs, mask = ragged(rng, shape.vocab_size)
    targets = rng.integers(2, shape.vocab_size, (4, 9)).astype(np.int32)
    _, logits, tokens = ours(shape, filled(shape, tensors), inputs, mask, targets)
    _, expected = theirs_of(theirs, inputs, mask, targets)
    assert_close(logits, expected * shape.emb_dim**0.5, "published umt5 logits")
    assert_greedy(theirs, inputs, mask, tokens)


def test_copies_and_prefixes(names):
    tied = FAMILY.config_of({"model_type": "t5", "num_layers": 8, "feed_forward_proj": "gated-gelu"}, names)
    more = dict(names)
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        more[name] = names["shared.weight"]
    cross = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more[cross] = TensorInfo((32, 6), np.dtype(np.float32))
    used = {piece.source for piece in FAMILY.pieces(tied, more)}
    left = more.keys() - used
    assert left == {"lm_head.weight", cross, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert all(FAMILY.unused(name) for name in left)
    assert not any(FAMILY.unused(name) for name in names if name != "lm_head.weight")
    assert set(FAMILY.copies(tied, more)) == {(name, "shared.weight") for name in left - {cross}}
    # Without the table's usual name, the stacks' own names hold it.
    del more["shared.weight"]
    assert "encoder.embed_tokens.weight" in {piece.source for piece in FAMILY.pieces(tied, more)}
    below = {f"transformer.{name}": info for name, info in names.items()}
    assert {piece.source for piece in FAMILY.pieces(tied, below)} == {f"transformer.{name}" for name in used}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model_type": "t6"}, "model_type is 't6'; choose from mt5, t5"),
        ({"d_kv": "64"}, "d_kv is '64', expected a whole number"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 12}, "num_layers is 12, but the checkpoint has 8 blocks in encoder"),
        ({"num_decoder_layers": 7}, "num_decoder_layers is 7, but the checkpoint has 8 blocks in decoder"),
        ({"d_ff": 1 << 40}, f"d_ff is {1 << 40}, expected less than"),
        ({"num_decoder_layers": 2.5}, "num_decoder_layers is 2.5"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6', expected a number"),
        ({"feed_forward_proj": "gated-gelo"}, "feed_forward_proj is 'gelo'; did you mean 'gelu'"),
        ({"feed_forward_proj": 7}, "feed_forward_proj is 7"),
        ({"dense_act_fn": "tanh"}, "dense_act_fn is 'tanh'; choose from"),
        ({"is_gated_act": "yes"}, "is_gated_act is 'yes', expected true or false"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False, expected True"),
        ({"decoder_start_token_id": 2}, "decoder_start_token_id is 2, expected 0"),
        ({"relative_attention_max_distance": 16}, "expected more than the 16 exact distances of 32 buckets"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(names, fields, told):
    with pytest.raises(UserError, match=told):
        FAMILY.config_of({"model_type": "t5", "num_layers": 8, **fields}, names)


def test_parts_of_a_model_are_refused(names):
    encoder = {name: info for name, info in names.items() if not name.startswith("decoder")}
    with pytest.raises(UserError, match="encoder alone"):
        FAMILY.config_of({"model_type": "t5"}, encoder)
    headless = {name: info for name, info in names.items() if name != "lm_head.weight"}
    with pytest.raises(UserError, match=r"has no lm_head\.weight"):
        FAMILY.config_of({"model_type": "mt5", "num_layers": 8, "tie_word_embeddings": False}, headless)
    with pytest.raises(UserError, match="holds no tensor"):
        FAMILY.config_of({"model_type": "t5"}, {})
    with pytest.raises(UserError, match="several T5s"):
        FAMILY.config_of({"model_type": "t5"}, names | {f"b.{name}": info for name, info in names.items()})
    with pytest.raises(UserError, match="scale_tied_logits is False"):
        FAMILY.hf_config(T5Config(relative_bias="layer", tied_logits=True, scale_tied_logits=False))


def test_exact_gelu_is_named_so_that_no_version_takes_it_for_another(names):
    shape = T5Config(activation="gelu_exact", encoder_layers=8, decoder_layers=8)
    config = FAMILY.hf_config(shape)
    assert config["feed_forward_proj"] == "gated-gelu_python"
    assert FAMILY.config_of(config, names) == shape
    tanh = FAMILY.hf_config(T5Config())
    assert (tanh["feed_forward_proj"], tanh["model_type"]) == ("gated-gelu", "mt5")


# Parameters in millions, as published or counted from the published checkpoints' tensors.
SIZES = {
    "t5_small": 60.5,
    "t5_base": 222.9,
    "t5_large": 737.7,
    "t5_3b": 2851.6,
    "t5_11b": 11307.3,
    "t5_v1_1_small": 77.0,
    "flan_t5_base": 247.6,
    "flan_t5_large": 783.2,
    "flan_t5_xl": 2849.8,
    "flan_t5_xxl": 11135.3,
    "umt5_small": 306.6,
    "byt5_small": 299.6,
    "byt5_base": 581.7,
    "byt5_large": 1228.2,
    "byt5_xl": 3737.8,
    "byt5_xxl": 12906.9,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_sizes(name):
    params = abstract_params(t5.preset(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(SIZES[name] * 1e6, rel=1e-3)


def test_every_published_preset_has_its_gin_file():
    folder = Path(__file__).parent.parent.parent / "gin" / "models" / "llms"
    for path in set(folder.glob("*.gin")) - {folder / "converted.gin"}:
        name = path.stem.removeprefix("mt5_").removeprefix("mt0_") if path.stem != "t5_tiny" else "tiny"
        assert f"t5.preset.name = {name!r}\n" in path.read_text(encoding="utf-8"), path
        assert t5.preset(name)
    assert {f"mt0_{name}.gin" for name in ("small", "base", "large", "xl", "xxl")} <= {
        path.name for path in folder.iterdir()
    }
    assert {f"{name}.gin" for name in SIZES} <= {path.name for path in folder.iterdir()}


def test_tables_per_layer_are_stacked_and_all_of_them_learn(rng):
    sizes: Any = {"vocab_size": 30, "emb_dim": 16, "num_heads": 3, "head_dim": 4, "mlp_dim": 8}
    shape = T5Config(**sizes, encoder_layers=3, decoder_layers=2, relative_bias="layer")
    tokens = jnp.asarray(rng.integers(2, 30, (2, 9)), jnp.int32)
    ones = jnp.ones_like(tokens)
    boxed: Any = jax.eval_shape(T5(shape).init, jax.random.key(0), tokens, ones, tokens, ones)["params"]
    for stack, layers in (("encoder", 3), ("decoder", 2)):
        table = boxed[stack][stack]["relpos_bias"]["rel_embedding"]
        assert table.names == ("layers", "heads", "relpos_buckets")
        assert table.unbox().shape == (layers, 3, 32)
        assert "relpos_bias" not in boxed[stack]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), abstract_params(shape)
    )

    @jax.jit
    @jax.grad
    def gradient(params):
        return T5(shape).apply({"params": params}, tokens, ones, tokens, ones)[0].sum()

    plain: Any = gradient(params)
    for stack in ("encoder", "decoder"):
        assert (np.abs(plain[stack][stack]["relpos_bias"]["rel_embedding"]).sum(axis=(1, 2)) > 0).all()


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.just(10**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["gated-gelu", "relu", "t5", "umt5", "t5x", "5.2.0"]),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FIELDS = (
    *("model_type", "architectures", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    *("num_decoder_layers", "relative_attention_num_buckets", "relative_attention_max_distance"),
    *("layer_norm_epsilon", "feed_forward_proj", "dense_act_fn", "is_gated_act", "tie_word_embeddings"),
    *("scale_decoder_outputs", "transformers_version", "pad_token_id", "is_encoder_decoder"),
    *("emb_dim", "head_dim", "mlp_dim", "mlp_activations", "logits_via_embedding", "relative_bias"),
)
SOUND = {
    "vocab_size": 64,
    "emb_dim": 16,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_dim": 16,
    "num_layers": 8,
    "num_encoder_layers": 2,
    "num_decoder_layers": 8,
    "mlp_activations": ["gelu", "linear"],
    "logits_via_embedding": False,
    "relative_bias": "layer",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["t5", "mt5", "umt5", "t5x"]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
def test_any_configuration_is_taken_or_refused(names, model_type, fields):
    try:
        assert isinstance(FAMILY.config_of({**SOUND, "model_type": model_type, **fields}, names), T5Config)
    except UserError as error:
        assert "\n" not in str(error)
