"""A tiny corpus with foundation models of random weights, and the `slm` command in processes of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from flax import linen as nn

from slm_jax.checkpoints.foundation import architecture, save_foundation
from slm_jax.cli import demo, gin_config
from slm_jax.cli.main import main
from slm_jax.models.slm import SLM

# What makes the recipe small enough for a test.
SMALL = (
    "LOG_PERIOD=1",
    # Steps with the encoder in them, as runs have by default; a test of its own encodes once.
    "run.DataConfig.encode_once=False",
    "WARMUP_STEPS=2",
    "BATCH_SIZE=8",
    "conformer.preset.layers=1",
    "conformer.preset.dim=32",
    "conformer.preset.heads=2",
    "conformer.preset.subsampling_channels=(8, 8)",
    "t5.preset.encoder_layers=1",
    "t5.preset.decoder_layers=1",
    "t5.preset.emb_dim=32",
    "t5.preset.num_heads=2",
    "t5.preset.head_dim=16",
    "t5.preset.mlp_dim=32",
    "adapters.AdapterConfig.layers=1",
    "adapters.AdapterConfig.dim=32",
    "adapters.AdapterConfig.heads=2",
    "adapters.AdapterConfig.mlp_dim=32",
    "EVALUATION=None",
    # What other meshes compute differs in the last bits, which Muon's iteration makes larger.
    "OPTIMIZER=@optimizers.AdamWConfig()",
)


class Done(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


class Workshop(NamedTuple):
    """A folder with `corpus`, `speech_encoder` and `llm`, in which commands run."""

    folder: Path

    def bindings(self, model_dir: Path, steps: int, more: Sequence[str] = ()) -> list[str]:
        """Bindings of a small run of the packaged adapter recipe; later ones win."""
        places = {
            "CORPUS_DIR": self.folder / "corpus",
            "SPEECH_ENCODER_CHECKPOINT": self.folder / "speech_encoder",
            "LLM_CHECKPOINT": self.folder / "llm",
            "MODEL_DIR": model_dir,
        }
        return [*SMALL, f"TRAIN_STEPS={steps}", *(f"{k}={str(v)!r}" for k, v in places.items()), *more]

    def train_words(self, model_dir: Path, steps: int, more: Sequence[str] = ()) -> list[str]:
        """The words of `slm train` for a small run."""
        flags = [f"--gin.{binding}" for binding in self.bindings(model_dir, steps, more)]
        return ["train", "--gin_file", "recipes/quickstart.gin", *flags]

    def start(self, words: Sequence[str], devices: int = 1) -> subprocess.Popen:
        """Starts `slm` in a process of its own."""
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "SLM_CACHE_DIR": str(self.folder / "cache"),
        }
        code = "import sys; from slm_jax.cli.main import main; sys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def slm(self, words: Sequence[str], devices: int = 1) -> Done:
        """Runs `slm` to its end."""
        process = self.start(words, devices)
        out, err = process.communicate(timeout=600)
        return Done(process.returncode, out, err)


@pytest.fixture(autouse=True)
def registries_stay_clean(clean_registries) -> None:
    """Commands that run in this process register tasks of this room's corpus."""


@pytest.fixture
def slm_here(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str]], Done]:
    """`slm` in this process, for what is refused: only JAX and TensorFlow take long to load."""

    def run(words: Sequence[str]) -> Done:
        capsys.readouterr()
        status = main(words)
        printed = capsys.readouterr()
        return Done(status, printed.out, printed.err)

    monkeypatch.setenv("SLM_CACHE_DIR", str(workshop.folder / "cache"))
    monkeypatch.chdir(workshop.folder)
    return run


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The workshop of this worker."""
    folder = tmp_path_factory.mktemp("workshop")
    demo.build(str(folder / "corpus"), "tiny")
    gin_config.parse(
        ["models/slm_tiny.gin"], [line for line in SMALL if line.startswith(("conf", "t5", "ad"))]
    )
    model = gin_config.build(SLM)
    batch = {
        "inputs": jax.numpy.zeros((1, 4), int),
        "layout": jax.numpy.zeros((1, 4), int),
        "layout_segment_ids": jax.numpy.ones((1, 4), int),
        "targets": jax.numpy.ones((1, 4), int),
        "target_segment_ids": jax.numpy.ones((1, 4), int),
        "target_positions": jax.numpy.arange(4)[None],
    }
    frozen = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch))["frozen"]
    for part, kind, config in (
        ("speech_encoder", "conformer", model.config.speech_encoder),
        ("llm", "t5", model.config.llm),
    ):
        save_foundation(folder / part, frozen[part], kind=kind, config=architecture(config))
    return Workshop(folder)
