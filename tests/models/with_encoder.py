"""An SLM around any speech encoder that takes one utterance per slot."""

from typing import Any

import jax
import numpy as np
from flax.core import meta
from flax.linen.spmd import LogicallyPartitioned

from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.encoders import encoder_class
from slm_jax.models.reducers import DropReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5Config
from slm_jax.partitioning.rules import DEFAULT_RULES

SLOTS, POSITIONS, TEXT, TARGETS = 2, 5, 6, 4


def check_in_slm(rng: np.random.Generator, encoder: Any) -> None:
    """Asserts what an SLM needs of its encoder: collections, a finite loss, deafness past the utterance."""
    config = SLMConfig(
        speech_encoder=encoder,
        llm=T5Config(
            vocab_size=50, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24, encoder_layers=1, decoder_layers=1
        ),
        adapter=AdapterConfig(layers=1, dim=16, heads=2, head_dim=8, mlp_dim=20),
        reducer=DropReducer(2),
    )
    model = SLM(config)
    assert not encoder_class(encoder)(encoder).packs
    batch = draw_batch(rng, model.samples_per_position)
    boxed: Any = jax.jit(model.init)(jax.random.key(0), batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        boxed["frozen"]["speech_encoder"], is_leaf=is_boxed
    ):
        assert set(leaf.names) <= set(dict(DEFAULT_RULES)), path
        assert (leaf.names[0] == "layers") == any(getattr(key, "key", "") == "layers" for key in path), path
    variables = meta.unbox(boxed)
    assert set(variables) == {"params", "frozen"}
    assert set(variables["params"]) == {"adapter"}
    assert set(variables["frozen"]) == {"speech_encoder", "llm"}
    # Text alone gives the same variables.
    text = {name: array for name, array in batch.items() if not name.startswith("speech")}
    text["layout"] = np.where(batch["layout"] < SLOTS * POSITIONS, -1, batch["layout"] - SLOTS * POSITIONS)
    from_text = jax.eval_shape(model.init, jax.random.key(0), text)
    assert jax.tree.structure(meta.unbox(from_text)) == jax.tree.structure(variables)

    score = jax.jit(model.apply)
    losses: Any = score(variables, batch)
    assert np.isfinite(losses["token_losses"]).all()
    noise = rng.integers(-32000, 32000, batch["speech"].shape).astype(np.int16)
    behind = np.arange(noise.shape[-1]) >= batch["speech_segments"][..., 0, 2][..., None]
    louder: Any = score(variables, batch | {"speech": np.where(behind, noise, batch["speech"])})
    np.testing.assert_array_equal(louder["token_losses"], losses["token_losses"])
    changed: Any = score(variables, batch | {"speech": np.where(behind, batch["speech"], noise)})
    assert np.abs(changed["token_losses"] - losses["token_losses"]).max() > 1e-6


def is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, LogicallyPartitioned)


def draw_batch(rng: np.random.Generator, step: int) -> dict[str, np.ndarray]:
    """Two rows of two examples, each an utterance in a slot of its own, then text."""
    rows = 2
    layout = SLOTS * POSITIONS + TEXT
    batch = {
        "speech": rng.integers(-9000, 9000, (rows, SLOTS, POSITIONS * step)).astype(np.int16),
        "speech_segments": np.zeros((rows, SLOTS, 1, 3), np.int32),
        "inputs": rng.integers(2, 50, (rows, TEXT)).astype(np.int32),
        "layout": np.full((rows, layout), -1, np.int32),
        "layout_segment_ids": np.zeros((rows, layout), np.int32),
        "targets": rng.integers(2, 50, (rows, TARGETS)).astype(np.int32),
        "target_segment_ids": np.repeat([[1, 1, 2, 2]], rows, axis=0).astype(np.int32),
        "target_positions": np.repeat([[0, 1, 0, 1]], rows, axis=0).astype(np.int32),
        "loss_weights": np.ones((rows, TARGETS), np.float32),
    }
    for row in range(rows):
        place = 0
        for slot in range(SLOTS):
            samples = int(rng.integers(step, POSITIONS * step))
            batch["speech_segments"][row, slot, 0] = slot + 1, 0, samples
            sources = [
                *(slot * POSITIONS + np.arange(-(-samples // step))),
                *(SLOTS * POSITIONS + slot * (TEXT // 2) + np.arange(TEXT // 2)),
            ]
            batch["layout"][row, place : place + len(sources)] = sources
            batch["layout_segment_ids"][row, place : place + len(sources)] = slot + 1
            place += len(sources)
    return batch
