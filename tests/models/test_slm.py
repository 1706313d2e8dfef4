"""SLM: what trains and what does not, text that stays T5's to the bit, and packing that changes nothing."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.linen.spmd import LogicallyPartitioned
from jax.extend.core import jaxprs_in_params

from slm_jax.errors import UserError
from slm_jax.models import slm
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.reducers import DropReducer, StackReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5, T5Config

# No two parts have a kernel of the same sizes, and no batch dim below occurs in a kernel.
SMALL = SLMConfig(
    speech_encoder=ConformerConfig(layers=2, dim=12, heads=2, subsampling_channels=(4, 4)),
    llm=T5Config(
        vocab_size=71, emb_dim=16, num_heads=3, head_dim=10, mlp_dim=24, encoder_layers=2, decoder_layers=2
    ),
    adapter=AdapterConfig(layers=1, dim=20, heads=2, head_dim=14, mlp_dim=26),
    reducer=DropReducer(2),
)
STEP = SLM(SMALL).samples_per_position
SLOTS, POSITIONS, SEGMENTS, TEXT, LAYOUT, TARGETS = 2, 11, 4, 29, 37, 23


@dataclasses.dataclass
class Example:
    """One example: its pieces in order (an array of samples, or of tokens) and its targets."""

    pieces: list[np.ndarray]
    targets: np.ndarray


def draw_example(rng, kinds: str) -> Example:
    """An example of ragged pieces, `s` for speech and `t` for text."""
    pieces = []
    for kind in kinds:
        if kind == "s":
            pieces.append(rng.integers(-9000, 9000, int(rng.integers(1, 3 * STEP))).astype(np.int16))
        else:
            pieces.append(rng.integers(2, 71, int(rng.integers(1, 6))).astype(np.int32))
    return Example(pieces, rng.integers(2, 71, int(rng.integers(1, 6))).astype(np.int32))


def collate(rows: list[list[Example]]) -> dict[str, np.ndarray]:
    """The batch of docs/architecture.md, utterances alternating between the slots; fixed shapes."""
    count = len(rows)
    batch = {
        "speech": np.zeros((count, SLOTS, POSITIONS * STEP), np.int16),
        "speech_segments": np.zeros((count, SLOTS, SEGMENTS, 3), np.int32),
        "inputs": np.zeros((count, TEXT), np.int32),
        "layout": np.full((count, LAYOUT), -1, np.int32),
        "layout_segment_ids": np.zeros((count, LAYOUT), np.int32),
        "targets": np.zeros((count, TARGETS), np.int32),
        "target_segment_ids": np.zeros((count, TARGETS), np.int32),
        "target_positions": np.zeros((count, TARGETS), np.int32),
        "loss_weights": np.zeros((count, TARGETS), np.float32),
    }
    for row, examples in enumerate(rows):
        fill_row({name: array[row] for name, array in batch.items()}, examples)
    return batch


def fill_row(row: dict[str, np.ndarray], examples: list[Example]) -> None:
    used, taken = [0] * SLOTS, [0] * SLOTS
    tokens = length = target = utterance = 0
    for number, example in enumerate(examples, 1):
        for piece in example.pieces:
            if piece.dtype == np.int16:
                slot, utterance = utterance % SLOTS, utterance + 1
                start, positions = used[slot], -(-len(piece) // STEP)
                row["speech"][slot, start * STEP : start * STEP + len(piece)] = piece
                row["speech_segments"][slot, taken[slot]] = number, start * STEP, len(piece)
                indices = slot * POSITIONS + start + np.arange(positions)
                used[slot], taken[slot] = start + positions, taken[slot] + 1
            else:
                row["inputs"][tokens : tokens + len(piece)] = piece
                indices = SLOTS * POSITIONS + tokens + np.arange(len(piece))
                tokens += len(piece)
            row["layout"][length : length + len(indices)] = indices
            row["layout_segment_ids"][length : length + len(indices)] = number
            length += len(indices)
        at = slice(target, target + len(example.targets))
        row["targets"][at], row["target_segment_ids"][at] = example.targets, number
        row["target_positions"][at], row["loss_weights"][at] = np.arange(len(example.targets)), 1.0
        target += len(example.targets)


def without_speech(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    text = {name: array for name, array in batch.items() if not name.startswith("speech")}
    return text | {"layout": np.where(batch["layout"] < 0, -1, batch["layout"] - SLOTS * POSITIONS)}


def with_trainable(*parts: str, config: SLMConfig = SMALL) -> SLMConfig:
    return dataclasses.replace(config, trainable=parts)


def shapes_of(config: SLMConfig, batch) -> dict:
    return jax.eval_shape(lambda: SLM(config).init(jax.random.key(0), batch))


def random_variables(config: SLMConfig, batch, rng) -> dict:
    """Every parameter random, of a moderate scale."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        mean, std = (1.0, 0.2) if "scale" in name else (0.0, 1.0 if "embedding" in name else 0.25)
        return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, meta.unbox(shapes_of(config, batch)))


@functools.cache
def _loss_and_gradient(config: SLMConfig):
    def loss(params, frozen, batch):
        scores = score(config, {"params": params, "frozen": frozen}, batch)
        return jnp.sum(scores["token_losses"] * batch["loss_weights"]), scores["token_losses"]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def score(config: SLMConfig, *args, **kwargs) -> Any:
    return SLM(config).apply(*args, **kwargs)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("trainable", [("adapter",), ("llm",), ("adapter", "speech_encoder"), slm.PARTS])
def test_trainable_says_which_collection_a_part_is_in(rng, trainable, text_only):
    batch = collate([[draw_example(rng, "st")]])
    variables = shapes_of(with_trainable(*trainable), without_speech(batch) if text_only else batch)
    assert set(variables.get("params", {})) == set(trainable)
    assert set(variables.get("frozen", {})) == set(slm.PARTS) - set(trainable)
    assert set(variables) <= {"params", "frozen"}
    everything = shapes_of(with_trainable(*slm.PARTS), batch)["params"]
    joined = {**variables.get("params", {}), **variables.get("frozen", {})}
    assert jax.tree.structure(joined) == jax.tree.structure(everything)
    boxes: Any = jax.tree.leaves(joined, is_leaf=lambda leaf: isinstance(leaf, LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, LogicallyPartitioned) and len(box.names) == box.unbox().ndim


def test_xxl_has_the_paper_sizes(rng):
    variables = shapes_of(slm.preset("xxl"), collate([[draw_example(rng, "st")]]))

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(meta.unbox(tree)))

    assert set(variables) == {"params", "frozen"} and set(variables["params"]) == {"adapter"}
    assert count(variables["params"]) == pytest.approx(156e6, rel=0.01)
    assert count(variables["frozen"]["llm"]) == pytest.approx(12.92e9, rel=0.002)
    assert count(variables["frozen"]["speech_encoder"]) == pytest.approx(2.0e9, rel=0.1)
    assert SLM(slm.preset("xxl")).samples_per_position == 16 * 160


def computed(jaxpr):
    """(primitive's name, output's shape) of everything a jaxpr computes, inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, variable.aval.shape) for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from computed(inner)


def weight_gradients(config: SLMConfig, batch) -> dict[str, set[tuple[int, ...]]]:
    """Per part, the sizes of its kernels and tables of which the training step computes a gradient."""
    variables = meta.unbox(shapes_of(config, batch))

    def loss(params, frozen):
        scores = score(config, {"params": params, "frozen": frozen}, batch)
        return jnp.sum(scores["token_losses"] * batch["loss_weights"])

    step = jax.make_jaxpr(jax.value_and_grad(loss))(variables["params"], variables.get("frozen", {}))
    products = ("dot_general", "scatter-add", "scatter_add")
    # An attention kernel's gradient may be computed in its own shape or as a matrix.
    found = {
        tuple(sorted((math.prod(shape[:at]), math.prod(shape[at:]))))
        for name, shape in computed(step.jaxpr)
        if name in products
        for at in range(1, len(shape))
    }
    return {part: sizes & found for part, sizes in kernel_sizes(variables).items()}


def kernel_sizes(variables) -> dict[str, set[tuple[int, ...]]]:
    """Per part, the sizes of one layer's kernels, as matrices, and of the tables; in ascending order."""
    sizes = {}
    for part, tree in {**variables["params"], **variables.get("frozen", {})}.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        sizes[part] = set()
        for path, leaf in leaves:
            name = jax.tree_util.keystr(path)
            stacked = any(f"['{stack}']['{stack}']" in name for stack in ("encoder", "decoder"))
            stacked |= "['layers']" in name
            shape = leaf.shape[1:] if stacked else leaf.shape
            if len(shape) > 1 and "conv" not in name and "rel_embedding" not in name:
                inputs = len(shape) - 1 if "['out']" in name else 1
                sizes[part].add(tuple(sorted((math.prod(shape[:inputs]), math.prod(shape[inputs:])))))
    return sizes


@pytest.mark.parametrize("remat", ["none", "dots", "frozen", "full"])
def test_the_step_computes_no_gradient_of_a_frozen_weight(rng, remat):
    batch = collate([[draw_example(rng, kinds)] for kinds in ("st", "ts", "t", "s", "st")])
    config = dataclasses.replace(
        SMALL,
        speech_encoder=dataclasses.replace(SMALL.speech_encoder, remat=remat),
        llm=dataclasses.replace(SMALL.llm, remat=remat),
        adapter=dataclasses.replace(SMALL.adapter, remat=remat),
    )
    sizes = kernel_sizes(meta.unbox(shapes_of(config, batch)))
    for part, others in (("adapter", ("llm", "speech_encoder")), ("llm", ("speech_encoder",))):
        assert not sizes[part] & set().union(*(sizes[other] for other in others))
    gradients = weight_gradients(with_trainable("adapter", config=config), batch)
    assert gradients == {"adapter": sizes["adapter"], "llm": set(), "speech_encoder": set()}
    # The control: what trains is found by the same search, all of it.
    gradients = weight_gradients(with_trainable("adapter", "llm", config=config), batch)
    assert gradients == {"adapter": sizes["adapter"], "llm": sizes["llm"], "speech_encoder": set()}
    gradients = weight_gradients(with_trainable("adapter", "speech_encoder", config=config), batch)
    assert gradients["llm"] == set() and len(gradients["speech_encoder"]) >= 3


def test_no_backward_pass_is_built_through_a_frozen_encoder(rng):
    batch = collate([[draw_example(rng, "st")]])

    def convolutions(trainable, transform):
        config = with_trainable(*trainable)
        variables = meta.unbox(shapes_of(config, batch))

        def loss(params, frozen):
            return jnp.sum(score(config, {"params": params, "frozen": frozen}, batch)["token_losses"])

        step = jax.make_jaxpr(transform(loss))(variables["params"], variables["frozen"])
        return sum(name == "conv_general_dilated" for name, _ in computed(step.jaxpr))

    forward = convolutions(("adapter",), lambda loss: loss)
    assert 0 < forward == convolutions(("adapter",), jax.grad)
    assert forward < convolutions(("adapter", "speech_encoder"), jax.grad)


def test_gradients_are_of_the_adapter_only_and_reach_all_of_it(rng):
    examples = [draw_example(rng, kinds) for kinds in ("sts", "ts", "t")]
    # Queries and keys learn from attention over at least two positions.
    examples[0].pieces[0] = rng.integers(-9000, 9000, 3 * STEP).astype(np.int16)
    batch = collate([examples])
    variables = random_variables(SMALL, batch, rng)
    _, gradients = _loss_and_gradient(SMALL)(variables["params"], variables["frozen"], batch)
    assert set(gradients) == {"adapter"}
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_text_keeps_the_bits_of_plain_t5(rng):
    example = draw_example(rng, "t")
    rows = [[draw_example(rng, "st")], [example], [draw_example(rng, "ts")]]
    batch = collate(rows)
    variables = random_variables(SMALL, batch, rng)
    plain = collate([[], [example], []])

    @jax.jit
    def joint(variables, batch):
        def run(model: SLM):
            encoded, segment_ids = model.encode(batch)
            targets = batch["targets"], batch["target_segment_ids"], batch["target_positions"]
            return encoded, model.llm.logits(model.llm.decode(encoded, segment_ids, *targets))

        return SLM(SMALL).apply(variables, method=run)

    @jax.jit
    def alone(params, tokens, segment_ids, *targets):
        llm = T5(SMALL.llm).bind({"params": params})
        encoded = llm.encode(llm.embed(tokens), segment_ids)
        return encoded, llm.logits(llm.decode(encoded, segment_ids, *targets))

    tokens = np.zeros((3, LAYOUT), np.int32)
    tokens[1, : len(example.pieces[0])] = example.pieces[0]
    names = ("layout_segment_ids", "targets", "target_segment_ids", "target_positions")
    expected = alone(variables["frozen"]["llm"], tokens, *(plain[name] for name in names))
    real = batch["layout_segment_ids"][1] > 0, batch["target_segment_ids"][1] > 0
    for found in (joint(variables, batch), joint(variables, without_speech(plain))):
        for ours, theirs, positions in zip(found, expected, real, strict=True):
            np.testing.assert_array_equal(ours[1][positions], theirs[1][positions])


@pytest.mark.parametrize(
    ("reducer", "trainable"), [(DropReducer(2), ("adapter",)), (StackReducer(2), slm.PARTS)]
)
def test_packed_examples_equal_the_examples_alone(rng, reducer, trainable):
    config = dataclasses.replace(SMALL, reducer=reducer, trainable=trainable)
    examples = [draw_example(rng, kinds) for kinds in rng.permutation(["st", "ts", "sts", "t"])]
    packed = collate([examples])
    variables = random_variables(config, packed, rng)
    step = functools.partial(_loss_and_gradient(config), variables["params"], variables.get("frozen", {}))

    def real(losses, batch):
        return np.asarray(losses)[batch["loss_weights"] > 0]

    (_, losses), together = step(packed)
    rows = [collate([[example]]) for example in examples]
    alone = [step(row) for row in rows]
    separate = np.concatenate([real(result[0][1], row) for result, row in zip(alone, rows, strict=True)])
    found = real(losses, packed)
    assert np.linalg.norm(found - separate) <= 1e-5 * np.linalg.norm(separate)
    summed = sum(flat(gradients) for _, gradients in alone)
    assert np.linalg.norm(flat(together) - summed) <= 1e-5 * np.linalg.norm(summed)


@pytest.mark.parametrize("reducer", [DropReducer(2), StackReducer(2)])
def test_frames_computed_before_train_as_the_speech_itself(rng, reducer):
    config = dataclasses.replace(SMALL, reducer=reducer)
    batch = collate(
        [[draw_example(rng, kinds) for kinds in row] for row in (("sts", "ts"), ("t", "s", "st"))]
    )
    variables = random_variables(config, batch, rng)
    frames, _ = score(config, variables, batch["speech"], batch["speech_segments"], method=SLM.reduced_speech)
    assert frames.shape[-1] == SLM(config).reduced_dim
    encoded = {name: array for name, array in batch.items() if name != "speech"} | {"speech_frames": frames}
    step = _loss_and_gradient(config)
    found = step(variables["params"], variables["frozen"], encoded)
    expected = step(variables["params"], variables["frozen"], batch)
    np.testing.assert_allclose(found[0][1], expected[0][1], rtol=1e-5, atol=1e-5)
    # As batches hold them.
    rounded = frames.astype(jnp.bfloat16)
    few_bits, same_values = (
        step(variables["params"], variables["frozen"], encoded | {"speech_frames": values})
        for values in (rounded, rounded.astype(jnp.float32))
    )
    np.testing.assert_allclose(few_bits[0][1], same_values[0][1], rtol=1e-5, atol=1e-5)
    assert np.any(np.asarray(few_bits[0][1]) != np.asarray(expected[0][1]))
    norm = np.linalg.norm(flat(expected[1]))
    # Through two layers of the adapter and the whole T5: the tolerance of deep networks.
    assert np.linalg.norm(flat(found[1]) - flat(expected[1])) <= 1e-4 * norm
    # The encoder is no part of the step, and has no variables.
    with_encoder, without = shapes_of(config, batch), shapes_of(config, encoded)
    assert set(with_encoder["frozen"]) == {"speech_encoder", "llm"} and set(without["frozen"]) == {"llm"}
    assert jax.tree.structure(without["params"]) == jax.tree.structure(with_encoder["params"])
    traced = jax.make_jaxpr(step)(variables["params"], variables["frozen"], encoded)
    assert not [name for name, _ in computed(traced.jaxpr) if name == "conv_general_dilated"]


def test_speech_changes_the_loss_of_its_own_example_only(rng):
    examples = [draw_example(rng, "st"), draw_example(rng, "st")]
    batch = collate([examples])
    variables = random_variables(SMALL, batch, rng)
    step = functools.partial(_loss_and_gradient(SMALL), variables["params"], variables["frozen"])
    examples[0].pieces[0] = rng.integers(-9000, 9000, len(examples[0].pieces[0])).astype(np.int16)
    before, after = step(batch)[0][1], step(collate([examples]))[0][1]
    first, second = (batch["target_segment_ids"] == number for number in (1, 2))
    assert np.abs(before[first] - after[first]).max() > 1e-4
    np.testing.assert_array_equal(before[second], after[second])


def test_only_what_trains_has_dropout(rng):
    batch = collate([[draw_example(rng, "st")]])
    config = dataclasses.replace(
        SMALL,
        speech_encoder=dataclasses.replace(SMALL.speech_encoder, dropout=0.5),
        llm=dataclasses.replace(SMALL.llm, dropout=0.5),
        adapter=dataclasses.replace(SMALL.adapter, dropout=0.0),
    )
    variables = random_variables(config, batch, rng)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def losses(config, variables, deterministic, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return score(config, variables, batch, deterministic=deterministic, rngs=rngs)["token_losses"]

    real = batch["loss_weights"] > 0
    expected = losses(config, variables, True, 0)[real]
    np.testing.assert_allclose(losses(config, variables, False, 1)[real], expected, rtol=1e-5)
    dropping = dataclasses.replace(SMALL.adapter, dropout=0.5)
    config = dataclasses.replace(config, adapter=dropping)
    assert not np.allclose(losses(config, variables, False, 1)[real], expected, rtol=1e-5)


def test_lay_out_takes_the_named_sources(rng):
    sources = rng.normal(size=(2, 5, 3)).astype(np.float32)
    layout = np.array([[4, -1, 0, 4], [-1, -1, 2, 1]])
    found = slm.lay_out(jnp.asarray(sources), jnp.asarray(layout))
    expected = [[sources[row][at] if at >= 0 else np.zeros(3) for at in layout[row]] for row in (0, 1)]
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32))


def test_unknown_names_say_the_nearest():
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        slm.preset("tinny")
    with pytest.raises(UserError, match="did you mean 'adapter'"):
        dataclasses.replace(SMALL, trainable=("adaptor",))
