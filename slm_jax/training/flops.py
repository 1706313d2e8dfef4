"""Floating-point operations of a train step: by formula, for MFU, and counted in a traced program.

The formula counts what the model asks for, whatever is computed again to save memory: with it, step time
gives the MFU. The count of the program that runs includes recomputation, and gives the HFU. XLA's own
`cost_analysis` counts the body of a loop once, so the count here is of the jaxpr.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from slm_jax.models.adapters import AdapterConfig
from slm_jax.models.conformer import ConformerConfig
from slm_jax.models.encoders import encoder_class
from slm_jax.models.lora import LoRAConfig
from slm_jax.models.slm import SLMConfig
from slm_jax.models.t5 import T5Config, projections
from slm_jax.models.wav2vec2 import Wav2Vec2Config
from slm_jax.models.whisper import MEL_FRAMES_PER_FRAME, WhisperConfig

# Passes of a matrix product: forward, gradient of its input, gradient of its weights (arXiv 2204.02311, B).
FORWARD, FORWARD_AND_INPUT, TRAINED = 1, 2, 3


def slm_flops(config: SLMConfig, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Returns the operations that a step of an SLM asks for, by part, padding included.

    A product with N weights takes 2N for each position where it is frozen before what trains, 4N where it
    is frozen after it (the gradient passes through), 6N where it trains, as LoRA's do. Attention's scores and
    mixes, which have no weights, take their forward pass twice over again where gradients pass. Norms,
    activations, softmax, mel filters and convolutions of single features are not counted.

    Args:
      config: of the model.
      shapes: of the global batch.

    Returns:
      `speech_encoder`, `adapter`, `llm_encoder`, `llm_decoder` and `head`; parts that do not run have 0.
    """
    speech_trains = "speech_encoder" in config.trainable
    adapter_trains = "adapter" in config.trainable
    rows = shapes["layout"].shape[0]
    slots = positions = encoder = 0
    if "speech" in shapes:
        _, slots, samples = shapes["speech"].shape
        frames = samples // encoder_class(config.speech_encoder)(config.speech_encoder).samples_per_frame
        positions = math.ceil(frames / config.reducer.factor)
        encoder = encoder_flops(
            config.speech_encoder, rows * slots, samples, TRAINED if speech_trains else FORWARD
        )
    elif "speech_frames" in shapes:
        slots, positions = shapes["speech_frames"].shape[1:3]
    passes = TRAINED if adapter_trains else FORWARD_AND_INPUT if speech_trains else FORWARD
    dims = config.reducer.out_dim(config.speech_encoder.dim), config.llm.emb_dim
    adapter = rows * slots * _adapter_flops(config.adapter, *dims, positions, passes, speech_trains)
    reached = positions and (adapter_trains or speech_trains)
    passes = TRAINED if "llm" in config.trainable else FORWARD_AND_INPUT if reached else FORWARD
    llm = t5_flops(config.llm, shapes, passes, config.lora)
    return {"speech_encoder": encoder, "adapter": adapter, **llm}


def t5_flops(
    config: T5Config,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    passes: int = TRAINED,
    lora: LoRAConfig | None = None,
) -> dict[str, int]:
    """Returns the operations of a T5 by part: `llm_encoder`, `llm_decoder` and `head`.

    Args:
      config: of the T5.
      shapes: of the global batch, of which `layout` and `targets` are looked at.
      passes: of a product with weights, but for what LoRA adds.
      lora: what trains beside frozen weights.
    """
    rows, length = shapes["layout"].shape
    tokens = shapes["targets"].shape[1]
    sizes = projections(config)
    products = {path for path in sizes if lora is not None and lora.selects(path)}

    def weights(stack: str, passes: int) -> int:
        """Products with weights of a layer, of one row."""
        total = 0
        for path, (inputs, outputs) in sizes.items():
            if path.startswith(f"{stack}/"):
                # Keys and values of cross-attention are of the encoder's positions.
                of_encoder = stack == "encoder" or path.endswith(
                    ("encoder_decoder_attention/key", "encoder_decoder_attention/value")
                )
                one = inputs * outputs * passes
                if lora is not None and path in products:
                    one += lora.rank * (inputs + outputs) * TRAINED
                total += 2 * (length if of_encoder else tokens) * one
        return total

    attention = config.num_heads * config.head_dim
    # Behind a product that trains the gradient passes through what is frozen.
    if any(path.startswith("encoder/") for path in products):
        passes = max(passes, FORWARD_AND_INPUT)
    encoder_layer = weights("encoder", passes) + 4 * length * length * attention * _without_weights(passes)
    if products:
        passes = max(passes, FORWARD_AND_INPUT)
    decoder_layer = weights("decoder", passes)
    decoder_layer += 4 * tokens * (tokens + length) * attention * _without_weights(passes)
    return {
        "llm_encoder": rows * config.encoder_layers * encoder_layer,
        "llm_decoder": rows * config.decoder_layers * decoder_layer,
        "head": 2 * rows * tokens * config.emb_dim * config.vocab_size * passes,
    }


def encoder_flops(config: Any, slots: int, samples: int, passes: int) -> int:
    """Returns the operations of a speech encoder.

    Args:
      config: one of `models.encoders.ENCODERS`.
      slots: of all rows.
      samples: of a slot.
      passes: of a product with weights; the features themselves need no gradient.
    """
    return _ENCODER_FLOPS[type(config)](config, slots, samples, passes)


def _without_weights(passes: int) -> int:
    """Both operands of a product without weights need their gradient where any gradient passes."""
    return FORWARD if passes == FORWARD else TRAINED


def _conformer_flops(config: ConformerConfig, slots: int, samples: int, passes: int) -> int:
    dim, frames = config.dim, samples // config.samples_per_frame
    inner = config.ffn_dim or config.ffn_multiplier * dim
    weights = 4 * dim * inner + 4 * dim * dim + 3 * dim * dim
    layer = 2 * frames * weights * passes + 4 * frames * frames * dim * _without_weights(passes)
    distances, for_all_slots = 2 * frames - 1, 0
    if config.positions in ("transformer_xl", "usm"):
        # Sinusoids are projected once for all slots, and need no gradient.
        for_all_slots = 2 * distances * dim * dim * min(passes, 2)
    if config.positions != "none":
        layer += 2 * frames * distances * dim * _without_weights(passes)
    return config.layers * (slots * layer + for_all_slots) + slots * passes * _subsampling_flops(
        config, samples
    )


def _subsampling_flops(config: ConformerConfig, samples: int) -> int:
    """Of one slot, forward."""
    frames = samples // config.samples_per_frame
    if config.subsampling == "projection":
        features = config.kaldi_fbank.mel_bins * config.kaldi_fbank.stack
        return 2 * frames * features * config.dim
    length, bins, inputs, total = samples // config.log_mel.hop_samples, config.log_mel.mel_bins, 1, 0
    for channels in config.subsampling_channels:
        length, bins = math.ceil(length / 2), math.ceil(bins / 2)
        total += 2 * length * bins * 9 * inputs * channels
        inputs = channels
    return total + 2 * frames * bins * inputs * config.dim


def _whisper_flops(config: WhisperConfig, slots: int, samples: int, passes: int) -> int:
    del samples  # Of the whole window, whatever the speech in it.
    frames, dim = config.positions, config.dim
    # The mel needs no gradient.
    convolutions = 2 * frames * MEL_FRAMES_PER_FRAME * 3 * config.mel_bins * dim * min(passes, 2)
    convolutions += 2 * frames * 3 * dim * dim * passes
    return slots * (convolutions + config.layers * _pre_norm_layer(dim, config.mlp_dim, frames, passes))


def _wav2vec2_flops(config: Wav2Vec2Config, slots: int, samples: int, passes: int) -> int:
    frames, dim = samples // config.stride, config.dim
    length, inputs, total = samples + config.receptive_field - config.stride, 1, 0
    for outputs, taps, stride in zip(config.conv_dims, config.conv_kernels, config.conv_strides, strict=True):
        length = (length - taps) // stride + 1
        # The waveform needs no gradient.
        total += 2 * length * taps * inputs * outputs * (min(passes, 2) if inputs == 1 else passes)
        inputs = outputs
    position = config.position_kernel * dim // config.position_groups * dim
    total += 2 * frames * (inputs * dim + position) * passes
    return slots * (total + config.layers * _pre_norm_layer(dim, config.mlp_dim, frames, passes))


def _pre_norm_layer(dim: int, mlp_dim: int, frames: int, passes: int) -> int:
    """Of one slot."""
    weights = 4 * dim * dim + 2 * dim * mlp_dim
    return 2 * frames * weights * passes + 4 * frames * frames * dim * _without_weights(passes)


_ENCODER_FLOPS = {
    ConformerConfig: _conformer_flops,
    WhisperConfig: _whisper_flops,
    Wav2Vec2Config: _wav2vec2_flops,
}


def _adapter_flops(
    config: AdapterConfig, in_dim: int, out_dim: int, positions: int, passes: int, frames_learn: bool
) -> int:
    """Of one slot."""
    attention = config.heads * config.head_dim
    weights = 4 * config.dim * attention + (3 if config.gated else 2) * config.dim * config.mlp_dim
    layer = 2 * positions * weights * passes + 4 * positions * positions * attention * _without_weights(
        passes
    )
    # Nothing needs the gradient of a frozen encoder's frames.
    of_frames = passes if frames_learn else min(passes, 2)
    ends = 2 * positions * config.dim * (in_dim * of_frames + out_dim * passes)
    return config.layers * layer + ends


# Products of queries by keys in cuDNN's attention: its backward pass computes the scores again.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def traced_flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Returns the operations of all matrix products and convolutions of a traced program, over all devices.

    Args:
      jaxpr: as `jax.make_jaxpr` returns it. A loop's body counts as often as it runs, and of the branches of
        a condition the largest.

    Raises:
      ValueError: a loop with products in it runs an unknown number of times.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation_flops(equation) for equation in inner.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # The gradient of a strided convolution's input is over an operand spread out with zeros.
        spread = math.prod(params["lhs_dilation"])
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs // spread
    if name in _CUDNN_PRODUCTS:
        (rows, queries, heads, dim), keys = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return 2 * _CUDNN_PRODUCTS[name] * rows * heads * queries * keys * dim
    if name == "cond":
        return max(traced_flops(branch) for branch in params["branches"])
    inner = sum(traced_flops(jaxpr) for jaxpr in _jaxprs(params))
    if name == "while" and inner:
        raise ValueError("a while loop with matrix products in it runs an unknown number of times")
    if name == "shard_map":
        # Its body is one shard's. What an axis that splits nothing repeats counts once, as everywhere.
        axes = {axis for spec in params["in_specs"] for entry in spec for axis in _axes(entry)}
        return inner * math.prod(params["mesh"].shape[axis] for axis in axes)
    return inner * params["length"] if name == "scan" else inner


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _jaxprs(params: Mapping[str, Any]) -> list[ClosedJaxpr | Jaxpr]:
    # A custom rule's forward and backward functions are traced where they are used.
    return [value for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
