"""Gemma 3n's audio tower, alone or inside the multimodal model (transformers, `Gemma3nAudioEncoder`)."""

import math
from collections.abc import Mapping
from typing import Any

from slm_jax.audio.log_mel import LogMelConfig
from slm_jax.checkpoints.families import conformer, published
from slm_jax.checkpoints.families.base import Tensors
from slm_jax.checkpoints.families.mapping import Layout, Piece, same, transposed
from slm_jax.errors import UserError
from slm_jax.models.conformer import ConformerConfig

_PREFIXES = ("model.audio_tower.", "audio_tower.", "")
_ANCHOR = "subsample_conv_projection.input_proj_linear.weight"

# Samples to a multiple of which transformers' extractor pads an utterance.
_PADDED_TO = 128

# Features as published, and the extractor's fields that change them.
_FEATURES = LogMelConfig(padded_to=_PADDED_TO)
_OF_EXTRACTOR = {
    "window_ms": "frame_length_ms",
    "hop_ms": "hop_length_ms",
    "low_hz": "min_frequency",
    "high_hz": "max_frequency",
    "pre_emphasis": "preemphasis",
    "floor": "mel_floor",
    "input_scale": "input_scale_factor",
}

# Fields of ours that no Gemma 3n reads.
_INERT = ("left_chunks", "left_positions", "right_positions")

_UNUSED = {
    "language_model.": "Gemma's language model",
    "lm_head.": "Gemma's language model",
    "vision_tower.": "the vision tower",
    "embed_audio.": "the map from audio frames to Gemma's embeddings",
    "embed_vision.": "the map from images to Gemma's embeddings",
}

# Older releases of transformers saved them.
_CONSTANTS = (
    "gradient_clipping",
    "inv_timescales",
    "local_causal_valid_mask",
    "q_scale",
    "softcap",
)


class Gemma3n:
    """The family of google/gemma-3n-E2B and -E4B; see `base.Family`."""

    kind = conformer.KIND
    model_types = ("gemma3n_audio", "gemma3n")

    def config_of(self, config: Mapping[str, Any], tensors: Tensors) -> ConformerConfig:
        """Returns our configuration; fields that older files lack are as in transformers.

        `conf_reduction_factor` is left to the reducer: our encoder returns all frames, of which the published
        model keeps every fourth.

        Raises:
          UserError: a field is missing, of the wrong type, or of a value that our network does not compute.
        """
        extractor = published.extractor_of(config)
        if config.get("model_type") == "gemma3n" or "audio_config" in config:
            config = config.get("audio_config")  # pyright: ignore[reportAssignmentType]
            if not isinstance(config, Mapping):
                raise UserError(
                    f"config.json has audio_config {config!r}, expected the audio tower's configuration"
                )
        # The convolution's norms read rms_norm_eps, all others have 1e-6; one number serves the two.
        published.require(config, "rms_norm_eps", 1e-6)
        published.require(config, "sscp_conv_kernel_size", [[3, 3], [3, 3]])
        published.require(config, "sscp_conv_stride_size", [[2, 2], [2, 2]])
        channels = published.wholes(config, "sscp_conv_channel_size", (128, 32))
        if len(channels) != 2:
            raise UserError(
                f"config.json has sscp_conv_channel_size {list(channels)}, expected two whole numbers"
            )
        return conformer.configured(
            layers=published.whole(config, "conf_num_hidden_layers"),
            dim=published.whole(config, "hidden_size"),
            heads=published.whole(config, "conf_num_attention_heads"),
            conv_kernel=published.whole(config, "conf_conv_kernel_size", 5),
            conv_padding="causal",
            conv_gate="joined",
            attention="local",
            # Theirs counts the frame itself.
            left_context=max(published.whole(config, "conf_attention_context_left", 13, least=0) - 1, 0),
            right_context=published.whole(config, "conf_attention_context_right", 0, least=0),
            # The block in which transformers computes the window; the frames do not depend on it.
            chunk_frames=published.whole(config, "conf_attention_chunk_size", 12),
            positions="usm",
            query_scale="per_dim",
            post_norm=True,
            residual_weight=published.number(config, "conf_residual_weight", 0.5, zero=True),
            clip=published.number(config, "gradient_clipping", 1e10),
            logit_cap=published.number(config, "conf_attention_logit_cap", 50.0),
            subsampling="ahead",
            subsampling_channels=channels,
            subsampling_epsilon=published.number(config, "sscp_conv_group_norm_eps", 1e-3, zero=True),
            log_mel=_log_mel(extractor, published.whole(config, "input_feat_size", 128)),
        )

    def pieces(self, config: ConformerConfig, tensors: Tensors) -> list[Piece]:
        """Returns where every parameter comes from; the prefix is that of the tensors."""
        prefix = published.prefix_of(tensors, _PREFIXES, _ANCHOR)
        pieces = _subsampling_pieces(config, prefix)
        for layer in range(config.layers):
            pieces += _layer_pieces(config, f"{prefix}conformer.{layer}.", layer)
        return pieces

    def unused(self, name: str) -> str | None:
        """Returns why a tensor is deliberately left out; None if it must be used."""
        bare = name.removeprefix("model.")
        for prefix, reason in _UNUSED.items():
            if bare.startswith(prefix):
                return reason
        return "a constant that config.json gives" if name.split(".")[-1] in _CONSTANTS else None

    def copies(self, config: ConformerConfig, tensors: Tensors) -> list[tuple[str, str]]:
        """Returns no pairs: nothing is stored twice."""
        return []

    def hf_config(self, config: ConformerConfig) -> dict[str, Any]:
        """Returns the `config.json` of a bare audio tower that, as ours, returns all frames.

        Raises:
          UserError: the configuration is not one of this family.
        """
        written = {
            "model_type": "gemma3n_audio",
            "architectures": ["Gemma3nAudioEncoder"],
            "input_feat_size": config.log_mel.mel_bins,
            "hidden_size": config.dim,
            "rms_norm_eps": 1e-6,
            "gradient_clipping": config.clip,
            "conf_attention_chunk_size": config.chunk_frames,
            "conf_attention_context_left": config.left_context + 1,
            "conf_attention_context_right": config.right_context,
            "conf_attention_logit_cap": config.logit_cap,
            "conf_num_attention_heads": config.heads,
            "conf_num_hidden_layers": config.layers,
            "conf_conv_kernel_size": config.conv_kernel,
            "conf_reduction_factor": 1,
            "conf_residual_weight": config.residual_weight,
            "sscp_conv_channel_size": list(config.subsampling_channels),
            "sscp_conv_group_norm_eps": config.subsampling_epsilon,
            "sscp_conv_kernel_size": [[3, 3], [3, 3]],
            "sscp_conv_stride_size": [[2, 2], [2, 2]],
        }
        if extractor := _extractor(config.log_mel):
            written["feature_extractor"] = extractor
        for ours, theirs in (("clip", "gradient_clipping"), ("logit_cap", "conf_attention_logit_cap")):
            if written[theirs] is None:
                raise UserError(f"ConformerConfig.{ours} is None, expected a number: Gemma 3n has {theirs}")
        conformer.check_written(config, self.config_of(written, {}), _INERT)
        return written

    def hf_pieces(self, config: ConformerConfig) -> list[Piece]:
        """Returns the tensors to write for transformers, named as in the bare model."""
        return self.pieces(config, {})


def _log_mel(extractor: Mapping[str, Any], mel_bins: int) -> LogMelConfig:
    """Our features for what the extractor's file says.

    Raises:
      UserError: a field is of the wrong type, or of a value that is not computed.
    """
    fields: dict[str, Any] = {
        ours: published.number(
            extractor, theirs, getattr(_FEATURES, ours), zero=ours == "pre_emphasis", file=published.EXTRACTOR
        )
        for ours, theirs in _OF_EXTRACTOR.items()
    }
    if not fields["low_hz"] < fields["high_hz"] <= _FEATURES.sample_rate / 2:
        raise UserError(
            f"{published.EXTRACTOR} has min_frequency {fields['low_hz']:g} and max_frequency "
            f"{fields['high_hz']:g}, expected the lower one first and at most {_FEATURES.sample_rate // 2}"
        )
    for name, most in (("window_ms", 1000.0), ("hop_ms", fields["window_ms"])):
        if not 1.0 <= fields[name] <= most:
            raise UserError(
                f"{published.EXTRACTOR} has {_OF_EXTRACTOR[name]} {fields[name]:g}, expected one from 1 to "
                f"{most:g}"
            )
    window, hop = (round(_FEATURES.sample_rate * fields[name] / 1000) for name in ("window_ms", "hop_ms"))
    overdrive = published.flag(extractor, "fft_overdrive", True, published.EXTRACTOR)
    points = 2 ** math.ceil(math.log2(window)) * (2 if overdrive else 1)
    # transformers derives these lengths again from those in milliseconds, which it does not write.
    published.require_features(
        extractor,
        {"feature_size": mel_bins, "frame_length": window, "hop_length": hop, "fft_length": points},
        "so config.json and the lengths in milliseconds have it",
    )
    not_computed = {"preemphasis_htk_flavor": True, "dither": 0.0, "padding_value": 0.0}
    published.require_features(extractor, not_computed, "nothing else is computed")
    return LogMelConfig(
        **fields,
        fft_length=points,
        mel_bins=mel_bins,
        mean=_per_bin(extractor, "per_bin_mean", mel_bins, 0.0),
        stddev=_per_bin(extractor, "per_bin_stddev", mel_bins, 1.0),
        padded_to=_PADDED_TO,
    )


def _per_bin(
    extractor: Mapping[str, Any], field: str, mel_bins: int, default: float
) -> float | tuple[float, ...]:
    """One number per bin, which may be written as lists of one list; `default` where there are none."""
    found = values = extractor.get(field)
    if found is None:
        return default
    while isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not isinstance(values, list) or len(values) != mel_bins or not all(map(published.is_finite, values)):
        raise UserError(f"{published.EXTRACTOR} has {field} {found!r}, expected {mel_bins} numbers")
    if default and not all(value > 0 for value in values):
        raise UserError(f"{published.EXTRACTOR} has {field} {found!r}, expected numbers above 0")
    return tuple(float(value) for value in values)


def _extractor(config: LogMelConfig) -> dict[str, Any]:
    """What `_log_mel` reads these features from, without what is as published."""
    window = 2 ** math.ceil(math.log2(config.window_samples))
    written: dict[str, Any] = {
        theirs: getattr(config, ours)
        for ours, theirs in _OF_EXTRACTOR.items()
        if getattr(config, ours) != getattr(_FEATURES, ours)
    }
    if config.fft_length == window:
        written["fft_overdrive"] = False
    for theirs, ours in (("per_bin_mean", "mean"), ("per_bin_stddev", "stddev")):
        if (value := getattr(config, ours)) != getattr(_FEATURES, ours):
            written[theirs] = list(value) if isinstance(value, tuple) else [value] * config.mel_bins
    return written


def _subsampling_pieces(config: ConformerConfig, prefix: str) -> list[Piece]:
    pieces, inputs, bins = [], 1, config.log_mel.mel_bins
    for index, outputs in enumerate(config.subsampling_channels):
        conv = Layout((outputs, inputs, 3, 3), (3, 3, inputs, outputs), order=(2, 3, 1, 0))
        source = f"{prefix}subsample_conv_projection.conv_{index}"
        pieces += [
            Piece(f"subsampling/conv_{index}/kernel", f"{source}.conv.weight", conv),
            Piece(f"subsampling/norm_{index}/scale", f"{source}.norm.weight", same((outputs,))),
        ]
        inputs, bins = outputs, -(-bins // 2)
    out = transposed((bins, inputs), (config.dim,))
    return [*pieces, Piece("subsampling/out/kernel", prefix + _ANCHOR, out)]


def _layer_pieces(config: ConformerConfig, source: str, layer: int) -> list[Piece]:
    dim, hidden, taps = config.dim, config.ffn_multiplier * config.dim, config.conv_kernel
    heads = (config.heads, dim // config.heads)
    found = [
        ("attention_norm/scale", "attention.pre_attn_norm.weight", same((dim,))),
        ("attention/per_dim_scale", "attention.attn.per_dim_scale", same(heads[1:])),
        (
            "attention/position/kernel",
            "attention.attn.relative_position_embedding.pos_proj.weight",
            transposed((dim,), heads),
        ),
        ("attention/out/kernel", "attention.post.weight", transposed(heads, (dim,))),
        ("attention_post_norm/scale", "attention.post_norm.weight", same((dim,))),
        ("conv_norm/scale", "lconv1d.pre_layer_norm.weight", same((dim,))),
        ("conv/value_gate/kernel", "lconv1d.linear_start.weight", transposed((dim,), (2, dim))),
        (
            "conv/depthwise",
            "lconv1d.depthwise_conv1d.weight",
            Layout((dim, 1, taps), (taps, dim), (dim, taps), (1, 0)),
        ),
        ("conv/norm/scale", "lconv1d.conv_norm.weight", same((dim,))),
        ("conv/out/kernel", "lconv1d.linear_end.weight", transposed((dim,), (dim,))),
        ("norm/scale", "norm.weight", same((dim,))),
    ]
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        found.append(
            (f"attention/{ours}/kernel", f"attention.attn.{theirs}.weight", transposed((dim,), heads))
        )
    for ours, theirs in (("ffn_start", "ffw_layer_start"), ("ffn_end", "ffw_layer_end")):
        found += [
            (f"{ours}_norm/scale", f"{theirs}.pre_layer_norm.weight", same((dim,))),
            (f"{ours}/wi/kernel", f"{theirs}.ffw_layer_1.weight", transposed((dim,), (hidden,))),
            (f"{ours}/wo/kernel", f"{theirs}.ffw_layer_2.weight", transposed((hidden,), (dim,))),
            (f"{ours}_post_norm/scale", f"{theirs}.post_layer_norm.weight", same((dim,))),
        ]
    return [Piece(f"layers/{ours}", source + theirs, layout, layer) for ours, theirs, layout in found]


FAMILY = Gemma3n()
