"""The search of `slm plan`, on a compiler whose memory and speed are known."""

import json

import jax
import pytest

from slm_jax.cli import plan, plan_search
from slm_jax.cli.main import main, parse_arguments
from slm_jax.cli.model_changes import configs, with_remat
from slm_jax.models.t5 import T5Config
from slm_jax.partitioning.topology import find_topology
from slm_jax.training.planning import granted_bytes

TINY = ["plan", "--gin_file", "models/slm_tiny.gin", "--gin.BATCH_SIZE=8", "--topology", "v5e:2x2"]
ROOM = 16 * 2**30
# Bytes of a row on a device, and seconds of its products.
ROW = {
    "none": (900_000_000, 1.0),
    "dots": (300_000_000, 1.05),
    "frozen": (250_000_000, 1.0),
    "full": (50_000_000, 1.3),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What the command sets for its own process is taken back."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    yield
    jax.config.update("jax_platforms", "cpu")


class Compiler:
    """Memory is a line over rows and a little more; products and what goes over tensor take time by rows."""

    def __init__(self, breaks=(), over_tensor=0.5, fixed=2**30):
        self.asked = []
        self.breaks, self.over_tensor, self.fixed = breaks, over_tensor, fixed

    def __call__(self, run, topology):
        (remat,) = {config.remat for config in configs(run) if isinstance(config, T5Config)}
        tensor, rows = run.mesh.tensor, run.data.batch_size
        self.asked.append((remat, tensor, rows))
        if remat in self.breaks:
            raise ValueError("Mosaic failed\nat length")
        each, seconds = ROW[remat]
        peak = self.fixed + rows * run.mesh.tensor // 4 * each + rows**0.5
        fits = peak < ROOM
        causes = {
            "products": rows * seconds,
            "waiting": rows * self.over_tensor * (tensor > 1),
            "memory": 9.0,
        }
        step = max(causes["products"], causes["memory"]) + causes["waiting"]
        return {
            "fits": fits,
            "mesh": {"data": run.mesh.data, "fsdp": run.mesh.fsdp, "tensor": tensor},
            "bytes_per_device": {"arguments": self.fixed // 2, "peak": peak} if fits else None,
            "bytes_needed": None if fits else peak,
            "seconds_by_cause": causes if fits else None,
            "predicted_step_seconds": step if fits else None,
            "audio_hours_per_second": rows / step if fits else None,
            "mfu": 0.5 if fits else None,
        }


def run_of(*bindings):
    return plan._build(parse_arguments([*TINY, *bindings]))


def found_by(compiler, monkeypatch, *bindings):
    monkeypatch.setattr("slm_jax.training.planning.granted_bytes", lambda topology: ROOM)
    said = []
    topology = find_topology("v5e:2x2")
    candidates = plan_search.candidates_for(topology, plan_search.POLICIES, [1, 2, 4, 8])
    return plan_search.search(run_of(*bindings), topology, candidates, compiler, said.append), said


@pytest.mark.parametrize("remat", ROW)
@pytest.mark.parametrize("start", [4, 64, 4096])
def test_the_largest_batch_is_found_from_any_start(remat, start):
    run = with_remat(run_of(f"--gin.BATCH_SIZE={start}", "--gin.FSDP=4"), remat)
    compiler = Compiler()
    best = plan_search.largest(run, find_topology("v5e:2x2"), compiler, ROOM, lambda line: None)
    most = (ROOM - 2**30) // ROW[remat][0] * 4
    assert 0.93 * most - 4 <= best["rows"] <= most
    assert best["fits"] and best["rows"] % 4 == 0
    assert len(compiler.asked) <= 5


def test_policies_are_ranked_and_meshes_that_cannot_win_cost_one_compilation(monkeypatch):
    compiler = Compiler()
    found, said = found_by(compiler, monkeypatch)
    assert [row["remat_of_llm"] for row in found["ranked"]] == ["frozen", "none", "dots", "full"]
    assert all(row["mesh"]["tensor"] == 1 for row in found["ranked"])
    speeds = [row["audio_hours_per_second"] for row in found["ranked"]]
    assert speeds == sorted(speeds, reverse=True)
    left_out = {(row["remat_of_llm"], row["mesh"]["tensor"]): row["reason"] for row in found["left_out"]}
    assert "at most 0.667 audio hours a second" in left_out["frozen", 2]
    assert "more goes over tensor" in left_out["frozen", 4]
    assert {tensor for _, tensor, _ in compiler.asked} == {1, 2}
    assert sum(tensor == 2 for _, tensor, _ in compiler.asked) == 4
    assert any("remat full, data=1 fsdp=4 tensor=1: 8 rows: " in line and "fits" in line for line in said)
    json.dumps(found)


def test_a_mesh_is_searched_where_it_may_win(monkeypatch):
    # So few rows fit that memory takes longer than products.
    found, _ = found_by(Compiler(over_tensor=0.0, fixed=ROOM - 300_000_000), monkeypatch)
    searched = {(row["remat_of_llm"], row["mesh"]["tensor"]) for row in found["ranked"]}
    assert searched >= {("frozen", 1), ("frozen", 2), ("frozen", 4)}


def test_a_candidate_that_breaks_the_compiler_is_told_and_left_out(monkeypatch):
    found, said = found_by(Compiler(breaks=("frozen",)), monkeypatch)
    assert {row["remat_of_llm"] for row in found["ranked"]} == {"none", "dots", "full"}
    assert {row["reason"] for row in found["left_out"] if row["remat_of_llm"] == "frozen"} == {
        "ValueError: Mosaic failed"
    }
    assert sum("ValueError: Mosaic failed" in line for line in said) == 3


def test_where_not_one_row_fits_it_says_so(monkeypatch):
    found, _ = found_by(Compiler(fixed=2 * ROOM), monkeypatch)
    assert found["ranked"] == []
    assert "not even 4 rows fit" in found["left_out"][0]["reason"]


def test_after_an_interrupt_what_is_known_is_there(monkeypatch):
    compiler = Compiler()

    def interrupted(run, topology):
        if len(compiler.asked) == 6:
            raise KeyboardInterrupt
        return compiler(run, topology)

    found, said = found_by(interrupted, monkeypatch)
    assert found["interrupted"] and said[-1] == "interrupted"
    assert {row["mesh"]["tensor"] for row in found["ranked"]} == {1}
    assert "frozen" in {row["remat_of_llm"] for row in found["ranked"]}


def test_candidates_are_the_policies_on_each_mesh_and_closed_3d_tori_hold_two_copies():
    cube = plan_search.candidates_for(find_topology("v5p:4x4x4"), ["full"], [1, 3, 4])
    assert [candidate.mesh for candidate in cube] == [
        {"data": 2, "fsdp": 32, "tensor": 1},
        {"data": 1, "fsdp": 16, "tensor": 4},
    ]
    flat = plan_search.candidates_for(find_topology("v5e:4x4", 2), ["full", "none"], [1])
    assert [str(candidate) for candidate in flat] == [
        "remat full, data=1 fsdp=16 tensor=1",
        "remat none, data=1 fsdp=16 tensor=1",
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--search", "frozzen"], "frozzen"),
        (
            ["--search", "--search_tensor", "3"],
            "--search_tensor is [3], of which none divides",
        ),
        (["--search", "--search_tensor", "0"], "--search_tensor is 0"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(flags, sentence, capsys):
    assert main([*TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_what_fits_is_asked_of_the_compiler_and_unknown_for_gpus(capsys):
    assert granted_bytes(find_topology("v5e:2x2")) == 15.75 * 2**30
    arguments = [*TINY[:-1], "gpu:h100x4", "--search"]
    assert main(arguments) == 2
    assert (
        "--search needs to know what fits, and nothing here describes NVIDIA H100" in capsys.readouterr().err
    )


def test_a_run_without_an_llm_takes_the_policy_everywhere():
    files = ["models/encoders/conformer_tiny.gin", "runs/pretrain_encoder_best_rq.gin"]
    bindings = ["TASK_FEATURE_LENGTHS={'speech': 16000}", "SPEECH_ENCODER_OUTPUT='none'"]
    flags = [f"--gin_file={name}" for name in files] + [f"--gin.{binding}" for binding in bindings]
    run = plan._build(parse_arguments(["plan", *flags, "--topology", "v5e:2x2"]))
    policies = {config.remat for config in configs(with_remat(run, "dots")) if hasattr(config, "remat")}
    assert policies == {"dots"}
