"""Objectives on encoders that are no Conformer: named as what they are, or refused at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.audio.spec_augment import SpecAugmentConfig
from slm_jax.errors import UserError
from slm_jax.models.conformer import ConformerConfig, ConformerEncoder
from slm_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Encoder
from slm_jax.models.whisper import WhisperConfig, WhisperEncoder
from slm_jax.training.objectives.best_rq import BestRQObjective
from slm_jax.training.objectives.ctc import CTCObjective

CONFORMER = ConformerEncoder(ConformerConfig(layers=1, dim=8, heads=2))
WHISPER = WhisperEncoder(WhisperConfig(mel_bins=16, layers=1, dim=8, heads=2, mlp_dim=8, positions=20))
WAV2VEC2 = Wav2Vec2Encoder(
    Wav2Vec2Config(
        layers=1, dim=8, heads=2, mlp_dim=8, position_kernel=4, position_groups=2,
        conv_dims=(8, 8), conv_kernels=(20, 16), conv_strides=(20, 16),
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("encoder", "kind", "longest"),
    [(CONFORMER, "conformer", None), (WHISPER, "whisper", 6400), (WAV2VEC2, "wav2vec2", None)],
)
def test_ctc_trains_any_encoder_and_says_which(rng, encoder, kind, longest):
    objective = CTCObjective(encoder, vocab_size=8)
    assert objective.parts["speech_encoder"].kind == kind
    assert objective.model.longest_samples == longest
    batch = {
        "speech": jnp.asarray(rng.integers(-999, 999, (1, 1, 3840)), jnp.int16),
        "speech_segments": jnp.asarray([[[[1, 0, 3840]]]], jnp.int32),
        "targets": jnp.asarray([[2, 3]], jnp.int32),
        "target_segment_ids": jnp.ones((1, 2), jnp.int32),
    }
    variables = jax.jit(objective.init)(jax.random.key(0), batch)
    loss_sum, weight_sum, _ = objective.loss(variables["params"], None, batch, jax.random.key(1))
    assert np.isfinite(loss_sum) and weight_sum == 2


def test_spec_augment_of_a_waveform_is_refused():
    CTCObjective(WHISPER, 8, SpecAugmentConfig())
    with pytest.raises(UserError, match=r"CTCObjective\.augment is set and its encoder is a Wav2Vec2Encoder"):
        CTCObjective(WAV2VEC2, 8, SpecAugmentConfig())


@pytest.mark.parametrize("encoder", [WHISPER, WAV2VEC2])
def test_best_rq_is_refused_where_features_are_not_of_the_speech_alone(encoder):
    assert BestRQObjective(CONFORMER).parts["speech_encoder"].kind == "conformer"
    assert BestRQObjective(CONFORMER).model.longest_samples is None
    says = rf"BestRQObjective\.encoder is a {type(encoder).__name__}, expected a ConformerEncoder"
    with pytest.raises(UserError, match=says):
        BestRQObjective(encoder)
