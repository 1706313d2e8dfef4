"""HuBERT and wav2vec 2.0 of the large variety, with or without the head of a fine-tuned one."""

from collections.abc import Mapping
from typing import Any

from slm_jax.checkpoints.families import published
from slm_jax.checkpoints.families.base import Tensors
from slm_jax.checkpoints.families.mapping import Layout, Piece, same, transposed
from slm_jax.checkpoints.families.pre_norm import (
    LayerNames,
    conv_pieces,
    norm_pieces,
    transformer_pieces,
)
from slm_jax.errors import UserError, nearest
from slm_jax.models.wav2vec2 import Wav2Vec2Config

_NAMES = LayerNames(
    attention="attention",
    attention_norm="layer_norm",
    mlp_in="feed_forward.intermediate_dense",
    mlp_out="feed_forward.output_dense",
    mlp_norm="final_layer_norm",
)
_PREFIXES = ("hubert.", "wav2vec2.", "")
_POSITIONS = "encoder.pos_conv_embed.conv"
# What the two tensors of the weight norm, length and direction, are called since torch 2.1, and before.
_WEIGHT_NORM = ("parametrizations.weight.original0", "parametrizations.weight.original1")
_OLD_WEIGHT_NORM = ("weight_g", "weight_v")
_UNUSED = {
    "lm_head.": "the CTC head",
    "quantizer.": "the quantizer of pretraining",
    "project_hid.": "a projection of pretraining",
    "project_q.": "a projection of pretraining",
    "masked_spec_embed": "the embedding of masked frames, in training only",
    "projector.": "a classification head",
    "classifier.": "a classification head",
    "layer_weights": "a classification head",
}


class Wav2Vec2Family:
    """See `base.Family`."""

    kind: str = "wav2vec2"
    model_types: tuple[str, ...] = ("hubert", "wav2vec2")

    def config_of(self, config: Mapping[str, Any], tensors: Tensors) -> Wav2Vec2Config:
        del tensors
        if (model_type := config.get("model_type")) not in self.model_types:
            raise UserError(
                f"config.json has model_type {model_type!r}{nearest(model_type, self.model_types)}"
            )
        _refuse(config)
        values = {
            "layers": published.whole(config, "num_hidden_layers"),
            "dim": published.whole(config, "hidden_size"),
            "heads": published.whole(config, "num_attention_heads"),
            "mlp_dim": published.whole(config, "intermediate_size"),
            "conv_dims": published.wholes(config, "conv_dim"),
            "conv_kernels": published.wholes(config, "conv_kernel"),
            "conv_strides": published.wholes(config, "conv_stride"),
            "position_kernel": published.whole(config, "num_conv_pos_embeddings"),
            "position_groups": published.whole(config, "num_conv_pos_embedding_groups"),
        }
        for field, name in (
            ("num_attention_heads", "heads"),
            ("num_conv_pos_embedding_groups", "position_groups"),
        ):
            if values["dim"] % values[name]:
                raise UserError(
                    f"config.json has {field} {values[name]}, expected a divisor of hidden_size, "
                    f"{values['dim']}"
                )
        for field, name in (("conv_kernel", "conv_kernels"), ("conv_stride", "conv_strides")):
            if len(values[name]) != len(values["conv_dims"]):
                raise UserError(
                    f"config.json has {len(values[name])} numbers in {field}, expected as many as in "
                    f"conv_dim, {len(values['conv_dims'])}"
                )
        return Wav2Vec2Config(
            **values,
            conv_bias=published.flag(config, "conv_bias", False),
            activation=published.activation(config, "hidden_act"),
            conv_activation=published.activation(config, "feat_extract_activation"),
            norm_epsilon=published.number(config, "layer_norm_eps", 1e-5),
            normalize=_normalize(config),
            published_as=model_type,
        )

    def pieces(self, config: Wav2Vec2Config, tensors: Tensors) -> list[Piece]:
        prefix = published.prefix_of(tensors, _PREFIXES, "feature_projection.projection.weight")
        old = f"{prefix}{_POSITIONS}.{_OLD_WEIGHT_NORM[0]}" in tensors
        return self._pieces(config, prefix, _OLD_WEIGHT_NORM if old else _WEIGHT_NORM)

    def unused(self, name: str) -> str | None:
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        return next((why for start, why in _UNUSED.items() if name.startswith(start)), None)

    def copies(self, config: Wav2Vec2Config, tensors: Tensors) -> list[tuple[str, str]]:
        return []

    def hf_config(self, config: Wav2Vec2Config) -> dict[str, Any]:
        return {
            "architectures": ["HubertModel" if config.published_as == "hubert" else "Wav2Vec2Model"],
            "model_type": config.published_as,
            "num_hidden_layers": config.layers,
            "hidden_size": config.dim,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp_dim,
            "conv_dim": list(config.conv_dims),
            "conv_kernel": list(config.conv_kernels),
            "conv_stride": list(config.conv_strides),
            "num_feat_extract_layers": len(config.conv_dims),
            "conv_bias": config.conv_bias,
            "num_conv_pos_embeddings": config.position_kernel,
            "num_conv_pos_embedding_groups": config.position_groups,
            "hidden_act": published.activation_of(config.activation),
            "feat_extract_activation": published.activation_of(config.conv_activation),
            "layer_norm_eps": config.norm_epsilon,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
            "do_normalize": config.normalize,
            "hidden_dropout": config.dropout,
            "attention_dropout": config.dropout,
            "activation_dropout": config.dropout,
            "feat_proj_dropout": config.dropout,
            # Else transformers wants the embedding of masked frames, which is not kept.
            "apply_spec_augment": False,
            "mask_time_prob": 0.0,
            "mask_feature_prob": 0.0,
        }

    def hf_pieces(self, config: Wav2Vec2Config) -> list[Piece]:
        return self._pieces(config, "", _WEIGHT_NORM)

    def _pieces(self, config: Wav2Vec2Config, prefix: str, weight_norm: tuple[str, str]) -> list[Piece]:
        pieces, inputs = [], 1
        for index, (dim, taps) in enumerate(zip(config.conv_dims, config.conv_kernels, strict=True)):
            theirs = f"{prefix}feature_extractor.conv_layers.{index}"
            ours = f"front_end/conv_{index}"
            pieces += conv_pieces(ours, f"{theirs}.conv", taps, inputs, dim, use_bias=config.conv_bias)
            pieces += norm_pieces(f"front_end/norm_{index}", f"{theirs}.layer_norm", dim)
            inputs = dim
        projection = f"{prefix}feature_projection."
        pieces += norm_pieces("front_end/norm", f"{projection}layer_norm", inputs)
        kernel = transposed((inputs,), (config.dim,))
        pieces += [
            Piece("in/kernel", f"{projection}projection.weight", kernel),
            Piece("in/bias", f"{projection}projection.bias", same((config.dim,))),
        ]
        length, direction = (f"{prefix}{_POSITIONS}.{name}" for name in weight_norm)
        taps, group = config.position_kernel, config.dim // config.position_groups
        shape = (config.dim, group, taps)
        pieces += [
            Piece("position/length", length, Layout((1, 1, taps), (taps,))),
            Piece("position/direction", direction, Layout(shape, shape[::-1], order=(2, 1, 0))),
            Piece("position/bias", f"{prefix}{_POSITIONS}.bias", same((config.dim,))),
        ]
        pieces += transformer_pieces(
            _NAMES,
            theirs=f"{prefix}encoder.",
            ours="encoder",
            layers=config.layers,
            dim=config.dim,
            heads=config.heads,
            mlp_dim=config.mlp_dim,
        )
        return pieces


def _refuse(config: Mapping[str, Any]) -> None:
    """Raises UserError where a switch asks for what the network does not compute."""
    for field, expected, default, why in (
        ("feat_extract_norm", "layer", "group", "only the large variety is computed, not the base one"),
        ("do_stable_layer_norm", True, False, "only the large variety is computed, not the base one"),
        ("feat_proj_layer_norm", True, True, "features without that norm are not computed"),
        ("conv_pos_batch_norm", False, False, "batch norm of positions is not computed"),
        ("add_adapter", False, False, "the convolutions behind the encoder are not computed"),
        ("adapter_attn_dim", None, None, "adapters of single languages are not computed"),
    ):
        published.require(config, field, expected, default, why)


def _normalize(config: Mapping[str, Any]) -> bool:
    """Whether waveforms are normalised: the feature extractor says so, or the `config.json` that we write."""
    extractor = published.extractor_of(config)
    published.require_features(extractor, {"feature_size": 1}, "features are the waveform")
    # True in all published models of this variety.
    found = published.flag(extractor, "do_normalize", True, published.EXTRACTOR)
    if "do_normalize" not in config:
        return found
    written = published.flag(config, "do_normalize", True)
    published.require(extractor, "do_normalize", written, why="config.json says so", file=published.EXTRACTOR)
    return written


FAMILY = Wav2Vec2Family()
