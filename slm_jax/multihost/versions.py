"""What decides which program a process runs: Python, packages, our own source, flags of XLA."""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_jax.multihost.examination import Examination, Verdict, differing

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "slm-jax", "libtpu", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
VARIABLES = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE",
)  # fmt: skip
NOT_THERE, NOT_SET = "not there", "not set"


def examine_versions(examination: Examination) -> None:
    """Goes through the phase `versions`."""
    examination.examine("versions", versions, lambda found: judge(examination, found))


def judge(examination: Examination, found: Sequence[Mapping[str, str]]) -> Verdict:
    """Compares what all processes have."""
    values = {name: [one[name] for one in found] for name in found[0]}
    problems = [differing(name, values[name], examination.names) for name in values]
    same = [f"{name} {value}" for name, value in found[0].items() if value not in (NOT_THERE, NOT_SET)]
    return Verdict(", ".join(same), [problem for problem in problems if problem])


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
