"""T5 as published: T5 v1.0, v1.1, LM-adapted and Flan, mT5, mT0, umT5, ByT5; from transformers or from T5X.

Their names are those of transformers (`encoder.block.0.layer.0.SelfAttention.q.weight`) or of T5X
(`target.encoder.layers_0.attention.query.kernel`); a checkpoint has one sort or the other.

Whether the logits have a table of their own, and whether they are scaled by d_model ** -0.5, is what the
versions of transformers disagree on. `config_of` takes the model for what it was trained as:

- `tie_word_embeddings` of a file says whether the table is shared and, with it, whether they are scaled. The
  published mT5, mT0, umT5, ByT5, T5 v1.1 and Flan-T5 say false: neither. A `lm_head.weight` beside a true one
  is a copy (`copies`), left out.
- transformers 5 writes true in every file. In a file that it wrote, `lm_head.weight` is there exactly where
  the table is not shared; scaling is `scale_decoder_outputs` for T5, never for mT5, always for umT5.

transformers 5 reads a published umT5, which is untied and unscaled, as scaled: its logits are d_model ** -0.5
times those of T5X, of transformers 4 and of this model. Greedy decoding is the same.

Shape suffixes: D features, H heads, C features of a head, V vocabulary.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax

from slm_jax.checkpoints.families import published
from slm_jax.checkpoints.families.base import Tensors
from slm_jax.checkpoints.families.mapping import Layout, Piece, same, transposed
from slm_jax.checkpoints.safetensors import flatten
from slm_jax.errors import UserError, check_whole, nearest
from slm_jax.models.networks import abstract_params
from slm_jax.models.t5 import T5Config

# Defaults of the fields of `config.json`, by model_type, as transformers 4 and 5 have them.
_OF_ALL = {
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_OF_T5 = _OF_ALL | {
    "vocab_size": 32128,
    "d_model": 512,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "feed_forward_proj": "relu",
}
_OF_MT5 = _OF_ALL | {
    "vocab_size": 250112,
    "d_model": 512,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
_DEFAULTS: dict[str, dict[str, Any]] = {"t5": _OF_T5, "mt5": _OF_MT5, "umt5": _OF_MT5}
# The published umT5 names no model_type.
_OF_ARCHITECTURE = {
    "T5ForConditionalGeneration": "t5",
    "MT5ForConditionalGeneration": "mt5",
    "UMT5ForConditionalGeneration": "umt5",
}
# What a layer of ours holds, below `encoder/encoder` or `decoder/decoder`, and their name below the block.
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_OF_ENCODER_LAYER = {
    **{f"attention/{our}/kernel": f"layer.0.SelfAttention.{their}" for our, their in _ATTENTION.items()},
    "relpos_bias/rel_embedding": "layer.0.SelfAttention.relative_attention_bias",
    "pre_attention_layer_norm/scale": "layer.0.layer_norm",
    **{f"mlp/{name}/kernel": f"layer.1.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")},
    "pre_mlp_layer_norm/scale": "layer.1.layer_norm",
}
_OF_DECODER_LAYER = {
    **{f"self_attention/{our}/kernel": f"layer.0.SelfAttention.{their}" for our, their in _ATTENTION.items()},
    "relpos_bias/rel_embedding": "layer.0.SelfAttention.relative_attention_bias",
    "pre_self_attention_layer_norm/scale": "layer.0.layer_norm",
    **{
        f"encoder_decoder_attention/{our}/kernel": f"layer.1.EncDecAttention.{their}"
        for our, their in _ATTENTION.items()
    },
    "pre_cross_attention_layer_norm/scale": "layer.1.layer_norm",
    **{f"mlp/{name}/kernel": f"layer.2.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1", "wo")},
    "pre_mlp_layer_norm/scale": "layer.2.layer_norm",
}
_OF_STACK = {"encoder": _OF_ENCODER_LAYER, "decoder": _OF_DECODER_LAYER}
_OUTSIDE_LAYERS = {
    "encoder/relpos_bias/rel_embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm",
    "decoder/relpos_bias/rel_embedding": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm",
    "decoder/logits_dense/kernel": "lm_head",
}
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
_FIRST_OF_ENCODER = "encoder.block.0.layer.0.SelfAttention.q.weight"
_FIRST_OF_DECODER = "decoder.block.0.layer.0.SelfAttention.q.weight"
_T5X = "target."
_UNUSED = (
    (
        re.compile(r"(^|\.)lm_head\.weight"),
        "the embedding table again: config.json says that logits share it",
    ),
    (re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight"), "the shared embedding table again"),
    (
        re.compile(r".*EncDecAttention\.relative_attention_bias\.weight"),
        "attention to the encoder has no relative positions",
    ),
    (re.compile(r"state\..*"), "the optimizer's state"),
)


class T5Family:
    """What the conversion needs of T5; see `families.base.Family`."""

    kind = "t5"
    model_types = ("t5", "mt5", "umt5", "t5x")

    def config_of(self, config: Mapping[str, Any], tensors: Tensors) -> T5Config:
        """Returns our configuration of a T5; see `families.base.Family.config_of`."""
        model_type = _model_type(config)
        if model_type == "t5x":
            return _of_t5x(config)
        _refuse_what_is_not_computed(config)
        prefix = _prefix(tensors)
        if not any(name.startswith(f"{prefix}decoder.") for name in tensors):
            raise UserError("the checkpoint holds T5's encoder alone, expected its decoder too")
        _check_head_was_saved(config, f"{prefix}{_HEAD}" in tensors)
        values = {
            name: default if config.get(name) is None else config[name]
            for name, default in _DEFAULTS[model_type].items()
        }
        for name in values.keys() - {"layer_norm_epsilon", "feed_forward_proj"}:
            _check_size(f"config.json: {name}", values[name])
        epsilon = values["layer_norm_epsilon"]
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
            raise UserError(f"config.json: layer_norm_epsilon is {epsilon!r}, expected a number from 0 to 1")
        _check_buckets(
            "config.json: ",
            values["relative_attention_num_buckets"],
            values["relative_attention_max_distance"],
        )
        decoder_layers = config.get("num_decoder_layers")
        if decoder_layers is None:
            decoder_layers = values["num_layers"]
        _check_size("config.json: num_decoder_layers", decoder_layers)
        _check_layers(tensors, f"{prefix}encoder", "num_layers", values["num_layers"])
        _check_layers(tensors, f"{prefix}decoder", "num_decoder_layers", decoder_layers)
        activation, gated = _activation(config, values["feed_forward_proj"])
        tied, scaled = _head(config, model_type, f"{prefix}{_HEAD}" in tensors)
        if not tied and f"{prefix}{_HEAD}" not in tensors:
            raise UserError(
                f"config.json: tie_word_embeddings is false and the checkpoint has no {prefix}{_HEAD}, "
                "expected the table of the logits"
            )
        return T5Config(
            vocab_size=values["vocab_size"],
            emb_dim=values["d_model"],
            num_heads=values["num_heads"],
            head_dim=values["d_kv"],
            mlp_dim=values["d_ff"],
            encoder_layers=values["num_layers"],
            decoder_layers=decoder_layers,
            activation=activation,
            gated=gated,
            tied_logits=tied,
            scale_tied_logits=scaled if tied else True,
            scale_untied_logits=scaled and not tied,
            relative_bias="layer" if model_type == "umt5" else "shared",
            relative_buckets=values["relative_attention_num_buckets"],
            relative_max_distance=values["relative_attention_max_distance"],
            norm_epsilon=float(epsilon),
        )

    def pieces(self, config: T5Config, tensors: Tensors) -> list[Piece]:
        """Returns where every parameter comes from, for names of transformers or of T5X."""
        if any(name.startswith(_T5X) for name in tensors):
            return self._t5x_pieces(config, tensors)
        prefix = _prefix(tensors)
        embedding = next((name for name in _EMBEDDINGS if prefix + name in tensors), _EMBEDDINGS[0])
        if config.tied_logits and prefix + embedding not in tensors and prefix + _HEAD in tensors:
            embedding = _HEAD
        return self._hf_pieces(config, prefix, embedding)

    def unused(self, name: str) -> str | None:
        """Returns why a tensor is left out, or None if it must be used."""
        return next((reason for pattern, reason in _UNUSED if pattern.fullmatch(name)), None)

    def copies(self, config: T5Config, tensors: Tensors) -> list[tuple[str, str]]:
        """Returns pairs of names, one left out and one used, whose tensors must hold the same values."""
        used = {piece.source for piece in self.pieces(config, tensors)}
        prefix = "" if any(name.startswith(_T5X) for name in tensors) else _prefix(tensors)
        names = [prefix + name for name in (*_EMBEDDINGS, _HEAD) if prefix + name in tensors]
        table = next((name for name in names if name in used), None)
        return [(name, table) for name in names if table and name not in used]

    def hf_config(self, config: T5Config) -> dict[str, Any]:
        """Returns a `config.json` for transformers.

        With tables of relative positions per layer the model is written as umT5. Of those whose logits are
        neither shared nor scaled, transformers 5 scales the logits; see the head of this file.

        Raises:
          UserError: transformers has no model that computes this.
        """
        scaled = config.scale_tied_logits if config.tied_logits else config.scale_untied_logits
        if config.relative_bias == "layer":
            if config.tied_logits and not scaled:
                raise UserError(
                    "T5Config.scale_tied_logits is False, expected True where relative_bias is 'layer': "
                    "transformers has no other model of that kind"
                )
            model_type, architecture = "umt5", "UMT5ForConditionalGeneration"
        elif config.vocab_size == 250112 and config.gated and not config.tied_logits and not scaled:
            model_type, architecture = "mt5", "MT5ForConditionalGeneration"
        else:
            model_type, architecture = "t5", "T5ForConditionalGeneration"
        activation = published.activation_of(config.activation)
        if activation == "gelu":
            # "gated-gelu" means gelu_new to transformers, so the exact form goes by its other name.
            activation = "gelu_python"
        gated_gelu = config.gated and config.activation == "gelu"
        of_transformers_5 = {} if config.tied_logits == scaled else {"scale_decoder_outputs": scaled}
        return {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": config.vocab_size,
            "d_model": config.emb_dim,
            "d_kv": config.head_dim,
            "d_ff": config.mlp_dim,
            "num_layers": config.encoder_layers,
            "num_decoder_layers": config.decoder_layers,
            "num_heads": config.num_heads,
            "relative_attention_num_buckets": config.relative_buckets,
            "relative_attention_max_distance": config.relative_max_distance,
            "layer_norm_epsilon": config.norm_epsilon,
            # The spelling that every version reads.
            "feed_forward_proj": "gated-gelu" if gated_gelu else f"{'gated-' * config.gated}{activation}",
            "dense_act_fn": activation,
            "is_gated_act": config.gated,
            "tie_word_embeddings": config.tied_logits or scaled,
            **of_transformers_5,
            "dropout_rate": config.dropout,
            "is_encoder_decoder": True,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }

    def hf_pieces(self, config: T5Config) -> list[Piece]:
        """Returns the tensors to write for transformers."""
        return self._hf_pieces(config, "", _EMBEDDINGS[0])

    def _hf_pieces(self, config: T5Config, prefix: str, embedding: str) -> list[Piece]:
        pieces = []
        for parameter, leaf in _shapes(config).items():
            stack, inner, *rest = parameter.split("/")
            if stack == inner:
                source = _OF_STACK[stack]["/".join(rest)]
                layout = _from_torch(parameter, leaf.shape[1:])
                pieces += [
                    Piece(parameter, f"{prefix}{stack}.block.{layer}.{source}.weight", layout, layer)
                    for layer in range(leaf.shape[0])
                ]
            elif parameter == "token_embedder/embedding":
                pieces.append(Piece(parameter, prefix + embedding, same(leaf.shape)))
            else:
                source = f"{prefix}{_OUTSIDE_LAYERS[parameter]}.weight"
                pieces.append(Piece(parameter, source, _from_torch(parameter, leaf.shape)))
        return pieces

    def _t5x_pieces(self, config: T5Config, tensors: Tensors) -> list[Piece]:
        pieces = []
        for parameter, leaf in _shapes(config).items():
            stack, inner, *rest = parameter.split("/")
            if stack != inner:
                pieces.append(Piece(parameter, _T5X + parameter.replace("/", "."), same(leaf.shape)))
                continue
            layers, *shape = leaf.shape
            name = ".".join(rest)
            scanned = f"{_T5X}{stack}.{stack}.{name}"
            if any(other.startswith(f"{_T5X}{stack}.{stack}.") for other in tensors):
                found = tensors[scanned].shape if scanned in tensors else ()
                # T5X puts the axis of its layers second unless it was told otherwise.
                first = found == (layers, *shape) and found != (shape[0], layers, *shape[1:])
                axis = 0 if first else 1
                layout = _fused(parameter, tuple(shape), len(found) - 1)
                pieces += [Piece(parameter, scanned, layout, i, (axis, i)) for i in range(layers)]
            else:
                for layer in range(layers):
                    source = f"{_T5X}{stack}.layers_{layer}.{name}"
                    dims = len(tensors[source].shape) if source in tensors else len(shape)
                    pieces.append(Piece(parameter, source, _fused(parameter, tuple(shape), dims), layer))
        return pieces


@functools.cache
def _shapes(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Our parameters by path. Tracing takes a second, and a conversion asks several times."""
    return flatten(abstract_params(config))


def _from_torch(parameter: str, shape: tuple[int, ...]) -> Layout:
    """Where the values of a tensor of transformers go, for a parameter without its axis of layers."""
    if parameter.endswith("scale"):
        return same(shape)
    if parameter.endswith("rel_embedding"):
        return transposed(shape[:1], shape[1:])  # [buckets, H]
    inputs = 2 if parameter.endswith("out/kernel") else 1
    return transposed(shape[:inputs], shape[inputs:])


def _fused(parameter: str, shape: tuple[int, ...], dims: int) -> Layout:
    """T5X's first networks hold the kernels of attention as matrices, [D, H*C] and [H*C, D]."""
    if len(shape) != 3 or dims != 2:
        return same(shape)
    outer, middle, inner = shape
    theirs = (outer * middle, inner) if parameter.endswith("out/kernel") else (outer, middle * inner)
    return Layout(theirs, shape)


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    if model_type is None:
        architectures = config.get("architectures") or [None]
        first = architectures[0] if isinstance(architectures, list) else architectures
        if isinstance(first, str) and first in _OF_ARCHITECTURE:
            return _OF_ARCHITECTURE[first]
    if model_type not in T5Family.model_types:
        raise UserError(
            f"config.json: model_type is {model_type!r}{nearest(model_type, T5Family.model_types)}"
        )
    return str(model_type)


def _prefix(tensors: Tensors) -> str:
    """What stands before the names of the bare model, such as `transformer.`; usually nothing."""
    prefixes = {
        name.removesuffix(first)
        for name in tensors
        for first in (_FIRST_OF_ENCODER, _FIRST_OF_DECODER)
        if name.endswith(f".{first}") or name == first
    }
    if len(prefixes) > 1:
        found = ", ".join(sorted(map(repr, prefixes)))
        raise UserError(f"the checkpoint holds several T5s, under the prefixes {found}, expected one")
    if not prefixes:
        raise UserError(f"the checkpoint holds no tensor {_FIRST_OF_ENCODER}, expected the names of a T5")
    return prefixes.pop()


def _refuse_what_is_not_computed(config: Mapping[str, Any]) -> None:
    expected = {
        "is_encoder_decoder": True,
        "is_decoder": False,
        "tie_encoder_decoder": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    for name, value in expected.items():
        if config.get(name) is not None and config[name] != value:
            raise UserError(f"config.json: {name} is {config[name]!r}, expected {value!r}")
    if config.get("quantization_config") is not None:
        raise UserError("config.json: quantization_config is set, expected weights that are not quantized")


def _activation(config: Mapping[str, Any], projection: Any) -> tuple[str, bool]:
    """Our activation and whether the MLP is gated; the explicit fields override the name."""
    if not isinstance(projection, str):
        raise UserError(f"config.json: feed_forward_proj is {projection!r}, expected such as 'gated-gelu'")
    gated, name = projection.startswith("gated-"), projection.removeprefix("gated-")
    if projection == "gated-gelu":
        name = "gelu_new"
    if config.get("dense_act_fn") is not None:
        name = config["dense_act_fn"]
    if config.get("is_gated_act") is not None:
        gated = config["is_gated_act"]
    if not isinstance(gated, bool):
        raise UserError(f"config.json: is_gated_act is {gated!r}, expected true or false")
    if not isinstance(name, str) or name not in published.ACTIVATIONS:
        field = "feed_forward_proj" if config.get("dense_act_fn") is None else "dense_act_fn"
        raise UserError(f"config.json: {field} is {name!r}{nearest(name, published.ACTIVATIONS)}")
    return published.ACTIVATIONS[name], gated


def _head(config: Mapping[str, Any], model_type: str, has_table: bool) -> tuple[bool, bool]:
    """Whether logits share the embedding table, and whether they are scaled; see the head of this file."""
    tie, scale = config.get("tie_word_embeddings"), config.get("scale_decoder_outputs")
    for name, value in (("tie_word_embeddings", tie), ("scale_decoder_outputs", scale)):
        if value is not None and not isinstance(value, bool):
            raise UserError(f"config.json: {name} is {value!r}, expected true or false")
    major = str(config.get("transformers_version") or "").split(".")[0]
    if scale is not None or (major.isdigit() and int(major) >= 5):
        tied = tie is not False and not has_table
        if model_type == "t5":
            return tied, tie is not False if scale is None else scale
        return tied, model_type == "umt5"
    if tie is None:
        tie = model_type == "t5" or not has_table
    return tie, tie


def _check_size(name: str, value: Any) -> None:
    """Refuses what is no size of a network, before memory or time is asked for it."""
    check_whole(name, value)
    if value >= published.TOO_LARGE:
        raise UserError(f"{name} is {value}, expected less than {published.TOO_LARGE}")


def _check_layers(tensors: Tensors, stack: str, field: str, layers: int) -> None:
    """Refuses a configuration with another number of layers than the checkpoint."""
    name = re.compile(rf"{re.escape(stack)}\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.weight")
    found = sum(1 for tensor in tensors if name.fullmatch(tensor))
    if found != layers:
        raise UserError(f"config.json: {field} is {layers}, but the checkpoint has {found} blocks in {stack}")


def _check_buckets(where: str, buckets: int, distance: int) -> None:
    """Refuses what leaves no bucket between the exact distances and the last one, in either stack."""
    check_whole(f"{where}relative_attention_num_buckets", buckets, least=4)
    if distance <= buckets // 2:
        raise UserError(
            f"{where}relative_attention_max_distance is {distance}, expected more than the {buckets // 2} "
            f"exact distances of {buckets} buckets"
        )


def _check_head_was_saved(config: Mapping[str, Any], has_head: bool) -> None:
    """Refuses what a class of transformers without a head has saved: whether there was a table is lost."""
    architectures = config.get("architectures")
    saved_by = architectures[0] if isinstance(architectures, list) and architectures else None
    if saved_by in ("T5Model", "MT5Model", "UMT5Model") and not has_head:
        raise UserError(
            f"config.json has architectures {saved_by}, which saves no table of the logits; "
            "save the model by AutoModelForSeq2SeqLM"
        )


def _of_t5x(config: Mapping[str, Any]) -> T5Config:
    """Our configuration for the fields that `sources.t5x` derives."""
    whole = {
        "vocab_size": "vocab_size",
        "emb_dim": "emb_dim",
        "num_heads": "num_heads",
        "head_dim": "head_dim",
        "mlp_dim": "mlp_dim",
        "num_encoder_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
        "relative_attention_num_buckets": "relative_buckets",
        "relative_attention_max_distance": "relative_max_distance",
    }
    fields: dict[str, Any] = {}
    for theirs, ours in whole.items():
        _check_size(theirs, config.get(theirs))
        fields[ours] = config[theirs]
    _check_buckets("", fields["relative_buckets"], fields["relative_max_distance"])
    activations = config.get("mlp_activations")
    found = list(activations) if isinstance(activations, list | tuple) else []
    gated = len(found) == 2 and found[1] == "linear"
    if not (gated or len(found) == 1) or found[0] not in ("gelu", "relu", "silu", "linear"):
        raise UserError(
            f"mlp_activations is {activations!r}, expected such as ('gelu', 'linear') or ('relu',)"
        )
    tied = config.get("logits_via_embedding")
    if not isinstance(tied, bool):
        raise UserError(f"logits_via_embedding is {tied!r}, expected true or false")
    bias = config.get("relative_bias")
    return T5Config(
        **fields,
        activation=found[0],
        gated=gated,
        tied_logits=tied,
        relative_bias=bias if isinstance(bias, str) else repr(bias),
    )


FAMILY = T5Family()
