"""A tiny run on a packed mixture of real audio, as one of several processes; run as a program."""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from slm_jax.data.audio_files import load_utterance
from slm_jax.data.batch import BatchShape
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.plan import Packing, plan_mixture
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.registration import register_mixture
from slm_jax.training import rollback
from slm_jax.training.loop import LoopConfig, train
from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig

LENGTHS = {"speech": 16_000, "inputs": 120, "targets": 60}
ROWS = 8


def write_corpus(folder: Path, rng: np.random.Generator, count: int = 40) -> None:
    """Writes two manifests with ragged audio."""
    for name in ("a", "b"):
        lines = []
        for i in range(count):
            samples = int(rng.integers(800, 9_000))
            wave = rng.integers(-20_000, 20_000, samples).astype(np.int16)
            soundfile.write(folder / f"{name}{i}.wav", wave, 16_000)
            text = "".join(rng.choice(list("abcdefg "), int(rng.integers(1, 15)))).strip() or "a"
            line = {"id": f"{name}{i}", "audio": f"{name}{i}.wav", "duration": samples / 16_000, "text": text}
            lines.append(json.dumps({**line, "language": "en"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


class LetterCounts:
    """Predicts letters from a table; that there is a gradient is all that is asked of it."""

    samples_per_position = 640
    takes_packed_rows = packs = True
    model = None

    def __init__(self):
        self.parts = {}

    def init(self, rng: jax.Array, batch: Any) -> dict:
        return {"params": {"table": jnp.zeros((300,))}}

    def loss(self, params, frozen, batch, rng):
        scores = jax.nn.log_softmax(params["table"])[batch["targets"]]
        weights = batch["loss_weights"]
        heard = jnp.sum(jnp.abs(batch["speech"].astype(jnp.float32))) * 1e-9
        return -jnp.sum(scores * weights) + heard, jnp.sum(weights), {}

    def flops(self, shapes):
        return {}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("corpus", "model_dir", "mesh"):
        parser.add_argument(name)
    for name in ("steps", "seed", "port", "processes", "process"):
        parser.add_argument(name, type=int)
    parser.add_argument("delay", type=float)
    parser.add_argument("--rollback", type=int, nargs=2, help="step to go back to, steps to leave out")
    parser.add_argument("--die_moving", action="store_true", help="whoever moves a checkpoint dies before it")
    args = parser.parse_args()
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)
    for name in ("a", "b"):
        register_asr(name, manifests={"train": f"{args.corpus}/{name}.jsonl"}, vocabulary=ByteVocabulary())
    register_mixture("mix", {"a": 2.0, "b": 1.0})
    data, fsdp, tensor = map(int, args.mesh.split(","))
    mesh = make_mesh(data, fsdp, tensor)
    shape = BatchShape.from_feature_lengths(LENGTHS, rows=ROWS, samples_per_position=640, segments=6)
    plan = plan_mixture(
        "mix",
        "train",
        LENGTHS,
        shape,
        cache_dir=f"{args.model_dir}-cache",
        seed=args.seed,
        packing=Packing(True, block=32),
    )

    def load(reference):
        time.sleep(args.delay)
        return load_utterance(reference)

    if args.die_moving:
        rollback._move_checkpoint = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    # Training and data describe a placed batch each for itself.
    source: Any = TrainBatches(plan, shape, batch_sharding(mesh), load=load)
    train(
        LetterCounts(),
        source,
        model_dir=args.model_dir,
        config=LoopConfig(train_steps=args.steps, log_period=1, checkpoint_period=1, log_ids=True),
        optimizer=AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=4)),
        mesh=mesh,
        rollback=rollback.Rollback(*args.rollback) if args.rollback else None,
    )


if __name__ == "__main__":
    main()
