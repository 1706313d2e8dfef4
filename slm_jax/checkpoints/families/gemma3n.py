"""Gemma 3n's audio tower, alone or inside the multimodal model (transformers, `Gemma3nAudioEncoder`)."""

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
            log_mel=LogMelConfig(
                mel_bins=published.whole(config, "input_feat_size", 128), padded_to=_PADDED_TO
            ),
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
        for ours, theirs in (("clip", "gradient_clipping"), ("logit_cap", "conf_attention_logit_cap")):
            if written[theirs] is None:
                raise UserError(f"ConformerConfig.{ours} is None, expected a number: Gemma 3n has {theirs}")
        conformer.check_written(config, self.config_of(written, {}), _INERT)
        return written

    def hf_pieces(self, config: ConformerConfig) -> list[Piece]:
        """Returns the tensors to write for transformers, named as in the bare model."""
        return self.pieces(config, {})


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
