"""A model as StableHLO: waveforms and prompts to answers, weights as arguments (`jax.export`).

Shape suffixes: B rows, S samples, N prompt tokens, P positions of speech, L positions of the LLM's encoder,
T tokens of the answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from slm_jax.decoding.greedy import greedy_decode
from slm_jax.errors import UserError, nearest
from slm_jax.export.weights import to_variables
from slm_jax.models.slm import SLM

PLATFORMS = ("cpu", "cuda", "tpu")
# Stands in a prompt where the speech goes.
SPEECH = -1

Answer = Callable[[Mapping[str, jax.Array], jax.Array, jax.Array, jax.Array], jax.Array]


def answer_function(model: SLM, *, max_tokens: int, eos_id: int) -> Answer:
    """Returns the pure function that is exported.

    Its arguments: weights by name; `speech`, int16 [B, S]; `samples`, int32 [B], of each row; `prompt`, int32
    [B, N], where -1 stands for the speech and 0 fills up. It returns int32 [B, max_tokens], 0 after `eos_id`.

    Args:
      model: the SLM.
      max_tokens: most tokens of an answer, `eos_id` included.
      eos_id: ends an answer.
    """

    def answer(
        weights: Mapping[str, jax.Array], speech_BS: jax.Array, samples_B: jax.Array, prompt_BN: jax.Array
    ) -> jax.Array:
        variables = to_variables(weights, model.config.trainable)
        batch = rows_of(speech_BS, samples_B, prompt_BN, model.samples_per_position)
        return greedy_decode(model, variables, batch, max_tokens=max_tokens, eos_id=eos_id)

    return answer


def rows_of(
    speech_BS: jax.Array, samples_B: jax.Array, prompt_BN: jax.Array, samples_per_position: int
) -> dict[str, jax.Array]:
    """Returns the batch of one utterance and one prompt a row, laid out on the device.

    Args:
      speech_BS: int16, padded; samples_B: int32, how many of them count.
      prompt_BN: int32, `SPEECH` where the speech goes, at most once a row; 0 is padding.
      samples_per_position: samples behind one position of the LLM's encoder.
    """
    length = speech_BS.shape[1]
    positions = (length + samples_per_position - 1) // samples_per_position
    speech_BS = jnp.pad(speech_BS, ((0, 0), (0, positions * samples_per_position - length)))
    present_B = (samples_B > 0).astype(jnp.int32)
    segments_B3 = jnp.stack([present_B, jnp.zeros_like(samples_B), samples_B], axis=-1)

    marked_BN = prompt_BN == SPEECH
    asked_B1 = jnp.any(marked_BN, axis=1, keepdims=True).astype(jnp.int32)
    spoken_B1 = -(-samples_B[:, None] // samples_per_position) * asked_B1
    tokens_B1 = jnp.sum(prompt_BN > 0, axis=1, keepdims=True)
    # Without a marker all tokens stand before the speech, of which there is none.
    before_B1 = jnp.where(asked_B1 > 0, jnp.argmax(marked_BN, axis=1)[:, None], tokens_B1)
    at_L = jnp.arange(positions + prompt_BN.shape[1])[None, :]
    # The sources are the positions of speech, then the prompt with its marker, which is skipped.
    layout_BL = jnp.where(
        at_L < before_B1,
        positions + at_L,
        jnp.where(at_L < before_B1 + spoken_B1, at_L - before_B1, positions + at_L - spoken_B1 + asked_B1),
    )
    used_BL = at_L < tokens_B1 + spoken_B1
    return {
        "speech": speech_BS[:, None],
        "speech_segments": segments_B3[:, None, None],
        "inputs": jnp.maximum(prompt_BN, 0),
        "layout": jnp.where(used_BL, layout_BL, -1).astype(jnp.int32),
        "layout_segment_ids": used_BL.astype(jnp.int32),
    }


def export_answer(
    model: SLM,
    weights: Mapping[str, Any],
    *,
    max_tokens: int,
    eos_id: int,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """Lowers the model once for all platforms, open in rows `b`, frames `s` of samples and prompt tokens `n`.

    Args:
      model: the SLM.
      weights: by name; only shapes and dtypes count.
      max_tokens, eos_id: as of `answer_function`.
      platforms: out of `PLATFORMS`; none of them has to be there.

    Returns:
      What `jax.export.deserialize` reads.

    Raises:
      UserError: an unknown platform.
    """
    check_platforms(platforms)
    frame = samples_per_frame(model)
    most = model.longest_samples
    limit = [] if most is None else [f"s <= {most // frame}"]
    rows, length, tokens = export.symbolic_shape(f"b, {frame}*s, n", constraints=limit)
    function = jax.jit(answer_function(model, max_tokens=max_tokens, eos_id=eos_id))
    exported = export.export(function, platforms=tuple(platforms))(
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()},
        jax.ShapeDtypeStruct((rows, length), jnp.int16),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
    )
    return bytes(exported.serialize())


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises UserError where one of them is not in `PLATFORMS`."""
    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f"--platforms: {platform!r}{nearest(platform, PLATFORMS)}")


def samples_per_frame(model: SLM) -> int:
    """Returns what the length of an exported model's speech is a multiple of."""
    return model.samples_per_position // model.config.reducer.factor
