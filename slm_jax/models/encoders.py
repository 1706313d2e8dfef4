"""The speech encoders by their configurations: any of them can stand in an SLM."""

from typing import Any

from slm_jax.errors import UserError
from slm_jax.models.conformer import ConformerConfig, ConformerEncoder
from slm_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Encoder
from slm_jax.models.whisper import WhisperConfig, WhisperEncoder

# Configuration -> (kind of its foundation checkpoint, network). A network is called with
# (speech int16 [B, K, S], speech_segments int32 [B, K, E, 3]) and returns (frames [B, K, F, D], segment ids
# int32 [B, K, F]); it has the properties `samples_per_frame`, `dim`, `packs`, `longest_samples` and
# `features_are_mel`; its two halves are the methods `features(speech, speech_segments)` and
# `encode_features(features, segment_ids)`.
ENCODERS: dict[type, tuple[str, type]] = {
    ConformerConfig: ("conformer", ConformerEncoder),
    WhisperConfig: ("whisper", WhisperEncoder),
    Wav2Vec2Config: ("wav2vec2", Wav2Vec2Encoder),
}


def encoder_class(config: Any) -> type:
    """Returns the network of an encoder's configuration.

    Raises:
      UserError: it configures no encoder.
    """
    return _entry(config)[1]


def encoder_kind(config: Any) -> str:
    """Returns the kind of an encoder's foundation checkpoint, such as `conformer`.

    Raises:
      UserError: it configures no encoder.
    """
    return _entry(config)[0]


def _entry(config: Any) -> tuple[str, type]:
    if type(config) not in ENCODERS:
        known = ", ".join(sorted(known.__name__ for known in ENCODERS))
        raise UserError(
            f"SLMConfig.speech_encoder is a {type(config).__name__}, expected one of {known}: "
            "SPEECH_ENCODER_CONFIG, or the model in SPEECH_ENCODER_CHECKPOINT, is no speech encoder"
        )
    return ENCODERS[type(config)]
