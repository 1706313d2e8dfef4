"""`slm export`: artifacts that answer as `slm infer` does, also where slm_jax cannot be imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from slm_jax.checkpoints.foundation import read_foundation

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Transcribe the speech:"
# What a server need not have. Entered as absent, an import of any of them fails.
ABSENT = ("slm_jax", "flax", "optax", "orbax", "tensorflow", "seqio", "gin", "clu")


# As a run has it that was trained on other hardware.
ELSEWHERE = [
    "--gin.conformer.preset.attention_kernel='pallas'",
    "--gin.t5.preset.attention_kernel='cudnn'",
]


@pytest.fixture(scope="module")
def run(workshop, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "run"
    done = workshop.slm(workshop.train_words(folder, 3))
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[str]:
    """Three WAVs of different lengths at 16 kHz."""
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("recordings")
    paths = []
    for number, seconds in enumerate((0.7, 2.31, 3.4)):
        sound = rng.normal(0, 0.1, int(16_000 * seconds)) * np.hanning(int(16_000 * seconds))
        paths.append(str(folder / f"{number}.wav"))
        soundfile.write(paths[-1], sound, 16_000, subtype="PCM_16")
    return paths


@pytest.fixture(scope="module")
def exported(workshop, run, recordings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "slm"
    words = ["export", "--run", str(run), "--to", str(folder), "--audio", *recordings, "--prompt", PROMPT]
    done = workshop.slm([*words, *ELSEWHERE])
    assert done.status == 0, done.err
    lacking = "attention_kernel of speech_encoder is 'pallas' and llm is 'cudnn', which this cpu lacks"
    assert f"{lacking}: 'plain' is taken" in done.err
    assert re.search(
        r"model\.stablehlo: \d+ tokens of 3 answers equal the model's, together and alone", done.err
    )
    assert re.search(r"answers differ; lowered for cpu, cuda, tpu", done.err)
    return folder


def test_every_artifact_says_what_it_is_and_fits_on(workshop, exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "adapter.json", "adapter.safetensors", "merged.json", "merged.safetensors",
        "model.json", "model.stablehlo", "tokenizer.model",
    ]  # fmt: skip
    assert not [path for path in exported.parent.iterdir() if path != exported]
    records = {
        name: json.loads((exported / f"{name}.json").read_text()) for name in ("adapter", "merged", "model")
    }
    for part in ("speech_encoder", "llm"):
        found = read_foundation(workshop.folder / part)
        assert records["adapter"]["fits_on"][part]["fingerprint"] == found.fingerprint
    for record in records.values():
        assert record["format_version"] == 1
        fingerprints = record["provenance"]["fingerprints"]
        assert {"foundation/llm", "foundation/speech_encoder", "tokenizer/targets"} <= fingerprints.keys()
        assert "TRAIN_STEPS" in record["provenance"]["config"]
    adapter = load_file(exported / "adapter.safetensors")
    assert all(name.startswith("adapter/") for name in adapter)
    assert records["model"]["platforms"] == ["cpu", "cuda", "tpu"]
    assert records["model"]["weights_fingerprint"] == records["merged"]["fingerprint"]


def serve(exported: Path, tmp_path: Path, files: list[str]) -> list[str]:
    """Runs docs/export.md's server where slm_jax and its requirements are absent."""
    (script,) = re.findall(
        r"^```python\n(# serve\.py\n.*?)^```", (ROOT / "docs/export.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "serve.py").write_text(script)
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve.py", str(exported), PROMPT, *files],
        cwd=tmp_path, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_server_of_the_documents_answers_as_infer_does(workshop, run, recordings, exported, tmp_path):
    done = workshop.slm(["infer", "--run", str(run), "--prompt", PROMPT, "--audio", *recordings])
    assert done.status == 0, done.err
    expected = done.out.splitlines()
    assert len(expected) == 3
    assert serve(exported, tmp_path, recordings) == expected
    assert serve(exported, tmp_path, recordings[1:2]) == expected[1:2]


def test_some_formats_alone(workshop, run, recordings, tmp_path):
    words = ["export", "--run", str(run), "--to", str(tmp_path / "a"), "--formats", "adapter"]
    done = workshop.slm([*words, "--audio", recordings[0], "--prompt", PROMPT])
    assert done.status == 0, done.err
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter.json", "adapter.safetensors", "tokenizer.model",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--formats", "stablehol"], "did you mean 'stablehlo'"),
        (["--platforms", "cuda"], "this machine is cpu"),
        (["--platforms", "cpu", "gpu"], "--platforms: 'gpu'"),
        (["--prompt", "x {speech} {speech}"], "more than once"),
        (["--audio", "missing.wav"], "missing.wav"),
        (["--to", "."], "an export is never overwritten"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(slm_here, run, recordings, tmp_path, more, told):
    flags = {
        "--run": [str(run)],
        "--to": [str(tmp_path / "out")],
        "--audio": recordings[:1],
        "--prompt": [PROMPT],
    }
    flags[more[0]] = more[1:]
    done = slm_here(["export", *(word for name, values in flags.items() for word in (name, *values))])
    assert done.status == 2, done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("slm: error: ")]
    assert told in line and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_audio_and_prompt_go_together(slm_here, run, tmp_path):
    done = slm_here(["export", "--run", str(run), "--to", str(tmp_path / "out"), "--prompt", PROMPT])
    assert done.status == 2 and "together or not at all" in done.err
