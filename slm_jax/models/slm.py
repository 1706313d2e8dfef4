"""SLM: a frozen speech encoder and a frozen T5, joined by a trained adapter (arXiv 2310.00230).

Shape suffixes: B rows, K slots of a row, F frames, P positions of reduced speech, N text tokens, L positions
of the LLM's encoder, T decoder tokens, D features.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm_jax.audio.log_mel import frame_segments
from slm_jax.audio.spec_augment import SpecAugmentConfig, spec_augment
from slm_jax.errors import UserError, nearest
from slm_jax.models import conformer, t5
from slm_jax.models.adapters import AdapterConfig, TransformerAdapter
from slm_jax.models.encoders import encoder_class
from slm_jax.models.layers import KERNEL_PLATFORMS
from slm_jax.models.lora import LoRAConfig
from slm_jax.models.reducers import DropReducer, StackReducer
from slm_jax.models.t5 import T5, T5Config

PARTS = ("adapter", "speech_encoder", "llm")


@dataclasses.dataclass(frozen=True)
class SLMConfig:
    """What an SLM is made of.

    Attributes:
      speech_encoder: configuration of any encoder of `models.encoders.ENCODERS`.
      llm, adapter: configurations of these parts.
      reducer: shortens the encoder's frames before the adapter.
      trainable: the parts that train, out of PARTS; their variables are in `params`, all others in `frozen`.
      lora: low-rank products that train beside projections of the frozen LLM, in `params`; None for none.
    """

    speech_encoder: Any
    llm: T5Config
    adapter: AdapterConfig
    reducer: DropReducer | StackReducer
    trainable: tuple[str, ...] = ("adapter",)
    lora: LoRAConfig | None = None

    def __post_init__(self):
        # Lists (from JSON or gin) become tuples, so that configurations stay hashable.
        object.__setattr__(self, "trainable", tuple(self.trainable))
        if not isinstance(self.llm, T5Config):
            raise UserError(
                f"SLMConfig.llm is a {type(self.llm).__name__}, expected T5Config: LLM_CONFIG, or the model "
                "in LLM_CHECKPOINT, is no T5"
            )
        encoder_class(self.speech_encoder)
        for part in self.trainable:
            if part not in PARTS:
                raise UserError(f"SLMConfig.trainable has {part!r}{nearest(part, PARTS)}")
        if self.lora is not None:
            if "llm" in self.trainable:
                raise UserError(
                    "SLMConfig.lora is set and SLMConfig.trainable has 'llm', expected one of both: LoRA is "
                    "for an LLM that is frozen"
                )
            self.lora.check(t5.projections(self.llm))

    @property
    def llm_learns(self) -> bool:
        """Whether anything of the LLM trains, the whole of it or LoRA."""
        return "llm" in self.trainable or self.lora is not None

    def on_platform(self, platform: str | None) -> "tuple[SLMConfig, dict[str, str]]":
        """Returns the same with attention that a platform has, and part -> kernel of what was another.

        A model of it has the same parameters, and answers the same but for rounding.

        Args:
          platform: as JAX names it, such as `gpu`; None for one program for all of them.
        """
        kernels = {
            part: getattr(getattr(self, part), "attention_kernel", "plain")
            for part in ("speech_encoder", "llm")
        }
        others = {
            part: kernel
            for part, kernel in kernels.items()
            if kernel != "plain"
            and (platform is None or platform not in KERNEL_PLATFORMS.get(kernel, (platform,)))
        }
        plain = {part: dataclasses.replace(getattr(self, part), attention_kernel="plain") for part in others}
        return dataclasses.replace(self, **plain), others


def preset(name: str) -> SLMConfig:
    """Returns the configuration `tiny`, for tests and the demo, or `xxl`, the paper's (USM 2B, mT0-XXL).

    Raises:
      UserError: there is no such preset.
    """
    presets = {"tiny": _tiny, "xxl": _xxl}
    if name not in presets:
        raise UserError(f"there is no SLM preset {name!r}{nearest(name, presets)}")
    return presets[name]()


def _tiny() -> SLMConfig:
    adapter = AdapterConfig(layers=2, dim=128, heads=4, head_dim=32, mlp_dim=512)
    return SLMConfig(conformer.preset("tiny"), t5.preset("tiny"), adapter, DropReducer(4))


def _xxl() -> SLMConfig:
    # 156M in two layers: every size but the total and the depth is ours.
    run: dict[str, Any] = {"dtype": "bfloat16", "remat": "full"}
    return SLMConfig(
        speech_encoder=dataclasses.replace(conformer.preset("2b"), **run),
        llm=t5.preset("xxl", **run),
        adapter=AdapterConfig(layers=2, dim=3072, heads=48, head_dim=64, mlp_dim=5120, **run),
        reducer=DropReducer(4),
    )


class SLM(nn.Module):
    """Speech and text in, text out.

    `init` returns the collections `params` (the trainable parts, and LoRA) and `frozen` (the others). The
    batch is described in docs/architecture.md. One with `speech_frames` was encoded before, so the encoder
    does not run, and `init` leaves it out; one without speech is text alone, and no speech part runs.
    """

    config: SLMConfig

    def setup(self):
        config = self.config
        self.speech_encoder = self._place(encoder_class(config.speech_encoder), "speech_encoder")(
            config.speech_encoder
        )
        # The frozen LLM has no dropout; that of LoRA is its own.
        llm = config.llm if config.lora is None else dataclasses.replace(config.llm, dropout=0.0)
        self.llm = self._place(T5, "llm")(llm, config.lora)
        adapter = self._place(TransformerAdapter, "adapter")
        self.adapter = adapter(config.adapter, config.llm.emb_dim)

    def _place(self, module: type[nn.Module], part: str) -> Any:
        """Returns the module with its variables in `params` if the part trains, else in `frozen`."""
        if part in self.config.trainable:
            return module
        # The module's own collection -> where the SLM has it. Of a frozen part LoRA trains.
        places = {"params": "frozen"} | ({"lora": "params"} if part == "llm" and self.config.lora else {})
        return nn.map_variables(
            module,
            ["params", "frozen", "lora"],
            trans_in_fn=lambda variables: _renamed(variables, {to: own for own, to in places.items()}),
            trans_out_fn=lambda variables: _renamed(variables, places),
            # Not `init=True`: that also fires, and fails, when a decoding step makes `cache` mutable.
            mutable=self.is_initializing(),
            methods=_METHODS[part],
        )

    @property
    def samples_per_position(self) -> int:
        """Samples of speech per position of the LLM's encoder."""
        return self._encoder.samples_per_frame * self.config.reducer.factor

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        *,
        deterministic: bool = True,
        augment: SpecAugmentConfig | None = None,
    ) -> dict[str, jax.Array]:
        """Returns `token_losses`, float32 [B, T], and `correct` (target is the likeliest token), bool [B, T].

        Args:
          batch: arrays as in docs/architecture.md.
          deterministic: False applies dropout (rng `dropout`) in the trainable parts.
          augment: SpecAugment (rng `augment`) of the encoder's features, which are mel bins; None for none.

        Raises:
          ValueError: there is `augment`, and the batch has frames, of which nothing can be hidden any more.
        """
        encoded_BLD, segment_ids_BL = self.encode(batch, deterministic=deterministic, augment=augment)
        hidden_BTD = self.llm.decode(
            encoded_BLD,
            segment_ids_BL,
            batch["targets"],
            batch["target_segment_ids"],
            batch["target_positions"],
            deterministic or not self.config.llm_learns,
        )
        losses_BT, correct_BT = self.llm.score_tokens(
            hidden_BTD, batch["targets"], frozen_head="llm" not in self.config.trainable
        )
        return {"token_losses": losses_BT, "correct": correct_BT}

    def encode(
        self,
        batch: Mapping[str, jax.Array],
        *,
        deterministic: bool = True,
        augment: SpecAugmentConfig | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the LLM encoder's states [B, L, D] of the batch, and its segment ids [B, L].

        These are `layout_segment_ids`, but 0 where the layout names speech that the encoder has no frame for.
        Arguments are those of the call.
        """
        sources_BPD = self.llm.embed(batch["inputs"])
        if self.is_initializing() and not {"speech", "speech_frames"} & batch.keys():
            self._adapt(*self.reduced_speech(*self._silence()), deterministic)
        segment_ids_BL = batch["layout_segment_ids"]
        if "speech_segments" in batch:
            frames_BKPD, ids_BKP = self._speech_of(batch, deterministic, augment)
            speech_BPD = self._adapt(frames_BKPD, ids_BKP, deterministic)
            present_BP = ids_BKP.reshape(speech_BPD.shape[:2]) > 0
            present_BP = jnp.concatenate([present_BP, jnp.ones(sources_BPD.shape[:2], bool)], axis=1)
            sources_BPD = jnp.concatenate([speech_BPD.astype(sources_BPD.dtype), sources_BPD], axis=1)
            # The layout counts positions by samples; an encoder without partial windows may lack the last.
            present_BL = jnp.take_along_axis(present_BP, jnp.maximum(batch["layout"], 0), axis=1)
            segment_ids_BL = jnp.where(present_BL, segment_ids_BL, 0)
        embeddings_BLD = lay_out(sources_BPD, batch["layout"])
        deterministic = deterministic or not self.config.llm_learns
        return self.llm.encode(embeddings_BLD, segment_ids_BL, deterministic), segment_ids_BL

    def decode_step(
        self, encoded_BLD: jax.Array, segment_ids_BL: jax.Array, tokens_B1: jax.Array, max_tokens: int = 256
    ) -> jax.Array:
        """Returns the logits float32 [B, 1, V] of the next token; see `T5.decode_step`."""
        return self.llm.decode_step(encoded_BLD, segment_ids_BL, tokens_B1, max_tokens)

    def reduced_speech(
        self,
        speech: jax.Array,
        speech_segments: jax.Array,
        *,
        deterministic: bool = True,
        augment: SpecAugmentConfig | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the encoder's frames after the reducer, [B, K, P, D], and their segment ids, [B, K, P]."""
        trains = "speech_encoder" in self.config.trainable
        features, feature_segment_ids = self.speech_encoder.features(speech, speech_segments)
        if augment is not None:
            features = spec_augment(self.make_rng("augment"), features, feature_segment_ids, augment)
        frames_BKFD, segment_ids_BKF = self.speech_encoder.encode_features(
            features, feature_segment_ids, deterministic=deterministic or not trains
        )
        # Where a slot has a limit, the halves are of the whole window, whatever the speech in it.
        count = speech.shape[-1] // self._encoder.samples_per_frame
        frames_BKFD, segment_ids_BKF = frames_BKFD[:, :, :count], segment_ids_BKF[:, :, :count]
        if not trains:
            frames_BKFD = jax.lax.stop_gradient(frames_BKFD)
        return self.config.reducer(frames_BKFD, segment_ids_BKF)

    @property
    def reduced_dim(self) -> int:
        """Features D of what `reduced_speech` returns."""
        return self.config.reducer.out_dim(self._encoder.dim)

    @property
    def longest_samples(self) -> int | None:
        """Most samples of speech that the encoder takes at once; None where there is no limit."""
        return self._encoder.longest_samples

    @property
    def features_are_mel(self) -> bool:
        """Whether the encoder's features are mel bins over time, which SpecAugment hides."""
        return self._encoder.features_are_mel

    @property
    def packs(self) -> bool:
        """Whether a slot of speech may hold several utterances."""
        return self._encoder.packs

    @property
    def _encoder(self) -> Any:
        """The encoder outside of this module: what it says of itself, without variables."""
        config = self.config.speech_encoder
        return encoder_class(config)(config, parent=None)

    def _speech_of(
        self, batch: Mapping[str, jax.Array], deterministic: bool, augment: SpecAugmentConfig | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the reduced speech of a batch and its segment ids, computed now or before."""
        segments = batch["speech_segments"]
        if "speech_frames" not in batch:
            return self.reduced_speech(
                batch["speech"], segments, deterministic=deterministic, augment=augment
            )
        if augment is not None:
            raise ValueError("the batch has speech_frames, whose features cannot be augmented any more")
        frames_BKPD = batch["speech_frames"]
        ids_BKP = frame_segments(segments, frames_BKPD.shape[2], self.samples_per_position)[0]
        # What the encoder has no frame for was kept as zeros, which no frame is.
        return frames_BKPD, jnp.where(jnp.any(frames_BKPD != 0, axis=-1), ids_BKP, 0)

    def _adapt(self, frames_BKPD: jax.Array, segment_ids_BKP: jax.Array, deterministic: bool) -> jax.Array:
        """Returns the adapted speech of all slots, [B, P, D]."""
        return self.adapter(
            frames_BKPD,
            segment_ids_BKP,
            deterministic=deterministic or "adapter" not in self.config.trainable,
        )

    def _silence(self) -> tuple[jax.Array, jax.Array]:
        """The shortest speech: gives the speech parts their variables where `init` gets text alone."""
        samples = self.samples_per_position
        return jnp.zeros((1, 1, samples), jnp.int16), jnp.array([[[[1, 0, samples]]]], jnp.int32)


# The public methods of the parts, all of which a lifted part must keep.
_METHODS = {
    "speech_encoder": ["__call__", "features", "encode_features"],
    "llm": ["__call__", "embed", "encode", "decode", "decode_step", "logits", "token_losses", "score_tokens"],
    "adapter": ["__call__"],
}


def _renamed(variables: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {new: variables[old] for old, new in names.items() if old in variables}


def lay_out(sources_BPD: jax.Array, layout_BL: jax.Array) -> jax.Array:
    """Returns [B, L, D]: for each position the source that `layout_BL` (int32) names, zeros for -1."""
    taken_BLD = jnp.take_along_axis(sources_BPD, jnp.maximum(layout_BL, 0)[:, :, None], axis=1)
    return jnp.where(layout_BL[:, :, None] >= 0, taken_BLD, 0)
