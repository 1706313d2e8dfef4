"""Shared settings of the suite: 8 virtual CPU devices, one compilation cache, a fresh seed for each run."""

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# XLA's CPU pool is as large as the machine; 8 devices that wait for one another need more threads.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax-compilation")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    # One seed for the whole suite, the same in every worker.
    os.environ.setdefault("SLM_TEST_SEED", str(secrets.randbelow(2**31)))


def pytest_report_header() -> str:
    return f"SLM_TEST_SEED={os.environ['SLM_TEST_SEED']} (set it to repeat the random inputs)"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers, fresh in every run and different for every test; the header prints the seed."""
    name = [ord(letter) for letter in request.node.nodeid]
    return np.random.default_rng([int(os.environ["SLM_TEST_SEED"]), *name])


def _registered() -> list[set[str]]:
    """Names of SeqIO's tasks and mixtures, of a process that has loaded it."""
    seqio = sys.modules.get("seqio")
    return [set(r.names()) for r in (seqio.TaskRegistry, seqio.MixtureRegistry)] if seqio else [set(), set()]


@pytest.fixture(scope="module", autouse=True)
def modules_leave_no_tasks() -> Iterator[None]:
    """What fixtures of a whole module registered, in commands of this process, is taken back at its end."""
    before = _registered()
    yield
    if seqio := sys.modules.get("seqio"):
        for registry, names in zip((seqio.TaskRegistry, seqio.MixtureRegistry), before, strict=True):
            for name in set(registry.names()) - names:
                registry.remove(name)


@pytest.fixture
def clean_registries() -> Iterator[None]:
    """Takes back what a test registered with SeqIO in this process."""
    # After the tests' own imports: TensorFlow is to be imported by the room that hides accelerators from it.
    from slm_jax.data import host_tensorflow  # noqa: F401, I001
    import seqio

    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)
    before = [set(registry.names()) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)
