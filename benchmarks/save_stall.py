"""How long saving a checkpoint holds up the loop: medians over saves, beside the time of a step.

    python benchmarks/save_stall.py --parameters 50_000_000 --processes 2

A state of AdamW (parameters and two moments, float32) goes through steps that rewrite all of it and donate
the one before; every few steps it is saved as a run saves it. A save's stall is the time until
`RunCheckpoints.save` returns, from when the devices were done with the step before. Processes share this
machine. It takes the CPU, two devices of it in all, unless `JAX_PLATFORMS` says otherwise.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.provenance import make_provenance
from slm_jax.multihost.environment import find_processes
from slm_jax.multihost.joining import joined
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.state import DataCursor, TrainState

WIDTH = 1024


def make_state(parameters: int, arrays: int) -> TrainState:
    """A state whose arrays lie along the axis `fsdp`."""
    mesh = make_mesh(data=1, fsdp=-1)
    rows = max(8, parameters // arrays // WIDTH // 8 * 8)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=sharding)
    def draw(number: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(number), (rows, WIDTH))

    params = {f"kernel{i}": draw(i) for i in range(arrays)}
    moments = [{name: draw(i) for i, name in enumerate(params)} for _ in range(2)]
    return TrainState(jax.device_put(jnp.int32(0), everywhere), params, {"mu": moments[0], "nu": moments[1]})


@partial(jax.jit, donate_argnums=0)
def step(state: TrainState) -> TrainState:
    """Rewrites the whole state, with about as many operations as a step of one token a parameter has."""

    def update(kernel: jax.Array, mu: jax.Array, nu: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        gradient = kernel @ (kernel.T @ kernel) * 1e-6
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.99 * nu + 0.01 * gradient**2
        return kernel - 1e-3 * mu / (jnp.sqrt(jnp.abs(nu)) + 1e-8), mu, nu

    done = {
        name: update(kernel, state.opt_state["mu"][name], state.opt_state["nu"][name])
        for name, kernel in state.params.items()
    }
    params, mu, nu = ({name: found[i] for name, found in done.items()} for i in range(3))
    return TrainState(state.step + 1, params, {"mu": mu, "nu": nu})


def measure(args: argparse.Namespace, directory: str) -> None:
    """Takes steps and saves; the first process tells."""
    state: Any = jax.block_until_ready(step(make_state(args.parameters, args.arrays)))
    checkpoints = RunCheckpoints(directory, keep_last=2)
    provenance = make_provenance("", {})
    steps, stalls, lasted = [], [], []
    for number in range(1, args.saves + 2):
        for _ in range(args.steps):
            began = time.perf_counter()
            state = jax.block_until_ready(step(state))
            steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        checkpoints.save(number, state, DataCursor(number, "plan"), provenance)
        stalls.append(time.perf_counter() - began)
        # As in a run that saves seldom: the one before is done.
        state = step(state)
        checkpoints.wait()
        lasted.append(time.perf_counter() - began)
    expected = np.asarray(jax.device_get(state.step))
    checkpoints.close()
    # The first save compiles what computes checksums.
    if jax.process_index() == 0:
        cells = (
            f"{sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6:.0f} MB, {args.arrays} x 3 arrays",
            f"{jax.process_count()}",
            f"{1e3 * median(steps):.1f} ms",
            f"{1e3 * median(stalls[1:]):.1f} ms",
            f"{1e3 * max(stalls[1:]):.1f} ms",
            f"{1e3 * stalls[0]:.0f} ms",
            f"{median(lasted[1:]):.2f} s",
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    assert expected == 1 + (args.saves + 1) * (args.steps + 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--arrays", type=int, default=16, help="that the parameters are split into")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="between saves")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", help="where to save; a temporary folder by default")
    args = parser.parse_args()
    if "JAX_NUM_PROCESSES" in os.environ:
        with joined(find_processes()):
            measure(args, args.folder)
        return
    print("| state | processes | step | stall: median | most | first save | until it is written |")
    print("|---|---|---|---|---|---|---|", flush=True)
    folder = tempfile.mkdtemp(prefix="save_stall_", dir=args.folder)
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    variables = {
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_CPU_DEVICES": str(2 // args.processes),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--folder", f"{folder}/run"],
            env={**os.environ, **variables, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(args.processes)
    ]
    statuses = [process.wait() for process in running]
    shutil.rmtree(folder)
    sys.exit(max(map(abs, statuses)))


if __name__ == "__main__":
    main()
