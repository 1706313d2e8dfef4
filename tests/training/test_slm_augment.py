"""SpecAugment in the training of an SLM: drawn from the step's key, within segments, in training alone."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from slm_jax.audio.log_mel import LogMelConfig
from slm_jax.audio.spec_augment import SpecAugmentConfig
from slm_jax.errors import UserError
from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.reducers import DropReducer
from slm_jax.models.slm import SLM, SLMConfig
from slm_jax.models.t5 import T5Config
from slm_jax.models.wav2vec2 import Wav2Vec2Config
from slm_jax.models.whisper import WhisperConfig
from slm_jax.training.objectives.slm import SLMObjective

POSITIONS, TARGETS, VOCAB = 12, 4, 40
CONFIG = SLMConfig(
    speech_encoder=ConformerConfig(
        layers=1,
        dim=16,
        heads=2,
        subsampling_channels=(4, 4),
        log_mel=LogMelConfig(mel_bins=16, fft_length=512, window_ms=25.0),
    ),
    llm=T5Config(
        vocab_size=VOCAB,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        encoder_layers=1,
        decoder_layers=1,
    ),
    adapter=AdapterConfig(layers=1, dim=16, heads=2, head_dim=8, mlp_dim=20, dropout=0.1),
    reducer=DropReducer(2),
)
WHISPER = WhisperConfig(mel_bins=16, layers=1, dim=16, heads=2, mlp_dim=16, positions=40)
AUGMENT = SpecAugmentConfig(time_mask_share=0.6, mel_mask_bins=10)


def with_encoder(encoder: Any, **fields: Any) -> SLMConfig:
    return dataclasses.replace(CONFIG, speech_encoder=encoder, **fields)


def batch_of(rng, config: SLMConfig, packed: bool) -> dict[str, Any]:
    """Four rows of one utterance, or of two in the same slot, without text."""
    step, rows, half = SLM(config).samples_per_position, 4, POSITIONS // 2
    segments, number = [], np.zeros((rows, POSITIONS), np.int32)
    for row in range(rows):
        first, second = rng.integers(3 * step, half * step, 2)
        segments.append([[(1, 0, first), (2, half * step, second)] if packed else [(1, 0, first)]])
        number[row, : -(-first // step)] = 1
        if packed:
            number[row, half : half - (-second // step)] = 2
    targets = np.repeat([[1, 1, 2, 2] if packed else [1] * TARGETS], rows, 0)
    return {
        "speech": rng.integers(-9000, 9000, (rows, 1, POSITIONS * step)).astype(np.int16),
        "speech_segments": np.array(segments, np.int32),
        "inputs": np.zeros((rows, 1), np.int32),
        "layout": np.where(number > 0, np.arange(POSITIONS), -1).astype(np.int32),
        "layout_segment_ids": number,
        "targets": rng.integers(2, VOCAB, (rows, TARGETS)).astype(np.int32),
        "target_segment_ids": targets.astype(np.int32),
        "target_positions": np.repeat([[0, 1, 0, 1] if packed else range(TARGETS)], rows, 0).astype(np.int32),
        "loss_weights": np.ones((rows, TARGETS), np.float32),
    }


def variables_of(config: SLMConfig, batch) -> dict[str, Any]:
    return nn.unbox(jax.jit(SLM(config).init)(jax.random.key(0), batch))


def loss_of(objective: SLMObjective, variables, batch, seed: int) -> float:
    loss_sum, weight_sum, _ = jax.jit(objective.loss)(
        variables["params"], variables["frozen"], batch, jax.random.key(seed)
    )
    return float(loss_sum / weight_sum)


@pytest.mark.parametrize("encoder", [CONFIG.speech_encoder, WHISPER])
def test_masks_are_drawn_from_the_key_of_the_step(rng, encoder):
    config = with_encoder(encoder)
    batch, seed = batch_of(rng, config, packed=False), int(rng.integers(2**30))
    variables = variables_of(config, batch)
    augmented = SLMObjective(SLM(config), augment=AUGMENT)
    first, again, other = (loss_of(augmented, variables, batch, s) for s in (seed, seed, seed + 1))
    assert first == again != other
    # Dropout alone draws what it drew: the same loss where nothing is hidden.
    plain = loss_of(SLMObjective(SLM(config)), variables, batch, seed)
    nothing = SpecAugmentConfig(time_masks=0, mel_masks=0)
    hides_nothing = loss_of(SLMObjective(SLM(config), augment=nothing), variables, batch, seed)
    assert hides_nothing == pytest.approx(plain, rel=1e-6)
    assert first != pytest.approx(plain, rel=1e-6)


def test_hiding_all_leaves_nothing_to_hear(rng):
    """The masks are on the features: under one that covers every bin, two recordings are the same."""
    batch = batch_of(rng, CONFIG, packed=False)
    other = batch | {"speech": rng.integers(-9000, 9000, batch["speech"].shape).astype(np.int16)}
    variables = variables_of(CONFIG, batch)
    # As many masks as leave no bin: 16 bins, each mask uniform in 0 to 16 of them.
    deaf = SLMObjective(SLM(CONFIG), augment=SpecAugmentConfig(time_masks=0, mel_masks=80, mel_mask_bins=16))
    assert loss_of(deaf, variables, batch, 3) == loss_of(deaf, variables, other, 3)
    plain = SLMObjective(SLM(CONFIG))
    assert loss_of(plain, variables, batch, 3) != loss_of(plain, variables, other, 3)


def test_a_neighbour_in_the_row_changes_no_mask(rng):
    batch = batch_of(rng, CONFIG, packed=True)
    variables = variables_of(CONFIG, batch)
    speech = batch["speech"].copy()
    half = speech.shape[-1] // 2
    speech[..., :half] = rng.integers(-32000, 32000, speech[..., :half].shape)
    # The neighbour is shorter, too.
    segments = batch["speech_segments"].copy()
    segments[:, :, 0, 2] -= rng.integers(0, 600)

    @jax.jit
    def losses(batch):
        rngs = {"dropout": jax.random.key(1), "augment": jax.random.key(2)}
        scores: Any = SLM(CONFIG).apply(variables, batch, deterministic=True, augment=AUGMENT, rngs=rngs)
        return scores["token_losses"]

    found, changed = losses(batch), losses(batch | {"speech": speech, "speech_segments": segments})
    np.testing.assert_allclose(found[:, 2:], changed[:, 2:], rtol=1e-5, atol=1e-5)
    assert np.abs(found[:, :2] - changed[:, :2]).max() > 1e-4


def computed(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from computed(inner)


def test_a_frozen_encoder_costs_no_gradient(rng):
    batch = batch_of(rng, CONFIG, packed=True)

    def convolutions(trainable: tuple[str, ...], transform=lambda loss: loss) -> int:
        config = dataclasses.replace(CONFIG, trainable=trainable)
        objective = SLMObjective(SLM(config), augment=AUGMENT)
        variables = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), batch))

        def loss(params, frozen):
            return objective.loss(params, frozen, batch, jax.random.key(0))[0]

        step = jax.make_jaxpr(transform(loss))(variables["params"], variables["frozen"])
        return list(computed(step.jaxpr)).count("conv_general_dilated")

    forward = convolutions(("adapter",))
    assert 0 < forward == convolutions(("adapter",), jax.grad)
    assert forward < convolutions(("adapter", "speech_encoder"), jax.grad)


def test_what_cannot_be_augmented_is_refused(rng):
    wav2vec2 = Wav2Vec2Config(
        layers=1, dim=16, heads=2, mlp_dim=8, position_kernel=4, position_groups=2,
        conv_dims=(8, 8), conv_kernels=(20, 16), conv_strides=(20, 16),
    )  # fmt: skip
    SLMObjective(SLM(with_encoder(wav2vec2)))
    with pytest.raises(UserError, match=r"SLMObjective\.augment is set and its encoder is a Wav2Vec2Encoder"):
        SLMObjective(SLM(with_encoder(wav2vec2)), augment=AUGMENT)
    batch = batch_of(rng, CONFIG, packed=False)
    variables = variables_of(CONFIG, batch)
    frames = jnp.ones((4, 1, POSITIONS, 16), jnp.bfloat16)
    encoded = {name: array for name, array in batch.items() if name != "speech"} | {"speech_frames": frames}
    assert np.isfinite(loss_of(SLMObjective(SLM(CONFIG)), variables, encoded, 0))
    with pytest.raises(ValueError, match="cannot be augmented any more"):
        loss_of(SLMObjective(SLM(CONFIG), augment=AUGMENT), variables, encoded, 0)
