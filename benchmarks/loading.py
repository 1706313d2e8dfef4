"""Bytes, time and memory of several processes that load one foundation model.

    python benchmarks/loading.py --work runs/loading --model small --mesh 2 4 1

Writes a T5 of random weights as `slm convert` does, once for each format, and loads it onto the mesh in
several processes at once on this machine's CPUs. Prints a row for each format and process: the bytes that the
load read from files (of Orbax's alone: safetensors are mapped, and cause no system calls), its seconds, and
the peak memory of the process before and after. The devices' memory is the process's.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from slm_jax.checkpoints.fingerprints import fingerprint
from slm_jax.checkpoints.foundation import load_foundation, save_foundation, save_foundation_streamed
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.checkpoints.streaming import StreamedArray
from slm_jax.models import t5
from slm_jax.models.networks import boxed_params
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import named_shardings

FORMATS = ("orbax", "safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; needs room for two")
    parser.add_argument("--model", default="small", help="a T5 preset")
    parser.add_argument("--mesh", type=int, nargs=3, default=[2, 4, 1], help="data, fsdp and tensor")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="of each process")
    parser.add_argument("--generate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=3, metavar=("FORMAT", "PORT", "PROCESS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        generate(args)
    elif args.load:
        load(args, args.load[0], int(args.load[1]), int(args.load[2]))
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Runs the steps in processes of their own: Linux counts to a child's peak what its parent held."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
    same = [sys.executable, __file__, "--work", str(args.work), "--model", args.model]
    same += ["--mesh", *map(str, args.mesh)]
    same += ["--processes", str(args.processes), "--devices", str(args.devices)]
    subprocess.run([*same, "--generate"], env=environment, check=True)
    print("| format | process | on disk | bytes read | seconds | memory before | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for form in FORMATS:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        running = [
            subprocess.Popen(
                [*same, "--load", form, port, str(process)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for process in range(args.processes)
        ]
        told = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            sys.exit(f"a process that loads {form} failed")
        # Gloo writes lines of its own.
        print(*[line for text in told for line in text.splitlines() if line[:1] == "|"], sep="\n", flush=True)
    for form in FORMATS:
        shutil.rmtree(args.work / form)


def generate(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    params = {
        name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in flatten(abstract(args)).items()
    }
    arrays = {
        name: StreamedArray(
            value.shape, value.dtype, "layers" in name, lambda v=value: iter([((0,) * v.ndim, v)])
        )
        for name, value in params.items()
    }
    text = fingerprint(params)
    save_foundation_streamed(args.work / "orbax", arrays, kind="t5", config={}, fingerprint=lambda: text)
    save_foundation(args.work / "safetensors", unflatten(params), kind="t5", config={}, format="safetensors")


def load(args: argparse.Namespace, form: str, port: int, process: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", args.processes, process)
    shapes, folder = abstract(args), args.work / form
    before, memory, started = bytes_read(), peak_memory(), time.monotonic()
    jax.block_until_ready(load_foundation(folder, "t5", shapes))
    seconds, peak, read = time.monotonic() - started, peak_memory(), bytes_read() - before
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"| {form} | {process} | {size / 1e9:.2f} GB | {f'{read / 1e9:.2f} GB' if form == 'orbax' else '-'} "
        f"| {seconds:.1f} | {memory / 1e9:.2f} GB | {peak / 1e9:.2f} GB |",
        flush=True,
    )


def abstract(args: argparse.Namespace) -> dict:
    """The parameters' shapes, with shardings where all processes have joined."""
    boxed = boxed_params(t5.preset(args.model))
    if args.generate:
        return nn.unbox(boxed)
    data, fsdp, tensor = args.mesh
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        named_shardings(boxed, make_mesh(data, fsdp, tensor)),
    )


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def peak_memory() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    main()
