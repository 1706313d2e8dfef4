"""Encodes a corpus with a fake encoder, as one of several processes; run as a program."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from slm_jax.data.batch import BatchShape
from slm_jax.data.encoding import Job, encode
from slm_jax.data.plan import plan_mixture
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding, replicated
from slm_jax.tasks.asr import register_asr

STEP = 640
LENGTHS = {"speech": 10_240, "inputs": 120, "targets": 120}


def fake_encoder(speech: jax.Array, speech_segments: jax.Array) -> jax.Array:
    """Sums over each position's samples, which are exact whatever the order."""
    sums = jnp.sum(speech.reshape(*speech.shape[:2], -1, STEP).astype(jnp.int32), -1)
    return jnp.stack([sums, -sums], -1).astype(jnp.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("manifest", "to", "mesh"):
        parser.add_argument(name)
    for name in ("rows", "port", "processes", "process"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)
    register_asr("t", manifests={"train": args.manifest}, vocabulary=ByteVocabulary())
    data, fsdp, tensor = map(int, args.mesh.split(","))
    mesh = make_mesh(data, fsdp, tensor)
    shape = BatchShape.from_feature_lengths(LENGTHS, rows=args.rows, samples_per_position=STEP, segments=4)
    cache = f"{args.to}-cache-{args.process}"
    tables = plan_mixture("t", "train", LENGTHS, shape, cache_dir=cache, seed=0).tables
    rows = batch_sharding(mesh)
    job = Job(
        tables=tables,
        roots={"t": ""},
        shape=dataclasses.replace(shape, inputs=1, targets=1, layout=shape.positions),
        sharding=rows,
        packs=True,
        encoder=lambda: jax.jit(fake_encoder, in_shardings=(rows, rows), out_shardings=replicated(mesh)),
        made_by={"checkpoint": "fake"},
        per_shard=6,
        max_bad_share=0.5,
        report=lambda line: print(line, flush=True),
    )
    encode(job, args.to, "train")


if __name__ == "__main__":
    main()
