"""The rooms that a TPU program needs import with jax, flax, optax and orbax alone."""

import subprocess
import sys
import textwrap

BARE_ROOMS = ("audio", "models", "partitioning", "training", "decoding", "checkpoints")


def test_rooms_import_without_data_and_config_packages():
    program = textwrap.dedent(
        f"""
        import importlib
        import importlib.abc
        import pkgutil
        import sys

        blocked = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "gin", "sentencepiece", "clu",
                   "torch", "transformers", "soundfile", "soxr", "jiwer", "sacrebleu", "pyarrow", "safetensors",
                   "espeakng_loader", "apache_beam", "matplotlib", "grain", "hypothesis", "rich", "pandas", "scipy")

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in blocked and "slm_jax" in importing:
                    for frame in frames():
                        if frame.startswith("slm_jax"):
                            raise ImportError(f"{{name}} is blocked, imported by {{frame}}")
                return None

        importing = "slm_jax"

        def frames():
            # The module whose import statement is running: libraries may try optional packages of their own.
            frame = sys._getframe(2)
            while frame is not None:
                name = frame.f_globals.get("__name__", "")
                if not name.startswith("importlib") and name != "__main__":
                    yield name
                    return
                frame = frame.f_back

        sys.meta_path.insert(0, Block())
        found = []
        for room in {BARE_ROOMS!r}:
            package = importlib.import_module(f"slm_jax.{{room}}")
            found.append(package.__name__)
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
                found.append(module.name)
        print(" ".join(found))
        print(" ".join(sorted(name for name in ("tensorflow", "seqio", "gin", "sentencepiece") if name in sys.modules)))
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, forbidden = done.stdout.split("\n")[:2]
    for module in ("training.loop", "training.objectives.slm", "checkpoints.manager", "partitioning.sharding"):
        assert f"slm_jax.{module}" in found.split()
    assert forbidden == ""
