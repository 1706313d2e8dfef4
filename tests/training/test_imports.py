"""The rooms that a TPU program needs import with jax, flax, optax and orbax alone."""

import subprocess
import sys
import textwrap

ROOMS = ("audio", "models", "partitioning", "training", "decoding", "checkpoints")
# What other rooms use and none of jax, flax, optax and orbax needs.
BLOCKED = [
    "tensorflow",
    "tensorflow_datasets",
    "tensorflow_text",
    "seqio",
    "t5",
    "gin",
    "sentencepiece",
    "clu",
    "torch",
    "transformers",
    "soundfile",
    "soxr",
    "jiwer",
    "sacrebleu",
    "pyarrow",
    "safetensors",
    "espeakng_loader",
    "apache_beam",
    "matplotlib",
    "grain",
    "hypothesis",
    "pandas",
]


def test_rooms_import_with_jax_flax_optax_and_orbax_alone():
    program = f"""
        import importlib, importlib.abc, pkgutil, sys

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {BLOCKED!r}:
                    raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

        sys.meta_path.insert(0, Block())
        for room in {ROOMS!r}:
            package = importlib.import_module("slm_jax." + room)
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
                print(module.name)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for module in ("training.loop", "training.objectives.slm", "checkpoints.manager", "models.slm"):
        assert f"slm_jax.{module}" in done.stdout.split()
