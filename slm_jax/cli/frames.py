"""The frames of a run's frozen speech encoder: made ahead of training, and read in place of speech."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from slm_jax.checkpoints.foundation import architecture, read_foundation
from slm_jax.errors import UserError
from slm_jax.models.slm import SLM
from slm_jax.partitioning.sharding import batch_sharding, partitioned, replicated

if TYPE_CHECKING:
    from slm_jax.cli.wiring import Wiring
    from slm_jax.data.encoding import Encode
    from slm_jax.data.frames import Frames
    from slm_jax.data.shards import SplitEntry


class SpeechFrames:
    """Frames of the utterances that a run trains on; made by `Wiring`.

    Args:
      wired: the run.

    Raises:
      UserError: the speech encoder gives other frames in every step or epoch.
    """

    def __init__(self, wired: Wiring):
        run = wired.run
        self._wired, self._run, self._model = wired, run, run.objective.model
        trainable = self._model.config.trainable if isinstance(self._model, SLM) else None
        if trainable is None or "speech_encoder" in trainable:
            found = f"trainable={trainable!r}" if trainable else f"a run of {type(self._model).__name__}"
            raise UserError(
                f"{_FRAMES} are of an SLM whose speech encoder is frozen, and this is {found}; expected "
                "DataConfig.encode_once = False and frames = None"
            )
        for field, value in (
            ("SLMObjective.augment", getattr(run.objective, "augment", None)),
            ("DataConfig.augment", run.data.augment),
        ):
            if value is not None:
                raise UserError(
                    f"{_FRAMES} are the same in every epoch, and {field} changes what the encoder hears; "
                    "expected one of both"
                )

    @property
    def dim(self) -> int:
        """Features of a position."""
        return self._model.reduced_dim

    @property
    def fingerprint(self) -> str:
        """Of the frames that the run names."""
        from slm_jax.data.frames import entry_of

        return entry_of(self._named, self._run.data.split).fingerprint

    def encode(
        self,
        directory: str,
        tables: Any = None,
        *,
        dtype: str = "bfloat16",
        replace: bool = False,
        **options: Any,
    ) -> SplitEntry:
        """Writes the frames of every utterance of the training split, or what is left of them.

        Args:
          directory: where; a path of the configuration, or remote.
          tables: of the utterances; by default the plan's.
          dtype: one of `frames.DTYPES`.
          replace: whether frames that something else made are written over.
          options: of `encoding.Job`.

        Raises:
          UserError: as `encoding.encode`.
        """
        from slm_jax.cli.wiring import say
        from slm_jax.data.encoding import Job, encode

        wired, data = self._wired, self._run.data
        tables = wired.plan().tables if tables is None else tables
        shape = wired.shape(data.batch_size, packed=True)
        packs = data.pack and self._run.objective.packs
        segments = shape.segments if packs else 1
        job = Job(
            tables=tables,
            roots=_audio_roots(tables),
            shape=dataclasses.replace(
                shape, slots=1, segments=segments, inputs=1, layout=shape.positions, targets=1
            ),
            sharding=batch_sharding(wired.mesh, self._run.mesh.rules),
            packs=packs,
            encoder=functools.partial(self._encoder, dtype),
            made_by=self._made_by(),
            dtype=dtype,
            max_bad_share=data.max_bad_share,
            options={"threads": data.reader_threads},
            report=say if jax.process_index() == 0 else lambda line: None,
            **options,
        )
        return encode(job, self._place(directory), data.split, replace)

    def read(self, tables: Any) -> Frames:
        """Returns what reads the frames that the run names.

        Raises:
          UserError: something else made them, or an utterance of the tables is not among them.
        """
        return self._read(self._named, tables)

    def encode_once(self, tables: Any) -> Frames:
        """Makes the frames of these tables in the run's directory, unless they are there, and reads them."""
        directory = str(self._run.path(self._run.model_dir) / "frames")
        self.encode(directory, tables, replace=True)
        return self._read(directory, tables)

    def _read(self, directory: str, tables: Any) -> Frames:
        from slm_jax.data.frames import Frames

        return Frames(directory, self._run.data.split, self._made_by(), tables, _audio_roots(tables))

    @property
    def _named(self) -> str:
        return self._place(str(self._run.data.frames))

    def _place(self, name: str) -> str:
        from slm_jax.storage import is_remote

        return name.rstrip("/") if is_remote(name) else str(self._run.path(name))

    def _made_by(self) -> dict[str, Any]:
        """Returns all that decides the frames of an utterance, as JSON."""
        run, config = self._run, self._model.config
        part = run.objective.parts["speech_encoder"]
        checkpoint = run.foundations.get("speech_encoder")
        int8 = getattr(run.objective, "frozen_weights", None) == "int8"
        return {
            "checkpoint": read_foundation(run.path(checkpoint)).fingerprint
            if checkpoint
            else f"seed {run.loop.seed}",
            "encoder": {"kind": part.kind, **architecture(part.config)},
            "compute_dtype": part.config.dtype,
            "weights": "int8" if int8 else run.frozen_dtype,
            "reducer": {"name": type(config.reducer).__name__, **dataclasses.asdict(config.reducer)},
        }

    def _encoder(self, dtype: str) -> Encode:
        """Returns what turns a batch's speech and segments into reduced frames, whole on every device.

        They are bfloat16 or, for int8 whose scales the host finds, float32: [B, K, P, D].
        """
        mesh, rules = self._wired.mesh, self._run.mesh.rules
        variables = self._wired.variables_of("speech_encoder")

        def encode(variables: Any, speech: jax.Array, speech_segments: jax.Array) -> jax.Array:
            frames_BKPD, _ = self._model.apply(variables, speech, speech_segments, method=SLM.reduced_speech)
            return frames_BKPD.astype(jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)

        rows = batch_sharding(mesh, rules)
        where = jax.tree.map(lambda leaf: leaf.sharding, variables)
        compiled = jax.jit(encode, in_shardings=(where, rows, rows), out_shardings=replicated(mesh))

        def on_mesh(speech: jax.Array, speech_segments: jax.Array) -> jax.Array:
            with partitioned(mesh, rules):
                return compiled(variables, speech, speech_segments)

        return on_mesh


_FRAMES = (
    "frames that are computed before training (DataConfig.frames, DataConfig.encode_once, slm data encode)"
)


def _audio_roots(tables: Any) -> dict[str, str]:
    """Returns the folder that the audio paths of each table are relative to, by task."""
    return {table.task: table.audio_root for table in tables}
