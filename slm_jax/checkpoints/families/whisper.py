"""Whisper's encoder out of a published Whisper: tiny to large-v3, large-v3-turbo and Distil-Whisper."""

from collections.abc import Mapping
from typing import Any

from slm_jax.audio.whisper_mel import HOP, SAMPLE_RATE, WINDOW
from slm_jax.checkpoints.families import published
from slm_jax.checkpoints.families.base import Tensors
from slm_jax.checkpoints.families.mapping import Piece, same
from slm_jax.checkpoints.families.pre_norm import LayerNames, conv_pieces, transformer_pieces
from slm_jax.errors import UserError
from slm_jax.models.whisper import MEL_FRAMES_PER_FRAME, WhisperConfig

_NAMES = LayerNames(
    attention="self_attn",
    attention_norm="self_attn_layer_norm",
    mlp_in="fc1",
    mlp_out="fc2",
    mlp_norm="final_layer_norm",
)
# As in WhisperForConditionalGeneration, in WhisperModel and WhisperForAudioClassification, and alone.
_PREFIXES = ("model.encoder.", "encoder.", "")
_UNUSED = {
    "decoder.": "the decoder",
    "proj_out.": "the decoder's output",
    "projector.": "a classification head",
    "classifier.": "a classification head",
    "layer_weights": "a classification head",
}


class WhisperFamily:
    """See `base.Family`."""

    kind: str = "whisper"
    model_types: tuple[str, ...] = ("whisper",)

    def config_of(self, config: Mapping[str, Any], tensors: Tensors) -> WhisperConfig:
        del tensors
        dim, heads = published.whole(config, "d_model"), published.whole(config, "encoder_attention_heads")
        if dim % heads:
            raise UserError(
                f"config.json has encoder_attention_heads {heads}, expected a divisor of d_model, {dim}"
            )
        mel_bins = published.whole(config, "num_mel_bins")
        positions = published.whole(config, "max_source_positions")
        _require_our_features(published.extractor_of(config), mel_bins, positions)
        return WhisperConfig(
            mel_bins=mel_bins,
            layers=published.whole(config, "encoder_layers"),
            dim=dim,
            heads=heads,
            mlp_dim=published.whole(config, "encoder_ffn_dim"),
            positions=positions,
            activation=published.activation(config, "activation_function"),
        )

    def pieces(self, config: WhisperConfig, tensors: Tensors) -> list[Piece]:
        return self._pieces(config, published.prefix_of(tensors, _PREFIXES, "conv1.weight"))

    def unused(self, name: str) -> str | None:
        name = name.removeprefix("model.")
        return next((why for start, why in _UNUSED.items() if name.startswith(start)), None)

    def copies(self, config: WhisperConfig, tensors: Tensors) -> list[tuple[str, str]]:
        return []

    def hf_config(self, config: WhisperConfig) -> dict[str, Any]:
        return {
            "architectures": ["WhisperEncoder"],
            "model_type": "whisper",
            "is_encoder_decoder": True,
            "num_mel_bins": config.mel_bins,
            "encoder_layers": config.layers,
            "d_model": config.dim,
            "encoder_attention_heads": config.heads,
            "encoder_ffn_dim": config.mlp_dim,
            "max_source_positions": config.positions,
            "activation_function": published.activation_of(config.activation),
            "dropout": config.dropout,
            "attention_dropout": config.dropout,
            "activation_dropout": config.dropout,
            # Of a decoder put beside this encoder: of its width, or nothing could be built from this file.
            "decoder_attention_heads": config.heads,
            "decoder_ffn_dim": config.mlp_dim,
        }

    def hf_pieces(self, config: WhisperConfig) -> list[Piece]:
        return self._pieces(config, "")

    def _pieces(self, config: WhisperConfig, prefix: str) -> list[Piece]:
        table = (config.positions, config.dim)
        return [
            *conv_pieces("conv_0", f"{prefix}conv1", 3, config.mel_bins, config.dim),
            *conv_pieces("conv_1", f"{prefix}conv2", 3, config.dim, config.dim),
            Piece("position_embedding", f"{prefix}embed_positions.weight", same(table)),
            *transformer_pieces(
                _NAMES,
                theirs=prefix,
                ours="encoder",
                layers=config.layers,
                dim=config.dim,
                heads=config.heads,
                mlp_dim=config.mlp_dim,
                key_bias=False,
            ),
        ]


def _require_our_features(extractor: Mapping[str, Any], mel_bins: int, positions: int) -> None:
    """Raises UserError where the network was trained on other features than `whisper_mel` computes."""
    frames = positions * MEL_FRAMES_PER_FRAME
    samples = frames * HOP
    published.require_features(
        extractor,
        {"feature_size": mel_bins, "hop_length": HOP, "n_fft": WINDOW, "dither": 0.0, "padding_value": 0.0},
        f"features of {mel_bins} mel bins with a window of {WINDOW} samples each {HOP} are computed alone",
    )
    published.require_features(
        extractor,
        {"chunk_length": samples / SAMPLE_RATE, "n_samples": samples, "nb_max_frames": frames},
        f"config.json has max_source_positions {positions}, of {HOP * MEL_FRAMES_PER_FRAME} samples each",
    )


FAMILY = WhisperFamily()
