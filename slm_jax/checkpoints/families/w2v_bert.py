"""w2v-BERT 2.0 (arXiv 2312.05187), bare or below a head (transformers, `Wav2Vec2BertModel`)."""

from collections.abc import Mapping
from typing import Any

from slm_jax.audio.kaldi_fbank import KaldiFbankConfig
from slm_jax.checkpoints.families import conformer, published
from slm_jax.checkpoints.families.base import Tensors
from slm_jax.checkpoints.families.mapping import Layout, Piece, same, transposed
from slm_jax.errors import UserError
from slm_jax.models.conformer import ConformerConfig

_PREFIXES = ("wav2vec2_bert.", "")
_ANCHOR = "feature_projection.layer_norm.weight"

_POSITIONS = {"relative_key": "shaw", "relative": "transformer_xl", None: "none"}

# Fields of ours that no w2v-BERT reads.
_INERT = (
    "ffn_multiplier",
    "left_context",
    "right_context",
    "chunk_frames",
    "left_chunks",
    "subsampling_channels",
    "subsampling_epsilon",
)

_UNUSED = {
    "lm_head.": "the CTC head",
    "projector.": "a classification head",
    "classifier.": "a classification head",
    "layer_weights": "a classification head's weights of layers",
    "tdnn.": "the speaker head",
    "feature_extractor.": "the speaker head",
    "objective.": "the speaker head",
    "masked_spec_embed": "the vector of masked frames, of pretraining alone",
    "encoder.embed_positions.": "a constant that config.json gives",
}


class Wav2Vec2Bert:
    """The family of facebook/w2v-bert-2.0; see `base.Family`."""

    kind = conformer.KIND
    model_types = ("wav2vec2-bert",)

    def config_of(self, config: Mapping[str, Any], tensors: Tensors) -> ConformerConfig:
        """Returns our configuration; fields that older files lack are as in transformers.

        Raises:
          UserError: a field is missing, of the wrong type, or of a value that our network does not compute,
            such as the convolutional adapter after the encoder.
        """
        why = "the adapter after the encoder is not computed, and SLM brings its own"
        published.require(config, "add_adapter", False, why=why)
        positions = published.choose(config, "position_embeddings_type", _POSITIONS, "relative_key")
        inputs = published.whole(config, "feature_projection_input_dim", 160)
        if inputs % 2:
            raise UserError(
                f"config.json has feature_projection_input_dim {inputs}, expected an even number: "
                "features are stacks of two frames"
            )
        # The published extractor pads with 1 what both leave out afterwards, so padding_value says nothing.
        published.require_features(
            published.extractor_of(config),
            {"num_mel_bins": inputs // 2, "stride": 2},
            f"config.json has feature_projection_input_dim {inputs}, and features are stacks of two frames",
        )
        kernel = published.whole(config, "conv_depthwise_kernel_size", 31)
        if kernel % 2 == 0:
            raise UserError(
                f"config.json has conv_depthwise_kernel_size {kernel}, "
                "expected an odd number, as transformers does"
            )
        kept = {}
        if positions == "shaw":
            kept["left_positions"] = published.whole(config, "left_max_position_embeddings", 64, least=0)
            kept["right_positions"] = published.whole(config, "right_max_position_embeddings", 8, least=0)
        return conformer.configured(
            layers=published.whole(config, "num_hidden_layers"),
            dim=published.whole(config, "hidden_size"),
            heads=published.whole(config, "num_attention_heads"),
            ffn_dim=published.whole(config, "intermediate_size"),
            activation=published.activation(config, "hidden_act", "swish"),
            use_bias=True,
            conv_kernel=kernel,
            conv_padding="causal",
            conv_gate="joined",
            positions=positions,
            **kept,
            norm_type="layer",
            norm_epsilon=published.number(config, "layer_norm_eps", 1e-5, zero=True),
            front_end="kaldi_fbank",
            subsampling="projection",
            kaldi_fbank=KaldiFbankConfig(mel_bins=inputs // 2),
        )

    def pieces(self, config: ConformerConfig, tensors: Tensors) -> list[Piece]:
        """Returns where every parameter comes from; the prefix is that of the tensors."""
        prefix = published.prefix_of(tensors, _PREFIXES, _ANCHOR)
        inputs = config.kaldi_fbank.mel_bins * config.kaldi_fbank.stack
        source = f"{prefix}feature_projection"
        pieces = [
            Piece("projection/norm/scale", f"{source}.layer_norm.weight", same((inputs,))),
            Piece("projection/norm/bias", f"{source}.layer_norm.bias", same((inputs,))),
            Piece(
                "projection/out/kernel", f"{source}.projection.weight", transposed((inputs,), (config.dim,))
            ),
            Piece("projection/out/bias", f"{source}.projection.bias", same((config.dim,))),
        ]
        for layer in range(config.layers):
            source = f"{prefix}encoder.layers.{layer}."
            found = [*_attention_tensors(config), *_other_tensors(config)]
            pieces += [
                Piece(f"layers/{ours}", source + theirs, layout, layer) for ours, theirs, layout in found
            ]
        return pieces

    def unused(self, name: str) -> str | None:
        """Returns why a tensor is deliberately left out; None if it must be used."""
        bare = name.removeprefix("wav2vec2_bert.")
        return next((reason for prefix, reason in _UNUSED.items() if bare.startswith(prefix)), None)

    def copies(self, config: ConformerConfig, tensors: Tensors) -> list[tuple[str, str]]:
        """Returns no pairs: nothing is stored twice."""
        return []

    def hf_config(self, config: ConformerConfig) -> dict[str, Any]:
        """Returns the `config.json` of a bare model.

        Raises:
          UserError: the configuration is not one of this family.
        """
        positions = {ours: theirs for theirs, ours in _POSITIONS.items()}
        written = {
            "model_type": "wav2vec2-bert",
            "architectures": ["Wav2Vec2BertModel"],
            "hidden_size": config.dim,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.ffn_dim or config.ffn_multiplier * config.dim,
            "feature_projection_input_dim": config.kaldi_fbank.mel_bins * config.kaldi_fbank.stack,
            "hidden_act": published.activation_of(config.activation),
            "layer_norm_eps": config.norm_epsilon,
            "conv_depthwise_kernel_size": config.conv_kernel,
            "position_embeddings_type": positions.get(config.positions, config.positions),
            "left_max_position_embeddings": config.left_positions,
            "right_max_position_embeddings": config.right_positions,
            "add_adapter": False,
            # Without them the model has no vector of masked frames, which we do not keep.
            "mask_time_prob": 0.0,
            "mask_feature_prob": 0.0,
        }
        inert = _INERT
        if config.positions != "shaw":
            inert += ("left_positions", "right_positions")
        if config.ffn_dim is None:
            inert += ("ffn_dim",)
        conformer.check_written(config, self.config_of(written, {}), inert)
        return written

    def hf_pieces(self, config: ConformerConfig) -> list[Piece]:
        """Returns the tensors to write for transformers, named as in the bare model."""
        return self.pieces(config, {})


def _attention_tensors(config: ConformerConfig) -> list[tuple[str, str, Layout]]:
    dim, heads = config.dim, (config.heads, config.dim // config.heads)
    found = [
        ("attention/out/kernel", "self_attn.linear_out.weight", transposed(heads, (dim,))),
        ("attention/out/bias", "self_attn.linear_out.bias", same((dim,))),
    ]
    for ours, theirs in (("query", "linear_q"), ("key", "linear_k"), ("value", "linear_v")):
        found += [
            (f"attention/{ours}/kernel", f"self_attn.{theirs}.weight", transposed((dim,), heads)),
            (f"attention/{ours}/bias", f"self_attn.{theirs}.bias", Layout((dim,), heads)),
        ]
    if config.positions == "shaw":
        table = same((config.left_positions + config.right_positions + 1, heads[1]))
        found.append(("attention/distance_embedding", "self_attn.distance_embedding.weight", table))
    if config.positions == "transformer_xl":
        # Their sinusoids alternate sine and cosine, ours are all sines and then all cosines.
        position = Layout((dim, dim), (dim, *heads), (dim, dim // 2, 2), (2, 1, 0))
        found += [
            ("attention/position/kernel", "self_attn.linear_pos.weight", position),
            ("attention/content_bias", "self_attn.pos_bias_u", same(heads)),
            ("attention/position_bias", "self_attn.pos_bias_v", same(heads)),
        ]
    return found


def _other_tensors(config: ConformerConfig) -> list[tuple[str, str, Layout]]:
    dim, taps = config.dim, config.conv_kernel
    hidden = config.ffn_dim or config.ffn_multiplier * dim
    found = [
        (
            "conv/value_gate/kernel",
            "conv_module.pointwise_conv1.weight",
            Layout((2 * dim, dim, 1), (dim, 2, dim), (2 * dim, dim), (1, 0)),
        ),
        (
            "conv/depthwise",
            "conv_module.depthwise_conv.weight",
            Layout((dim, 1, taps), (taps, dim), (dim, taps), (1, 0)),
        ),
        (
            "conv/out/kernel",
            "conv_module.pointwise_conv2.weight",
            Layout((dim, dim, 1), (dim, dim), (dim, dim), (1, 0)),
        ),
    ]
    for ours, theirs in (
        ("ffn_start_norm", "ffn1_layer_norm"),
        ("attention_norm", "self_attn_layer_norm"),
        ("conv_norm", "conv_module.layer_norm"),
        ("conv/norm", "conv_module.depthwise_layer_norm"),
        ("ffn_end_norm", "ffn2_layer_norm"),
        ("norm", "final_layer_norm"),
    ):
        found += [
            (f"{ours}/scale", f"{theirs}.weight", same((dim,))),
            (f"{ours}/bias", f"{theirs}.bias", same((dim,))),
        ]
    for ours, theirs in (("ffn_start", "ffn1"), ("ffn_end", "ffn2")):
        found += [
            (f"{ours}/wi/kernel", f"{theirs}.intermediate_dense.weight", transposed((dim,), (hidden,))),
            (f"{ours}/wi/bias", f"{theirs}.intermediate_dense.bias", same((hidden,))),
            (f"{ours}/wo/kernel", f"{theirs}.output_dense.weight", transposed((hidden,), (dim,))),
            (f"{ours}/wo/bias", f"{theirs}.output_dense.bias", same((dim,))),
        ]
    return found


FAMILY = Wav2Vec2Bert()
