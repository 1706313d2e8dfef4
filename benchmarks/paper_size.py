"""The paper-sized step on the devices at hand: time, MFU, HFU, memory, and where the time goes.

    python benchmarks/paper_size.py --rows 16 --attention_kernel cudnn   # on an NVIDIA GPU
    python benchmarks/paper_size.py --model tiny --seconds 2 --steps 3   # on a CPU

USM 2B, mT0-XXL and the adapter of 156M, with random weights made in place, in bfloat16 where they are frozen.
Rows are of 30 s of speech, with 64 prompt and 64 target tokens, one example each. It is the train step of
every run, with AdamW. Prints one line of JSON for each remat policy: seconds a step (median), MFU and HFU by
`slm_jax.training.flops`, and the peak of the devices' memory since the program began. `--profile DIR` also
writes a trace of three steps, for XProf.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.models import slm
from slm_jax.models.slm import SLM
from slm_jax.partitioning.device_kinds import DEVICE_KINDS
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding
from slm_jax.training.compiled import compile_step
from slm_jax.training.initialisation import make_state
from slm_jax.training.objectives.slm import SLMObjective
from slm_jax.training.optimizers import AdamWConfig
from slm_jax.training.phases import Phases
from slm_jax.training.program import make_train_program

RATE = 16_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="xxl", help="an SLM preset")
    parser.add_argument("--rows", type=int, default=16, help="of the global batch")
    parser.add_argument("--seconds", type=float, default=30.0, help="of speech in a row")
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt, and of the target")
    parser.add_argument("--remat", nargs="+", default=["frozen"], help="policies of the LLM to measure")
    parser.add_argument("--adapter_remat", default="none")
    parser.add_argument("--attention_kernel", default="plain", help="of the encoder and the LLM")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--mesh", default="data=-1,fsdp=1,tensor=1")
    parser.add_argument("--profile", help="folder for a trace")
    args = parser.parse_args()
    for remat in args.remat:
        print(json.dumps(measured(args, remat)), flush=True)


def measured(args: argparse.Namespace, remat: str) -> dict[str, object]:
    """Returns what a policy costs."""
    mesh = make_mesh(**{axis: int(size) for axis, size in (pair.split("=") for pair in args.mesh.split(","))})
    config = slm.preset(args.model)
    config = dataclasses.replace(
        config,
        speech_encoder=dataclasses.replace(config.speech_encoder, attention_kernel=args.attention_kernel),
        llm=dataclasses.replace(config.llm, remat=remat, attention_kernel=args.attention_kernel),
        adapter=dataclasses.replace(config.adapter, remat=args.adapter_remat),
    )
    objective = SLMObjective(SLM(config))
    batch = batch_of(args, objective.samples_per_position, mesh)
    shapes_of_batch = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
    program = make_train_program(objective, AdamWConfig(), shapes_of_batch, seed=0, mesh=mesh)
    shapes = program.shapes
    state = make_state(random_like(shapes.state.params, jnp.float32), program.optimizer, shapes.state)
    frozen = random_like(shapes.frozen, jnp.bfloat16 if args.model == "xxl" else jnp.float32)
    step = compile_step(program, objective, state, frozen, batch, Phases())
    compiled, seconds = step.compiled, []
    for number in range(args.steps + 3):
        began = time.monotonic()
        state, metrics = compiled(state, frozen, batch)
        loss = float(metrics["loss"])
        if number >= 3:
            seconds.append(time.monotonic() - began)
    with jax.profiler.trace(args.profile) if args.profile else contextlib.nullcontext():
        for _ in range(3 if args.profile else 0):
            state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(state)
    flops = objective.flops(shapes_of_batch)
    median, devices = statistics.median(seconds), jax.device_count()
    kind = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    peak = kind and kind.flops
    hardware, memory, planned = step.hardware_flops, jax.devices()[0].memory_stats() or {}, step.memory
    return {
        "remat": remat,
        "attention_kernel": args.attention_kernel,
        "device": f"{devices} x {jax.devices()[0].device_kind}",
        "rows": args.rows,
        "seconds_a_step": round(median, 4),
        "seconds_min_max": [round(min(seconds), 4), round(max(seconds), 4)],
        "audio_hours_a_second": round(args.rows * args.seconds / 3600 / median, 4),
        "model_tflops": {name: round(value / 1e12, 3) for name, value in flops.items()},
        "hardware_tflops": hardware and round(hardware / 1e12, 3),
        "tflops_a_second_a_device": round(sum(flops.values()) / median / devices / 1e12, 2),
        "mfu": peak and round(sum(flops.values()) / median / devices / peak, 4),
        "hfu": peak and hardware and round(hardware / median / devices / peak, 4),
        "peak_gb": round(memory.get("peak_bytes_in_use", 0) / 1e9, 2),
        "arguments_gb": planned and round(planned.argument_size_in_bytes / 1e9, 2),
        "temporaries_gb": planned and round(planned.temp_size_in_bytes / 1e9, 2),
        "tracing_seconds": round(step.tracing_seconds, 1),
        "compile_seconds": round(step.compiling_seconds, 1),
        "from_cache": step.from_cache,
        "loss": round(loss, 4),
    }


def batch_of(
    args: argparse.Namespace, samples_per_position: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """Returns a batch of full rows, one example each: prompt, then speech."""
    rng = np.random.default_rng(0)
    positions = math.ceil(args.seconds * RATE / samples_per_position)
    samples, rows, tokens = positions * samples_per_position, args.rows, args.tokens
    layout = np.concatenate([positions + np.arange(tokens), np.arange(positions)])
    arrays = {
        "speech": rng.normal(0, 3000, (rows, 1, samples)).astype(np.int16),
        "speech_segments": np.tile(np.array([1, 0, samples], np.int32), (rows, 1, 1, 1)),
        "inputs": rng.integers(2, 1000, (rows, tokens), dtype=np.int32),
        "layout": np.tile(layout.astype(np.int32), (rows, 1)),
        "layout_segment_ids": np.ones((rows, len(layout)), np.int32),
        "targets": rng.integers(2, 1000, (rows, tokens), dtype=np.int32),
        "target_segment_ids": np.ones((rows, tokens), np.int32),
        "target_positions": np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
        "loss_weights": np.ones((rows, tokens), np.float32),
    }
    return jax.device_put(arrays, batch_sharding(mesh))


def random_like(shapes: object, dtype: jnp.dtype) -> object:
    """Returns random arrays of these shapes, each made where it lies: matrices about as a fresh network's."""

    def array(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
        if name.endswith("scale"):
            make = lambda: jnp.ones(shape.shape, dtype)  # noqa: E731
        else:
            make = lambda: 0.02 * jax.random.normal(key, shape.shape, dtype)  # noqa: E731
        return jax.jit(make, out_shardings=shape.sharding)()

    return jax.tree_util.tree_map_with_path(array, shapes)


if __name__ == "__main__":
    sys.exit(main())
