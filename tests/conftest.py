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
from object_servers import ObjectServer, without_other_storage

# Of the requests to object storage: enough that every test meets each kind of failure.
FAILING_SHARE = 0.05


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


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[ObjectServer]:
    """A server of each kind of object storage, for all tests of a module."""
    from slm_jax import object_stores

    seed = int(os.environ["SLM_TEST_SEED"])
    with pytest.MonkeyPatch.context() as patch, ObjectServer(request.param, seed) as found:
        for name in os.environ.keys() - without_other_storage().keys():
            patch.delenv(name)
        for name, value in found.environment.items():
            patch.setenv(name, value)
        # What tests of another module left.
        object_stores.store.cache_clear()
        yield found
    object_stores.store.cache_clear()
    for name in ("TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
        os.environ.pop(name, None)


@pytest.fixture
def bucket(server: ObjectServer, request: pytest.FixtureRequest, monkeypatch) -> Iterator[str]:
    """A folder of the bucket, of a server that fails now and then."""
    from slm_jax import storage

    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 0.05)
    server.share, server.away = FAILING_SHARE, False
    yield f"{server.scheme}://bucket/{request.node.originalname}"
    server.share, server.away = 0.0, False
