"""The numerical rooms import where only jax, flax, optax, orbax and what these require can be found."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOMS = ["multihost", "audio", "models", "partitioning", "training", "decoding", "checkpoints"]
# Runs first in the child: hides modules as if their distributions were not installed.
BLOCK = """
import importlib.abc, json, os, runpy, sys
hidden = set(json.loads(os.environ["HIDDEN_MODULES"]))
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)", name=name)
sys.meta_path.insert(0, Hidden())
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: list[str]) -> set[str]:
    """The installed distributions that `roots` require, with the extras that they ask for."""
    found: set[str] = set()
    open_requirements = [Requirement(root) for root in roots]
    while open_requirements:
        requirement = open_requirements.pop()
        name = f"{canonical(requirement.name)}[{','.join(sorted(requirement.extras))}]"
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in required:
            child = Requirement(text)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                open_requirements.append(child)
    return {name.partition("[")[0] for name in found}


def hidden_modules() -> set[str]:
    kept = closure(["jax", "flax", "optax", "orbax-checkpoint"]) | {"slm-jax", "pip"}
    return {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if module != "__pycache__" and not kept.intersection(map(canonical, distributions))
    }


def run(rooms: list[str], hidden: set[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCK, str(HERE / "import_rooms.py"), *rooms],
        env={**os.environ, "HIDDEN_MODULES": json.dumps(sorted(hidden))},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_what_is_hidden_is_what_the_bare_environment_lacks():
    hidden = hidden_modules()
    assert {"tensorflow", "seqio", "gin", "clu", "soundfile", "torch", "sentencepiece"} <= hidden
    assert not hidden & {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "msgpack", "etils", "slm_jax"}


def test_the_numerical_rooms_import_with_jax_flax_optax_and_orbax_alone():
    done = run(ROOMS, hidden_modules())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 25


@pytest.mark.parametrize("room", ["data", "cli"])
def test_a_room_that_needs_more_is_caught(room: str):
    done = run([room], hidden_modules())
    assert done.returncode == 1
    assert "hidden by the test" in done.stderr
