"""Greedy decoding against decoding anew without a cache, and against transformers."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta

from slm_jax.decoding.greedy import greedy_decode, greedy_decode_encoded
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.reducers import DropReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5, T5Config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import T5Config as TheirT5Config
    from transformers import T5ForConditionalGeneration

EOS = 1
LLM = T5Config(
    vocab_size=61,
    emb_dim=16,
    num_heads=3,
    head_dim=10,
    mlp_dim=24,
    encoder_layers=2,
    decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=12,
)
SMALL = SLMConfig(
    speech_encoder=ConformerConfig(layers=1, dim=12, heads=2, subsampling_channels=(4, 4)),
    llm=LLM,
    adapter=AdapterConfig(layers=1, dim=20, heads=2, head_dim=14, mlp_dim=28),
    reducer=DropReducer(2),
)
STEP = SLM(SMALL).samples_per_position


def draw(shapes, rng):
    """Every parameter random; embeddings and logits large enough for clear choices of varied tokens."""

    def leaf_of(path, leaf):
        name = jax.tree_util.keystr(path)
        mean, std = (1.0, 0.2) if "scale" in name else (0.0, 1.0 if "embedding" in name else 0.4)
        return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(leaf_of, meta.unbox(shapes))


def raise_end(kernel, rng):
    """A head that chooses the end now and then: its column is a mixture of a few others."""
    others = rng.choice(np.arange(2, kernel.shape[1]), 4, replace=False)
    return kernel.at[:, EOS].set(kernel[:, others].sum(axis=1) * 0.8)


def draw_batch(rng, rows: int, speech: bool) -> dict[str, np.ndarray]:
    """One example per row: an utterance before its text, or text alone; ragged."""
    positions, text, length = 5, 7, 14
    batch = {
        "inputs": rng.integers(2, LLM.vocab_size, (rows, text)).astype(np.int32),
        "layout": np.full((rows, length), -1, np.int32),
        "layout_segment_ids": np.zeros((rows, length), np.int32),
    }
    samples = rng.integers(1, positions * STEP + 1, rows) if speech else np.zeros(rows, int)
    for row in range(rows):
        spoken, tokens = -(-samples[row] // STEP), int(rng.integers(1, text + 1))
        first = positions if speech else 0
        indices = [*range(spoken), *range(first, first + tokens)]
        batch["layout"][row, : len(indices)] = indices
        batch["layout_segment_ids"][row, : len(indices)] = 1
    if speech:
        batch["speech"] = rng.integers(-9000, 9000, (rows, 1, positions * STEP)).astype(np.int16)
        batch["speech_segments"] = np.zeros((rows, 1, 2, 3), np.int32)
        batch["speech_segments"][:, 0, 0] = [(1, 0, count) for count in samples]
    return batch


def with_targets(batch, targets) -> dict:
    ones = np.ones_like(targets)
    positions = np.broadcast_to(np.arange(targets.shape[1]), targets.shape)
    return {**batch, "targets": targets, "target_segment_ids": ones, "target_positions": positions}


@functools.cache
def _decoder(max_tokens: int):
    return jax.jit(functools.partial(greedy_decode, SLM(SMALL), max_tokens=max_tokens, eos_id=EOS))


def decode_anew(variables, batch, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy decoding with the whole decoder at each token; also the smallest lead of the best logit."""

    @jax.jit
    def logits_of(targets):
        def run(model: SLM):
            encoded, segment_ids = model.encode(batch)
            return model.llm.logits(model.llm.decode(encoded, segment_ids, targets, jnp.ones_like(targets)))

        return SLM(SMALL).apply(variables, method=run)

    rows = len(batch["layout"])
    tokens, ended = np.zeros((rows, max_tokens), np.int32), np.zeros(rows, bool)
    lead = np.full(rows, np.inf)
    for at in range(max_tokens):
        logits = np.asarray(logits_of(tokens))[:, at]
        best = np.sort(logits, axis=-1)
        lead = np.where(ended, lead, np.minimum(lead, best[:, -1] - best[:, -2]))
        tokens[:, at] = np.where(ended, 0, logits.argmax(-1))
        ended |= tokens[:, at] == EOS
    return tokens, lead


@pytest.mark.parametrize("speech", [True, False])
def test_the_cache_changes_no_token(rng, speech):
    batch, rows, max_tokens = draw_batch(rng, 6, speech), 6, 10
    example = with_targets(batch, np.zeros((rows, 3), np.int32))
    variables = draw(jax.eval_shape(lambda: SLM(SMALL).init(jax.random.key(0), example)), rng)
    head = variables["frozen"]["llm"]["decoder"]["logits_dense"]
    head["kernel"] = raise_end(head["kernel"], rng)
    batch["layout"][-1], batch["layout_segment_ids"][-1] = -1, 0
    found = np.asarray(_decoder(max_tokens)(variables, batch))
    expected, lead = decode_anew(variables, batch, max_tokens)
    assert found.shape == (rows, max_tokens) and found.dtype == np.int32
    # An empty row gives zeros. Where the two best tokens tie to rounding, either may win.
    np.testing.assert_array_equal(found[-1], 0)
    clear = lead[:-1] > 1e-4
    assert clear.sum() >= rows - 2
    np.testing.assert_array_equal(found[:-1][clear], expected[:-1][clear])
    for row in found:
        after = np.cumsum(row == EOS) - (row == EOS) > 0
        assert not row[after].any()


def test_a_row_is_decoded_as_if_alone(rng):
    batch = draw_batch(rng, 6, True)
    example = with_targets(batch, np.zeros((6, 3), np.int32))
    variables = draw(jax.eval_shape(lambda: SLM(SMALL).init(jax.random.key(0), example)), rng)
    decode = _decoder(10)
    together = np.asarray(decode(variables, batch))
    row = int(rng.integers(6))
    repeated = {name: np.repeat(array[row : row + 1], 6, axis=0) for name, array in batch.items()}
    np.testing.assert_array_equal(np.asarray(decode(variables, repeated)), together[[row] * 6])


@pytest.mark.parametrize("max_tokens", [1, 12])
def test_the_loop_stops_when_all_rows_have_ended(rng, max_tokens):
    """A model whose answer is known: row r writes r tokens 5, then the end; it counts its steps."""
    rows = 3

    class Counting:
        def apply(self, variables, encoded, segment_ids, tokens, limit, *, method, mutable):
            assert method == "decode_step" and mutable == ["cache"] and limit == max_tokens
            step = variables.get("cache", jnp.int32(0))
            jax.debug.callback(steps.append, step)
            token = jnp.where(step < jnp.arange(rows), 5, EOS)
            return jax.nn.one_hot(token, 9)[:, None], {"cache": step + 1}

    steps: list = []
    segment_ids = jnp.ones((rows, 2), jnp.int32)
    arguments = ({}, jnp.zeros((rows, 2, 4)), segment_ids)
    model: Any = Counting()
    found = jax.jit(lambda: greedy_decode_encoded(model, *arguments, max_tokens=max_tokens, eos_id=EOS))()
    expected = np.zeros((rows, 12), np.int32)
    expected[:, :3] = [[1, 0, 0], [5, 1, 0], [5, 5, 1]]
    np.testing.assert_array_equal(found, expected[:, :max_tokens])
    jax.effects_barrier()
    assert len(steps) == min(max_tokens, rows)


def in_torch(params) -> Any:
    """A model of transformers with our parameters, its logits those of a separate head."""
    their_config: Any = TheirT5Config
    theirs = T5ForConditionalGeneration(
        their_config(
            vocab_size=LLM.vocab_size,
            d_model=LLM.emb_dim,
            d_kv=LLM.head_dim,
            d_ff=LLM.mlp_dim,
            num_layers=LLM.encoder_layers,
            num_decoder_layers=LLM.decoder_layers,
            num_heads=LLM.num_heads,
            relative_attention_num_buckets=LLM.relative_buckets,
            relative_attention_max_distance=LLM.relative_max_distance,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=EOS,
            decoder_start_token_id=0,
        )
    )
    # transformers 5 ties the head whatever the configuration says.
    theirs.lm_head = torch.nn.Linear(LLM.emb_dim, LLM.vocab_size, bias=False)
    flat = {"lm_head.weight": params["decoder"]["logits_dense"]["kernel"].T}
    flat["shared.weight"] = params["token_embedder"]["embedding"]
    attentions = {
        "encoder": {"attention": ("SelfAttention", "pre_attention_layer_norm")},
        "decoder": {
            "self_attention": ("SelfAttention", "pre_self_attention_layer_norm"),
            "encoder_decoder_attention": ("EncDecAttention", "pre_cross_attention_layer_norm"),
        },
    }
    for stack, parts in attentions.items():
        flat[f"{stack}.embed_tokens.weight"] = flat["shared.weight"]
        flat[f"{stack}.final_layer_norm.weight"] = params[stack][f"{stack}_norm"]["scale"]
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        flat[bias] = params[stack]["relpos_bias"]["rel_embedding"].T
        for number in range(2):
            one = jax.tree.map(lambda leaf, number=number: leaf[number], params[stack][stack])
            prefix = f"{stack}.block.{number}.layer"
            for index, (ours, (name, norm)) in enumerate(parts.items()):
                for part in ("query", "key", "value"):
                    kernel = one[ours][part]["kernel"].reshape(LLM.emb_dim, -1)
                    flat[f"{prefix}.{index}.{name}.{part[0]}.weight"] = kernel.T
                kernel = one[ours]["out"]["kernel"].reshape(-1, LLM.emb_dim)
                flat[f"{prefix}.{index}.{name}.o.weight"] = kernel.T
                flat[f"{prefix}.{index}.layer_norm.weight"] = one[norm]["scale"]
            last = f"{prefix}.{len(parts)}"
            flat[f"{last}.layer_norm.weight"] = one["pre_mlp_layer_norm"]["scale"]
            for name in ("wi_0", "wi_1", "wo"):
                flat[f"{last}.DenseReluDense.{name}.weight"] = one["mlp"][name]["kernel"].T
    theirs.load_state_dict({name: torch.tensor(np.asarray(leaf)) for name, leaf in flat.items()})
    return theirs.eval()


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_t5_writes_what_transformers_writes(rng):
    rows, length, max_tokens = 5, 11, 32
    ids = jnp.ones((1, 1), jnp.int32)
    variables = draw(jax.eval_shape(lambda: T5(LLM).init(jax.random.key(0), ids, ids, ids, ids)), rng)
    head = variables["params"]["decoder"]["logits_dense"]
    head["kernel"] = raise_end(head["kernel"], rng)
    segments = (np.arange(length) < rng.integers(1, length + 1, rows)[:, None]).astype(np.int32)
    inputs = (rng.integers(2, LLM.vocab_size, (rows, length)) * segments).astype(np.int32)

    @jax.jit
    def decode(variables):
        model: Any = T5(LLM)
        encoded = model.apply(
            variables, model.apply(variables, inputs, method="embed"), segments, method="encode"
        )
        return greedy_decode_encoded(model, variables, encoded, segments, max_tokens=max_tokens, eos_id=EOS)

    found = np.asarray(decode(variables))
    with torch.no_grad():
        written = in_torch(variables["params"]).generate(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.tensor(segments),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = np.zeros_like(found)
    theirs = written.sequences.numpy()[:, 1:]
    expected[:, : theirs.shape[1]] = theirs
    best = np.sort(torch.stack(written.logits, dim=1).numpy(), axis=-1)
    # A row whose two best tokens once tie to rounding may rightly go either way; it must be rare.
    clear = np.where(theirs == 0, np.inf, best[..., -1] - best[..., -2]).min(axis=1) > 1e-4
    assert clear.sum() >= rows - 1
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_a_model_of_bfloat16_keeps_its_cache_in_bfloat16(rng):
    config = dataclasses.replace(LLM, dtype="bfloat16")
    ids = jnp.ones((1, 1), jnp.int32)
    variables = draw(jax.eval_shape(lambda: T5(config).init(jax.random.key(0), ids, ids, ids, ids)), rng)
    arguments = (
        jnp.ones((2, 3, 16), jnp.bfloat16),
        jnp.ones((2, 3), jnp.int32),
        jnp.zeros((2, 1), jnp.int32),
    )
    step = functools.partial(T5(config).apply, method="decode_step", mutable=["cache"])
    logits, state = jax.eval_shape(lambda: step(variables, *arguments, 5))
    assert logits.dtype == jnp.float32
    leaves = jax.tree_util.tree_leaves_with_path(state["cache"])
    cached = [leaf for path, leaf in leaves if "cached" in jax.tree_util.keystr(path)]
    assert len(cached) == 4 and all(leaf.dtype == jnp.bfloat16 for leaf in cached)
