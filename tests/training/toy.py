"""A small objective and a source of ragged batches for the tests of this room; also runs as a program."""

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint
from jax.sharding import Mesh

from slm_jax.errors import UserError
from slm_jax.multihost.environment import find_processes
from slm_jax.multihost.joining import joined
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding
from slm_jax.training.batches import PlacedBatch
from slm_jax.training.loop import LoopConfig, TrainResult, train
from slm_jax.training.optimizers import AdamWConfig, OptimizerConfig, ScheduleConfig
from slm_jax.training.rollback import Rollback

VOCAB, EMBED, MLP, TOKENS = 16, 16, 32, 6


class ToyModel(nn.Module):
    """Predicts the next token through a frozen table and a trained MLP."""

    dropout: float = 0.1

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        def kernel(name: str, axes: tuple[str, str], shape: tuple[int, int]) -> Any:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.3), axes)
            return self.param(name, init, shape)

        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        table = self.variable("frozen", "table", lambda: init(self.make_rng("params"), (VOCAB, EMBED)))
        embeddings: Any = table.value
        x = embeddings[batch["tokens"]]
        hidden = nn.silu(x @ kernel("wi", ("embed", "mlp"), (EMBED, MLP)))
        hidden = with_logical_constraint(hidden, ("activation_batch", "activation_length", "activation_mlp"))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not self.has_rng("dropout"))
        return hidden @ kernel("wo", ("mlp", "vocab"), (MLP, VOCAB))


class ToyObjective:
    """Cross-entropy of ToyModel; a batch may poison its gradient or its loss."""

    samples_per_position = 1
    takes_packed_rows = packs = True

    def __init__(self, dropout: float = 0.1):
        self.model = ToyModel(dropout)
        self.parts = {}

    def init(self, rng, batch):
        return dict(self.model.init(rng, batch))

    def loss(self, params, frozen, batch, rng):
        logits: Any = self.model.apply({"params": params, "frozen": frozen}, batch, rngs={"dropout": rng})
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        loss_sum = jnp.sum(losses * batch["weights"])
        poison = jnp.sum(batch["poison"])
        # 0 leaves all alone, 1 makes the gradient nan too, 2 makes nothing but the loss infinite.
        factor = jnp.where(poison == 1, jnp.nan, 1.0)
        loss_sum = loss_sum * factor + jnp.where(poison == 2, jnp.inf, 0.0)
        correct = jnp.sum((jnp.argmax(logits, -1) == batch["targets"]) * batch["weights"])
        return loss_sum, jnp.sum(batch["weights"]), {"accuracy": (correct, jnp.sum(batch["weights"]))}

    def flops(self, shapes):
        # Nothing needs the gradient of the frozen embeddings.
        return {"wi": 4 * shapes["tokens"].size * EMBED * MLP, "wo": 6 * shapes["tokens"].size * MLP * VOCAB}


class ToySource:
    """Row r is the same on every mesh; `poisoned` maps a step to what its first row poisons.

    `missing` is a first row and how many are left out of the data; steps of `spiked` have targets that
    nothing predicts that has learnt from the others.
    """

    def __init__(
        self,
        mesh: Mesh,
        rows_per_step: int = 16,
        seed: int = 0,
        poisoned: dict[int, int] | None = None,
        delay: float = 0.0,
        hangs_at: int = -1,
        missing: tuple[int, int] = (0, 0),
        spiked: tuple[int, ...] = (),
    ):
        self.rows_per_step = rows_per_step
        self.fingerprint = hashlib.sha256(f"{rows_per_step} {seed}".encode()).hexdigest()[:16]
        self._sharding, self._seed, self._delay = batch_sharding(mesh), seed, delay
        self._hangs_at = hangs_at
        self._missing, self._spiked = missing, spiked
        self._poisoned = poisoned or {}
        row = self.row(0)
        self.shapes = {
            name: jax.ShapeDtypeStruct((rows_per_step, *value.shape), value.dtype)
            for name, value in row.items()
        }

    def row(self, number: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self._seed, number])
        tokens = rng.integers(0, VOCAB, TOKENS).astype(np.int32)
        length = rng.integers(1, TOKENS + 1)
        weights = (np.arange(TOKENS) < length).astype(np.float32)
        step, place = divmod(number, self.rows_per_step)
        poison = np.asarray(self._poisoned.get(step + 1, 0) if place == 0 else 0, np.float32)
        return {"tokens": tokens, "targets": (tokens * 3 + 1) % VOCAB, "weights": weights, "poison": poison}

    def anchor(self, rows_consumed: int) -> None:
        return None

    def batches(self, rows_consumed: int, anchor: object = None) -> Iterator[PlacedBatch]:
        while True:
            time.sleep(600 if rows_consumed == self._hangs_at * self.rows_per_step else self._delay)
            first, count = self._missing
            numbers = range(rows_consumed, rows_consumed + self.rows_per_step)
            numbers = [number + count if number >= first else number for number in numbers]
            rows = [self.row(number) for number in numbers]
            if rows_consumed // self.rows_per_step + 1 in self._spiked:
                rows = [{**row, "targets": (row["tokens"] * 5 + 8) % VOCAB} for row in rows]
            whole = {name: np.stack([row[name] for row in rows]) for name in self.shapes}
            arrays: dict[str, jax.Array] = {
                name: jax.make_array_from_callback(rows.shape, self._sharding, rows.__getitem__)
                for name, rows in whole.items()
            }
            ids = {place: (f"row-{number}",) for place, number in enumerate(numbers)}
            tokens = float(sum(row["weights"].sum() for row in rows))
            yield PlacedBatch(arrays, ids, {"audio_seconds": 10.0, "target_tokens": tokens})
            rows_consumed += self.rows_per_step


def toy_train(
    model_dir,
    steps: int,
    *,
    mesh: Mesh | None = None,
    optimizer: OptimizerConfig | None = None,
    seed: int = 0,
    delay: float = 0.0,
    hangs_at: int = -1,
    poisoned: dict[int, int] | None = None,
    evaluate=None,
    writer=None,
    load_variables=None,
    load_slots=None,
    dropout: float = 0.1,
    rollback: Rollback | None = None,
    missing: tuple[int, int] = (0, 0),
    spiked: tuple[int, ...] = (),
    profile_steps=None,
    dump_program=None,
    phases=None,
    **options,
) -> TrainResult:
    """Trains the toy with few words."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    config = LoopConfig(
        train_steps=steps, seed=seed, **{"log_period": 4, "checkpoint_period": 5, "log_ids": True, **options}
    )
    optimizer = optimizer or AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=4))
    return train(
        ToyObjective(dropout),
        ToySource(
            mesh,
            seed=seed,
            delay=delay,
            hangs_at=hangs_at,
            poisoned=poisoned,
            missing=missing,
            spiked=spiked,
        ),
        model_dir=model_dir,
        config=config,
        optimizer=optimizer,
        mesh=mesh,
        evaluate=evaluate,
        writer=writer,
        load_variables=load_variables,
        load_slots=load_slots,
        rollback=rollback,
        profile_steps=profile_steps,
        dump_program=dump_program,
        phases=phases,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("steps", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("delay", type=float)
    parser.add_argument("hangs_at", type=int, help="steps after which no batch comes; -1 for never")
    parser.add_argument("--hangs_in", type=int, default=0, help="process in which it does not")
    parser.add_argument("--hang_seconds", type=float, default=1800.0, help="what the loop has of that name")
    args = parser.parse_args()
    processes = find_processes()
    with joined(processes) as company:
        try:
            toy_train(
                args.model_dir,
                args.steps,
                mesh=make_mesh() if company else None,
                seed=args.seed,
                delay=args.delay,
                hangs_at=args.hangs_at if processes.index == args.hangs_in else -1,
                log_period=1,
                hang_seconds=args.hang_seconds,
            )
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
