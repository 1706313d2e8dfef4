"""Runs on models that were brought in: any encoder with any T5, as int8, and never on other ones."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from published import tensors_of, write_checkpoint
from safetensors.numpy import load_file, save_file

from slm_jax.checkpoints.families import t5, wav2vec2, whisper
from slm_jax.cli.main import main
from slm_jax.models.t5 import T5Config
from slm_jax.models.wav2vec2 import Wav2Vec2Config
from slm_jax.models.whisper import WhisperConfig

STEPS = 4
CONVERTED = ("models/encoders/converted.gin", "models/llms/converted.gin")
ENCODERS = {
    "whisper": (
        whisper.FAMILY,
        WhisperConfig(mel_bins=16, layers=1, dim=24, heads=3, mlp_dim=40, positions=250),
    ),
    "wav2vec2": (
        wav2vec2.FAMILY,
        Wav2Vec2Config(layers=1, dim=24, heads=3, mlp_dim=40, position_kernel=16, position_groups=4),
    ),
}
T5 = T5Config(
    vocab_size=1024, emb_dim=40, num_heads=3, head_dim=8, mlp_dim=56, encoder_layers=2, decoder_layers=1
)


class Brought(NamedTuple):
    """The folder of converted models, and commands on them."""

    workshop: object
    folder: Path

    def words(self, run: Path, steps: int = STEPS, encoder: str = "whisper", more: tuple[str, ...] = ()):
        words = self.workshop.train_words(run, steps, ("CHECKPOINT_PERIOD=3", "BATCH_SIZE=2"))  # type: ignore
        files = [word for name in CONVERTED for word in ("--gin_file", name)]
        places = {
            "SPEECH_ENCODER_CHECKPOINT": self.folder / encoder,
            "LLM_CHECKPOINT": self.folder / "t5",
        }
        flags = [f"--gin.{name}={str(path)!r}" for name, path in places.items()]
        return [*words[:3], *files, *words[3:], *flags, *(f"--gin.{binding}" for binding in more)]

    def train(self, run: Path, *args, **options):
        return self.workshop.slm(self.words(run, *args, **options))  # type: ignore


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def brought(workshop, tmp_path_factory) -> Brought:
    folder = tmp_path_factory.mktemp("brought")
    models = {**ENCODERS, "t5": (t5.FAMILY, T5)}
    for name, (family, config) in models.items():
        write_checkpoint(
            folder / "hf" / name, tensors_of(family, config, scale=0.1), family.hf_config(config)
        )
        assert main(["convert", "--from", str(folder / "hf" / name), "--to", str(folder / name)]) == 0
    return Brought(workshop, folder)


@pytest.fixture(scope="module")
def whole(brought, tmp_path_factory) -> Path:
    """A finished run on the converted Whisper and T5."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = brought.train(run)
    assert done.status == 0, done.err
    return run


def test_a_converted_encoder_and_a_converted_t5_train_and_answer(brought, whole, tmp_path):
    curve = losses(whole)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert np.isfinite(list(curve.values())).all()
    table = json.loads((whole / f"checkpoints/{STEPS}/record/metadata").read_text())["parameters"]
    assert {name.split("/")[1] for name in table if name.startswith("params/")} == {"adapter"}
    recording = min((brought.workshop.folder / "corpus" / "audio" / "test").glob("*.flac"))
    words = ["infer", "--run", str(whole), "--prompt", "Transcribe the speech:", "--max_tokens", "4"]
    done = brought.workshop.slm([*words, "--audio", str(recording)])
    assert done.status == 0, done.err
    assert done.out.count("\n") == 1


def test_another_encoder_takes_its_place_by_its_checkpoint_alone(brought, tmp_path):
    done = brought.train(tmp_path / "run", 3, encoder="wav2vec2")
    assert done.status == 0, done.err
    assert np.isfinite(losses(tmp_path / "run")[1])


def test_frozen_int8_trains_the_same_adapter_and_resumes_bit_for_bit(brought, whole, tmp_path):
    # The same learning rates, whatever the last step is.
    int8 = ("FROZEN_WEIGHTS='int8'", f"optimizers.ScheduleConfig.total_steps={STEPS}")
    for name, steps in (("once", (STEPS,)), ("twice", (3, STEPS))):
        for last in steps:
            done = brought.train(tmp_path / name, last, more=int8)
            assert done.status == 0, done.err
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    floating, rounded = losses(whole), losses(tmp_path / "once")
    assert floating != rounded
    assert abs(floating[1] - rounded[1]) < 0.02 * abs(floating[1])
    tables = [
        json.loads((run / f"checkpoints/{STEPS}/record/metadata").read_text())["parameters"]
        for run in (whole, tmp_path / "once")
    ]
    assert tables[0] == tables[1]
    recording = min((brought.workshop.folder / "corpus" / "audio" / "test").glob("*.flac"))
    words = ["infer", "--run", str(tmp_path / "once"), "--prompt", "Transcribe:", "--max_tokens", "4"]
    done = brought.workshop.slm([*words, "--audio", str(recording)])
    assert done.status == 0, done.err
    plan = (tmp_path / "once" / "sharding_plan.txt").read_text()
    assert "kernel_scale" in plan and "int8" in plan


def test_rows_longer_than_whispers_window_are_refused_at_once(brought, slm_here, tmp_path):
    lengths = "{'speech': 100000, 'inputs': 16, 'targets': 24}"
    done = slm_here(brought.words(tmp_path / "run", more=(f"TASK_FEATURE_LENGTHS={lengths}", "BATCH_SIZE=8")))
    assert done.status == 2
    assert "expected at most 80000: the speech encoder takes no more" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("binding", "told"),
    [
        ("LLM_CHECKPOINT={whisper!r}", "LLM_CHECKPOINT, is no T5"),
        ("SPEECH_ENCODER_CHECKPOINT={t5!r}", "SPEECH_ENCODER_CHECKPOINT, is no speech encoder"),
    ],
)
def test_one_model_in_the_place_of_the_other_is_named(brought, slm_here, tmp_path, binding, told):
    names = {name: str(brought.folder / name) for name in ("whisper", "t5")}
    done = slm_here(brought.words(tmp_path / "run", more=(binding.format(**names), "BATCH_SIZE=8")))
    assert done.status == 2
    assert told in done.err
    assert not (tmp_path / "run").exists()


def test_a_mistyped_sort_of_weights_is_named(brought, slm_here, tmp_path):
    done = slm_here(brought.words(tmp_path / "run", more=("FROZEN_WEIGHTS='int4'", "BATCH_SIZE=8")))
    assert done.status == 2
    assert "did you mean 'int8'" in done.err


def flipped(source: Path, target: Path) -> None:
    """Copies a checkpoint of transformers with the last bit of one weight changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    tensors[name].view(np.uint32)[3, 5] ^= 1
    save_file(tensors, target / "model.safetensors")


def test_one_bit_of_a_frozen_weight_and_the_run_is_not_gone_on_with(brought, whole, tmp_path):
    flipped(brought.folder / "hf" / "t5", tmp_path / "hf")
    words = ["convert", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "t5")]
    assert main(words) == 0
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    done = brought.train(whole, STEPS + 2, more=(f"LLM_CHECKPOINT={str(tmp_path / 't5')!r}",))
    assert done.status == 2
    assert "was made with another foundation/llm" in done.err
    assert {path: path.read_bytes() for path in before} == before


def test_one_bit_on_disk_and_the_model_is_damaged_by_name(brought, whole, tmp_path):
    shutil.copytree(brought.folder / "t5", tmp_path / "t5")
    data = max((tmp_path / "t5" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    done = brought.train(whole, STEPS + 2, more=(f"LLM_CHECKPOINT={str(tmp_path / 't5')!r}",))
    assert done.status == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("slm: error: ")]
    assert f"{tmp_path / 't5'} is damaged" in line
