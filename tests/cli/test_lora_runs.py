"""Runs with LoRA beside a frozen T5: trained, resumed, scored, saved as one T5, and exported."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from slm_jax.checkpoints.foundation import load_foundation, read_foundation
from slm_jax.checkpoints.safetensors import flatten, unflatten

LORA = (
    "LORA=@lora.LoRAConfig()",
    "lora.LoRAConfig.rank=4",
    "lora.LoRAConfig.projections=('query', 'mlp/wo')",
    "LEARNING_RATE=0.03",
    "EVALUATION=@run.EvaluationConfig()",
    "run.EvaluationConfig.num_examples=2",
    "run.EvaluationConfig.max_tokens=4",
)
PLACES = {
    "encoder/encoder/attention/query": "encoder",
    "encoder/encoder/mlp/wo": "encoder",
    "decoder/decoder/self_attention/query": "decoder",
    "decoder/decoder/encoder_decoder_attention/query": "decoder",
    "decoder/decoder/mlp/wo": "decoder",
}


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    record = read_foundation(directory)
    shapes = {name: jax.ShapeDtypeStruct(tuple(s), dtype) for name, (s, dtype) in record.parameters.items()}
    return jax.device_get(flatten(load_foundation(directory, "t5", unflatten(shapes))))


@pytest.fixture(scope="module")
def run(workshop, tmp_path_factory) -> Path:
    """A run that was stopped after two steps and went on to its end, where it saved its T5."""
    folder = tmp_path_factory.mktemp("lora")
    more = (*LORA, f"run.Run.save_foundations={{'llm': {str(folder / 'llm')!r}}}")
    for steps in (2, 3):
        words = workshop.train_words(folder / "run", 3, (*more, f"loop.LoopConfig.train_steps={steps}"))
        done = workshop.slm(words)
        assert done.status == 0, done.err
        if steps == 2:
            # Saved for what was the last step; that of the last one takes its place.
            (folder / "llm").rename(folder / "earlier")
    return folder / "run"


def test_the_checkpoint_holds_adapter_and_products_alone(run):
    assert sorted(losses(run)) == [1, 2, 3] and np.isfinite(list(losses(run).values())).all()
    table = json.loads((run / "checkpoints/3/record/metadata").read_text())["parameters"]
    names = [name.removeprefix("params/llm/") for name in table if name.startswith("params/llm/")]
    assert sorted(names) == sorted(f"{place}/{leaf}" for place in PLACES for leaf in ("lora_a", "lora_b"))
    assert any(name.startswith("params/adapter/") for name in table)
    assert "lora_a" in (run / "sharding_plan.txt").read_text()


def test_a_run_is_scored_and_exported_and_its_t5_is_base_and_products(workshop, run, tmp_path):
    done = workshop.slm(["evaluate", "--run", str(run), "--split", "validation", "--mixture", "demo_asr"])
    assert done.status == 0, done.err
    assert "demo_asr wer" in done.out
    words = ["export", "--run", str(run), "--to", str(tmp_path / "out"), "--platforms", "cpu"]
    done = workshop.slm(words)
    assert done.status == 0, done.err
    assert "answers equal the model's" in done.err
    trained = load_file(tmp_path / "out" / "adapter.safetensors")
    record = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert record["lora"]["rank"] == 4
    assert record["fits_on"]["llm"]["fingerprint"] == read_foundation(workshop.folder / "llm").fingerprint
    exported = load_file(tmp_path / "out" / "merged.safetensors")
    assert not [name for name in exported if "lora" in name]

    # W + alpha / sqrt(rank) A B, written out.
    base, saved = weights_of(workshop.folder / "llm"), weights_of(run.parent / "llm")
    assert saved.keys() == base.keys() == {n.removeprefix("llm/") for n in exported if n.startswith("llm/")}
    for name, kernel in base.items():
        expected = np.asarray(kernel, np.float64)
        place = name.removesuffix("/kernel")
        if place in PLACES:
            a, b = (trained[f"llm/{place}/{leaf}"].astype(np.float64) for leaf in ("lora_a", "lora_b"))
            product = 8.0 / 2 * (a.reshape(-1, 4) @ b.reshape(4, -1)).reshape(kernel.shape)
            assert np.abs(product).max() > 1e-4
            expected = expected + product
        np.testing.assert_allclose(saved[name], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(saved[name], exported[f"llm/{name}"])


def test_what_could_not_be_merged_is_told_before_training(workshop, slm_here, tmp_path):
    more = (*LORA, "FROZEN_WEIGHTS='int8'", "run.Run.save_foundations={'llm': 'x'}")
    done = slm_here(workshop.train_words(tmp_path / "run", 3, more))
    assert done.status == 2, done
    (line,) = [line for line in done.err.splitlines() if line.startswith("slm: error: ")]
    assert "LoRA is merged into floats" in line and "Traceback" not in done.err
    assert not (tmp_path / "run").exists()
