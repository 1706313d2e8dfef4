"""`slm data rows` and `slm data mixture` say what a packed, staged and augmented run then reads."""

import json
import re
from pathlib import Path

import pytest

from slm_jax.cli import gin_config
from slm_jax.cli.main import main
from slm_jax.cli.run import Run
from slm_jax.cli.wiring import Wiring
from slm_jax.errors import UserError

PACKED = (
    "run.DataConfig.pack=True",
    "run.DataConfig.utterances=4",
    "run.DataConfig.block=16",
    "run.DataConfig.stages={2: 'demo_speech'}",
    "TASK_FEATURE_LENGTHS={'speech': 180224, 'inputs': 60, 'targets': 70}",
    "run.DataConfig.augment=@augmentation.AugmentationConfig()",
    "augmentation.AugmentationConfig.speed=@augmentation.SpeedConfig()",
    "augmentation.AugmentationConfig.gain=@augmentation.GainConfig()",
    "loop.LoopConfig.log_ids=True",
    "CHECKPOINT_PERIOD=3",
)


@pytest.fixture(scope="module")
def recipe(workshop, tmp_path_factory) -> Path:
    """The quickstart's recipe with augmentation at hand."""
    path = tmp_path_factory.mktemp("recipe") / "augmented.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from slm_jax.cli import run\n"
        "from slm_jax.data import augmentation\n"
        "include 'recipes/quickstart.gin'\n"
    )
    return path


def words(workshop, recipe: Path, run: Path, command: list[str], more=()) -> list[str]:
    flags = [f"--gin.{binding}" for binding in workshop.bindings(run, 4, (*PACKED, *more))]
    return [*command, "--gin_file", str(recipe), *flags]


def ids_of(run: Path) -> dict[int, dict[str, list[str]]]:
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    return {line["step"]: line["ids"] for line in lines}


@pytest.fixture(scope="module")
def trained(workshop, recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("packed") / "run"
    done = workshop.slm(words(workshop, recipe, run, ["train"]))
    assert done.status == 0, done.err
    assert "useful speech" in done.err, done.err
    return run


def test_rows_are_those_of_the_run_on_any_mesh(workshop, recipe, trained):
    logged = ids_of(trained)
    assert any(len(ids) > 2 for ids in logged[1].values())
    tasks = [{name.split("/")[0] for ids in logged[step].values() for name in ids} for step in (2, 3)]
    assert tasks[0] == {"demo_asr", "demo_ast_de"} and tasks[1] > tasks[0]
    whole = workshop.slm(["data", "rows", "--run", str(trained), "--count", "4", "--json"])
    assert whole.status == 0, whole.err
    # Step s of the command is the one that the log calls s + 1.
    assert {int(step) + 1: rows for step, rows in json.loads(whole.out).items()} == logged
    shared: dict[str, list[str]] = {}
    for host in range(4):
        asked = ["--mesh", "data=2,fsdp=2,tensor=2", "--hosts", "4", "--host", str(host), "--start", "3"]
        done = workshop.slm(["data", "rows", "--run", str(trained), *asked, "--json"])
        assert done.status == 0, done.err
        rows = json.loads(done.out)["3"]
        assert len(rows) == 2
        assert all(shared.setdefault(row, ids) == ids for row, ids in rows.items())
    assert shared == logged[4]
    asked = words(workshop, recipe, trained.parent / "other", ["data", "rows", "--start", "1"])
    done = workshop.slm(asked)
    assert done.status == 0, done.err
    first, ids = next(iter(logged[2].items()))
    assert done.out.splitlines()[0] == f"step 1 row {first}: {' '.join(ids)}"


def test_a_packed_run_resumes_where_it_was(workshop, recipe, trained, tmp_path):
    run = tmp_path / "run"
    saved = workshop.slm(words(workshop, recipe, run, ["train"], ("TRAIN_STEPS=3",)))
    assert saved.status == 0, saved.err
    record = json.loads((run / "checkpoints/3/record/metadata").read_text())
    assert record["cursor"]["rows_consumed"] == 24 and len(record["cursor"]["anchor"]) == 2
    done = workshop.slm(words(workshop, recipe, run, ["train"], ("TRAIN_STEPS=4",)))
    assert done.status == 0 and "going on from step 3" in done.err, done.err
    assert ids_of(run) == ids_of(trained)
    other = ("augmentation.GainConfig.db=(-3.0, 3.0)", "TRAIN_STEPS=5")
    refused = workshop.slm(words(workshop, recipe, run, ["train"], other))
    assert refused.status == 2 and "augmentation" in refused.err, refused.err


def test_mixture_tells_rates_epochs_and_how_full_rows_are(workshop, trained):
    done = workshop.slm(["data", "mixture", "--run", str(trained), "--json", "--rows", "2"])
    assert done.status == 0, done.err
    found = json.loads(done.out)
    first, second = found["stages"]
    assert (first["from_step"], first["steps"], second["from_step"], second["steps"]) == (0, 2, 2, 2)
    assert [task["task"] for task in second["tasks"]] == [
        "demo_asr",
        "demo_ast_de",
        "demo_ast_es",
        "demo_slots",
    ]
    logged = ids_of(trained)
    for stage, steps in ((first, (1, 2)), (second, (3, 4))):
        names = [name for step in steps for ids in logged[step].values() for name in ids]
        assert stage["examples"] == len(names)
        for task in stage["tasks"]:
            share = sum(name.startswith(task["task"] + "/") for name in names) / len(names)
            assert task["realised"] == pytest.approx(share)
            assert task["target"] == pytest.approx(1 / len(stage["tasks"]))
            assert task["epochs"] == pytest.approx(len(names) * task["target"] / 24)
        assert 0.5 < stage["useful"]["speech"] <= 1
    assert [example["id"] for row in found["rows"] for example in row] == [
        name for ids in list(logged[1].values())[:2] for name in ids
    ]
    assert all("s of speech>" in example["prompt"] for row in found["rows"] for example in row)
    text = workshop.slm(["data", "mixture", "--run", str(trained), "--steps", "1"])
    assert text.status == 0 and "demo_adapter, 1 steps from step 0" in text.out and "no padding" in text.out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--mesh", "dta=2"], "there is no axis 'dta'; did you mean 'data'?"),
        (["--mesh", "data=x"], "data is 'x', expected a whole number of at least 1"),
        (["--mesh", "data=4", "--hosts", "3"], "--hosts is 3, which does not divide the 4 devices"),
        (["--mesh", "data=4", "--hosts", "2", "--host", "2"], "--host is 2, expected less than the 2"),
        (["--start", "-1"], "--start is -1"),
        (["--gin_file", "x.gin"], "give either --run or --gin_file"),
    ],
)
def test_what_rows_cannot_be_asked(capsys, trained, flags, sentence):
    assert main(["data", "rows", "--run", str(trained), *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_rows_that_the_mesh_does_not_divide(slm_here, trained):
    done = slm_here(["data", "rows", "--run", str(trained), "--mesh", "data=3"])
    assert done.status == 2, done.err
    assert "BATCH_SIZE is 8, which the 3 batch shards of the mesh do not divide" in done.err


@pytest.mark.parametrize(
    ("binding", "sentence"),
    [
        ("pack=False", "DataConfig.utterances is 4, and rows are not packed; expected pack = True"),
        ("encode_once=True", "expected one of both"),
        ("pack='yes'", "DataConfig.pack is 'yes', expected True or False"),
        ("stages={0: 'demo_speech'}", "DataConfig.stages: a step is 0, expected a whole number"),
        ("stages={5: 'demo_spech'}", "'demo_spech' is registered; did you mean 'demo_speech'?"),
        ("stages={5: 7}", "DataConfig.stages has 7 at step 5, expected steps and names"),
        ("stages=[5]", "DataConfig.stages is [5], expected steps and names"),
        ("buckets=(22528,)", "this one packs, expected no buckets"),
        ("buckets=22528", "DataConfig.buckets is 22528, expected a list of samples"),
        ("max_bad_share='x'", "DataConfig.max_bad_share is 'x', expected a number from 0 to 1"),
        ("max_bad_share=5", "DataConfig.max_bad_share is 5, expected a number from 0 to 1"),
        ("seed='x'", "DataConfig.seed is 'x', expected a whole number"),
    ],
)
def test_settings_that_do_not_fit(
    clean_registries, workshop, recipe, tmp_path, monkeypatch, binding, sentence
):
    monkeypatch.setenv("SLM_CACHE_DIR", str(workshop.folder / "cache"))
    bindings = workshop.bindings(tmp_path / "run", 4, (*PACKED, f"run.DataConfig.{binding}"))
    gin_config.parse([str(recipe)], bindings)
    with pytest.raises(UserError, match=re.escape(sentence)):
        Wiring(gin_config.build(Run)).train_batches()


def test_a_group_of_commands_names_its_own(capsys):
    for asked, sentence in (
        (["data"], "a command is missing"),
        (["data", "row"], "no command 'data row'; did you mean 'data rows'?"),
    ):
        assert main(asked) == 2
        assert sentence in capsys.readouterr().err
