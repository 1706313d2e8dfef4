"""Memory, time and bytes of `slm convert` on checkpoints of the published shapes with random weights.

    python benchmarks/conversion.py --work runs/conversion --models t5:large whisper:large_v3

Writes each checkpoint as transformers would (float32, shards of a gigabyte), converts it and restores it
onto 8 virtual devices, each in a process of its own. Prints a row for each, and removes what it wrote.

The process that starts the others stays small: Linux counts to the peak memory of a process what its parent
held when it was started.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SHARD_BYTES = 1 << 30
SOURCE, TARGET = "hf", "converted"
SLM = "import sys; from slm_jax.cli.main import main; sys.exit(main())"
FAMILIES = {
    "t5": "t5", "whisper": "whisper", "wav2vec2": "wav2vec2", "gemma3n": "gemma3n", "w2v_bert": "w2v_bert",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the checkpoints; needs room for both"
    )
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="NETWORK:PRESET",
        help="such as t5:large, whisper:large_v3, wav2vec2:hubert_large, conformer:w2v_bert",
    )  # fmt: skip
    parser.add_argument("--dtype", help="passed to slm convert; by default the checkpoint's, float32")
    parser.add_argument(
        "--mesh", type=int, nargs=3, default=[1, 8, 1], help="data, fsdp and tensor of the restore"
    )
    parser.add_argument("--step", choices=("generate", "restore"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "generate":
        print(generate(args.work / SOURCE, args.models[0]))
        return
    if args.step == "restore":
        print(restore(args.work / TARGET, args.mesh))
        return
    print(
        "| checkpoint | parameters | read | written | largest array | seconds | peak memory | restore reads |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for model in args.models:
        row(args, model)


def row(args: argparse.Namespace, model: str) -> None:
    source, target = args.work / SOURCE, args.work / TARGET
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    count = step("generate", args, model)
    command = [sys.executable, "-c", SLM, "convert", "--from", source, "--to", target]
    started = time.monotonic()
    told = subprocess.run(
        [*command, *(["--dtype", args.dtype] if args.dtype else [])],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ).stderr  # fmt: skip
    seconds = time.monotonic() - started
    # Its own word: the usage of a parent's children is the largest of all that it ever had.
    (peak,) = re.findall(r"^peak memory ([\d.]+) GB$", told, re.MULTILINE)
    record = json.loads((target / "foundation.json").read_text())
    itemsize = {"int8": 1, "bfloat16": 2, "float32": 4}
    sizes = [math.prod(shape) * itemsize[dtype] for shape, dtype in record["parameters"].values()]
    stored = disk(target / "params")
    read = step("restore", args, model)
    print(
        f"| {model} | {count / 1e9:.3f}B | {disk(source) / 1e9:.2f} GB | {stored / 1e9:.2f} GB "
        f"| {max(sizes) / 1e9:.2f} GB | {seconds:.0f} | {peak} GB | {read / stored:.3f} x |",
        flush=True,
    )
    for folder in (source, target):
        shutil.rmtree(folder)


def step(name: str, args: argparse.Namespace, model: str) -> int:
    """Runs `generate` or `restore` in a process of its own; returns the number that it prints."""
    words = ["--work", args.work, "--models", model, "--mesh", *map(str, args.mesh), "--step", name]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env=environment, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return int(done.stdout.splitlines()[-1])


def generate(directory: Path, model: str) -> int:
    """Writes a checkpoint of random weights; returns the number of its parameters."""
    from safetensors.numpy import save_file

    family, config = described(model)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(family.hf_config(config)))
    rng, shard, places, count = np.random.default_rng(0), {}, {}, 0

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, directory / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for piece in family.hf_pieces(config):
        shard[piece.source] = rng.standard_normal(piece.layout.theirs, np.float32) * np.float32(0.05)
        count += shard[piece.source].size
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return count


def described(model: str) -> tuple[Any, Any]:
    """Returns the family and the configuration of `network:preset`."""
    import importlib

    network, _, preset = model.partition(":")
    config = importlib.import_module(f"slm_jax.models.{network}").preset(preset)
    name = preset if network == "conformer" else network
    return importlib.import_module(f"slm_jax.checkpoints.families.{FAMILIES[name]}").FAMILY, config


def restore(directory: Path, mesh_shape: list[int]) -> int:
    """Restores onto the mesh as a run does; returns the bytes that were read."""
    import flax.linen as nn
    import jax
    import tensorstore

    from slm_jax.checkpoints.foundation import config_of, load_foundation, read_foundation
    from slm_jax.models.networks import boxed_params
    from slm_jax.models.quantization import quantized
    from slm_jax.partitioning.mesh import make_mesh
    from slm_jax.partitioning.sharding import named_shardings

    record = read_foundation(directory)
    boxed = boxed_params(config_of(record))
    if "int8" in {dtype for _, dtype in record.parameters.values()}:
        boxed = jax.eval_shape(quantized, boxed)
    data, fsdp, tensor = mesh_shape
    places = named_shardings(boxed, make_mesh(data, fsdp, tensor))
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        places,
    )
    jax.block_until_ready(load_foundation(directory, record.kind, abstract))
    (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
