"""What decides which program a process runs: Python, packages, our own source, flags of XLA."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "slm-jax", "libtpu", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
VARIABLES = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE",
)  # fmt: skip
NOT_THERE, NOT_SET = "not there", "not set"


def versions(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns name -> version, content or value; all processes of a run should have the same."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = NOT_THERE
    found["source of slm_jax"] = source_fingerprint(Path(__file__).parent.parent)[:12]
    return found | {name: environ.get(name) or NOT_SET for name in VARIABLES}


def source_fingerprint(folder: Path) -> str:
    """Returns the SHA-256 over names and contents of the .py and .gin files below a folder."""
    digest = hashlib.sha256()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.endswith((".py", ".gin")):
                path = Path(root) / name
                digest.update(f"{path.relative_to(folder)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
