"""LoRA: nothing at the start, the merged weights' model after, gradients of its own matrices alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from test_slm import SMALL, collate, computed, draw_example, flat, random_variables, score, shapes_of

from slm_jax.checkpoints.foundation import architecture, save_foundation
from slm_jax.checkpoints.to_huggingface import convert_to_huggingface
from slm_jax.errors import UserError
from slm_jax.models import t5
from slm_jax.models.lora import LoRAConfig, merged
from slm_jax.models.quantization import quantized
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5, T5Config

EVERYWHERE = ("query", "key", "value", "out", "wi_0", "wi_1", "wo")
LORA = LoRAConfig(rank=5, alpha=7.0, projections=EVERYWHERE)


def with_lora(lora: LoRAConfig | None, **llm) -> SLMConfig:
    return dataclasses.replace(SMALL, lora=lora, llm=dataclasses.replace(SMALL.llm, **llm))


def drawn(rng, *kinds: str) -> dict:
    examples = [draw_example(rng, kind) for kind in kinds]
    # Attention to one position alone has no gradient.
    examples[0].targets = rng.integers(2, 71, 4).astype(np.int32)
    return collate([[example] for example in examples])


@functools.cache
def losses_and_gradient(config: SLMConfig):
    def loss(params, frozen, batch, rng=None):
        options = {} if rng is None else {"deterministic": False, "rngs": {"dropout": rng}}
        losses = score(config, {"params": params, "frozen": frozen}, batch, **options)["token_losses"]
        return jnp.sum(losses * batch["loss_weights"]), losses

    return jax.jit(jax.grad(loss, has_aux=True))


def fresh(config: SLMConfig, batch) -> dict:
    return jax.jit(lambda: nn.unbox(SLM(config).init(jax.random.key(3), batch)))()


@pytest.mark.parametrize("remat", ["none", "frozen"])
def test_a_fresh_lora_changes_no_bit_and_learns(rng, remat):
    batch = drawn(rng, "st", "ts", "t")
    config = with_lora(LORA, remat=remat)
    variables = fresh(config, batch)
    assert set(variables["params"]) == {"adapter", "llm"}
    plain = {"adapter": variables["params"]["adapter"]}
    _, expected = losses_and_gradient(with_lora(None, remat=remat))(plain, variables["frozen"], batch)
    gradient, found = losses_and_gradient(config)(variables["params"], variables["frozen"], batch)
    np.testing.assert_array_equal(found, expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["llm"]):
        # B is zero, so that A has no gradient yet.
        assert np.any(leaf != 0) == ("lora_b" in jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("names", "scan"),
    [(EVERYWHERE, True), (("query", "decoder/encoder_decoder_attention/value", "mlp/wo"), False)],
)
def test_the_model_is_that_of_the_merged_weights(rng, names, scan):
    batch, lora = drawn(rng, "st", "ts", "t"), LoRAConfig(3, 5.0, names)
    config = with_lora(lora, scan=scan)
    variables = random_variables(config, batch, rng)
    # Of a size that leaves attention's scores well conditioned in float32.
    variables["params"]["llm"] = jax.tree.map(lambda leaf: 0.2 * leaf, variables["params"]["llm"])
    gradient, found = losses_and_gradient(config)(variables["params"], variables["frozen"], batch)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient["llm"]))

    # W + alpha / sqrt(rank) A B of each layer, written out in float64.
    count = 0

    def summed(path, kernel):
        nonlocal count
        folder = variables["params"]["llm"]
        for key in path[:-1]:
            folder = folder.get(key.key, {})
        if path[-1].key != "kernel" or "lora_a" not in folder:
            return kernel
        count += 1
        a, b = (np.asarray(folder[name], np.float64) for name in ("lora_a", "lora_b"))
        product = [
            (x.reshape(-1, 3) @ y.reshape(3, -1)).reshape(kernel.shape[1:]) for x, y in zip(a, b, strict=True)
        ]
        return jnp.asarray(np.asarray(kernel, np.float64) + 5.0 / np.sqrt(3) * np.stack(product), jnp.float32)

    llm = jax.tree_util.tree_map_with_path(summed, variables["frozen"]["llm"])
    assert count == (18 if names == EVERYWHERE else 6)
    plain = {"adapter": variables["params"]["adapter"]}
    _, expected = losses_and_gradient(with_lora(None, scan=scan))(
        plain, {**variables["frozen"], "llm": llm}, batch
    )
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    ours = merged(variables["frozen"]["llm"], variables["params"]["llm"], lora)
    np.testing.assert_allclose(flat(ours), flat(llm), atol=1e-6)


def test_no_gradient_of_a_frozen_kernel_is_computed(rng):
    batch = drawn(rng, "st", "ts", "t", "s", "st")
    for remat in ("none", "frozen"):
        config = with_lora(LORA, remat=remat)
        variables = nn.unbox(shapes_of(config, batch))

        def loss(params, frozen, config=config):
            losses = score(config, {"params": params, "frozen": frozen}, batch)["token_losses"]
            return jnp.sum(losses * batch["loss_weights"])

        step = jax.make_jaxpr(jax.grad(loss))(variables["params"], variables["frozen"])
        shapes = {
            tuple(sorted((int(np.prod(shape[:at])), int(np.prod(shape[at:])))))
            for name, shape in computed(step.jaxpr)
            if name in ("dot_general", "scatter-add", "scatter_add")
            for at in range(1, len(shape))
        }
        # Features 16, heads x features of a head 30, hidden 24, vocabulary 71; rank 5.
        assert not shapes & {(16, 30), (16, 24), (16, 71)}
        assert {(5, 16), (5, 24), (5, 30)} <= shapes


def test_int8_and_bfloat16_kernels_stay_as_they_are_beside_float32_products(rng):
    batch = drawn(rng, "st", "t")
    config = with_lora(LORA, dtype="bfloat16")
    boxed = jax.jit(lambda: SLM(config).init(jax.random.key(3), batch))()
    frozen = nn.unbox(quantized(boxed["frozen"]))
    params = nn.unbox(boxed["params"])
    assert frozen["llm"]["encoder"]["encoder"]["mlp"]["wo"]["kernel"].dtype == jnp.int8
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    gradient, found = losses_and_gradient(config)(params, frozen, batch)
    plain = with_lora(None, dtype="bfloat16")
    _, expected = losses_and_gradient(plain)({"adapter": params["adapter"]}, frozen, batch)
    np.testing.assert_array_equal(found, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}
    with pytest.raises(UserError, match="FROZEN_WEIGHTS = 'float'"):
        merged(frozen["llm"], params["llm"], LORA)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nn.unbox(boxed["frozen"]["llm"]))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged(small, params["llm"], LORA))} == {"bfloat16"}


def test_dropout_is_loras_own(rng):
    batch = drawn(rng, "st", "t")
    key = jax.random.key(int(rng.integers(1000)))

    def losses(lora, dropout, rng_key):
        config = with_lora(lora, dropout=dropout)
        variables = random_variables(config, batch, np.random.default_rng(8))
        return losses_and_gradient(config)(variables["params"], variables["frozen"], batch, rng_key)[1]

    still = losses(LORA, 0.5, None)
    # The frozen LLM's own rate means nothing; LoRA's does.
    np.testing.assert_array_equal(losses(LORA, 0.5, key), still)
    assert np.any(losses(dataclasses.replace(LORA, dropout=0.5), 0.0, key) != still)


def test_merged_weights_in_transformers_answer_alike(rng, tmp_path):
    config = T5Config(
        vocab_size=60, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24, encoder_layers=2, decoder_layers=2
    )
    tokens = jnp.asarray(rng.integers(2, 60, (3, 9)), jnp.int32)
    ones = jnp.ones_like(tokens)
    model = T5(config, LORA)
    variables = nn.unbox(model.init(jax.random.key(1), tokens, ones, tokens, ones))
    variables["lora"] = jax.tree.map(
        # Large products make scores so steep that float32 of either side is 1e-5 off that of float64.
        lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), jnp.float32),
        variables["lora"],
    )
    bound = model.bind(variables)
    states = bound.encode(bound.embed(tokens), ones)
    logits = bound.logits(bound.decode(states, ones, tokens, ones))
    base = T5(config).bind({"params": variables["params"]})
    without = base.logits(base.decode(base.encode(base.embed(tokens), ones), ones, tokens, ones))
    assert np.linalg.norm(logits - without) > 1e-3 * np.linalg.norm(without)
    params = merged(variables["params"], variables["lora"], LORA)
    record = save_foundation(tmp_path / "llm", params, kind="t5", config=architecture(config))
    convert_to_huggingface(record, tmp_path / "hf")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    theirs.eval()
    inputs = torch.tensor(np.array(tokens), dtype=torch.long)
    with torch.no_grad():
        expected = theirs(input_ids=inputs, labels=inputs).logits.numpy()
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"projections": ("querry",)}, "'querry'; did you mean 'query'"),
        ({"projections": ("encoder/self_attention/query",)}, "did you mean 'decoder/self_attention/query'"),
        ({"projections": ("wi",)}, "LoRAConfig.projections has 'wi'"),
        *(({"projections": names}, "expected a list") for names in ("query", 5, None, ["query", 5])),
        ({"projections": ()}, "is empty"),
        ({"rank": 0}, "LoRAConfig.rank is 0"),
        ({"alpha": float("inf")}, "LoRAConfig.alpha is inf, expected a number above 0"),
        ({"alpha": 0}, "LoRAConfig.alpha is 0, expected a number above 0"),
        ({"dropout": 1.0}, "LoRAConfig.dropout is 1.0, expected a number from 0 to below 1"),
    ],
)
def test_a_mistake_is_one_sentence(options, told):
    with pytest.raises(UserError, match=told):
        with_lora(LoRAConfig(**options))


def test_an_llm_that_trains_takes_no_lora():
    with pytest.raises(UserError, match="expected one of both"):
        dataclasses.replace(with_lora(LORA), trainable=("adapter", "llm"))
    assert len(t5.projections(SMALL.llm)) == 18
