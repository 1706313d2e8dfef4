"""RunCheckpoints: what is kept, what is refused, what survives."""

import dataclasses
import json
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.manager import RunCheckpoints, claim_run_directory
from slm_jax.checkpoints.provenance import FORMAT_VERSION, make_provenance
from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.state import DataCursor, TrainState

PROVENANCE = make_provenance(
    "lr = 1",
    {"plan": "p1", "foundation/llm": "f1", "tokenizer/targets": "t1", "templates/asr": "a1"},
)


def make_state(rng: np.random.Generator, sharding=None, width: int = 8) -> TrainState:
    params = {"adapter": {"kernel": rng.normal(size=(16, width)).astype(np.float32)}}
    state = TrainState(
        jnp.int32(3), jax.tree.map(jnp.asarray, params), {"mu": jax.tree.map(jnp.asarray, params)}
    )
    if sharding is None:
        return state
    return jax.tree.map(
        lambda x: jax.device_put(x, sharding if x.ndim else NamedSharding(sharding.mesh, PartitionSpec())),
        state,
    )


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_all(
    checkpoints: RunCheckpoints, state: TrainState, steps: dict[int, dict[str, float] | None]
) -> None:
    for step, metrics in steps.items():
        assert checkpoints.save(step, state, DataCursor(step * 4, "p1"), PROVENANCE, metrics)
        checkpoints.wait()


def test_restores_onto_another_mesh(tmp_path, rng):
    many = make_mesh(data=2, fsdp=2, tensor=2)
    state = make_state(rng, NamedSharding(many, PartitionSpec("fsdp", "tensor")))
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {5: None})
    checkpoints.close()

    other = make_mesh(data=1, fsdp=8)
    target = make_state(rng, NamedSharding(other, PartitionSpec("fsdp", None)))
    restored = RunCheckpoints(tmp_path).restore(abstract(target), PROVENANCE)
    assert restored is not None
    assert restored.step == 5
    assert restored.cursor == {"rows_consumed": 20, "fingerprint": "p1", "anchor": None, "skipped": []}
    assert restored.notes == []
    kernel = restored.state.params["adapter"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", None)
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)


def test_nothing_saved_restores_nothing(tmp_path, rng):
    assert RunCheckpoints(tmp_path).restore(abstract(make_state(rng)), PROVENANCE) is None


def test_keeps_the_last_and_the_best_at_once(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path, keep_last=2, keep_best=2, best_metric="wer")
    scores = {1: {"wer": 0.5}, 2: {"wer": 0.1}, 3: None, 4: {"wer": 0.3}, 5: {"wer": 0.9}, 6: None}
    save_all(checkpoints, state, scores)
    assert checkpoints.all_steps() == [2, 4, 5, 6]
    assert checkpoints.best_step() == 2
    checkpoints.close()
    # A later process knows the metrics of checkpoints that it did not save itself.
    again = RunCheckpoints(tmp_path, keep_last=1, keep_best=1, best_metric="wer", best_mode="min")
    save_all(again, state, {7: {"wer": 0.2}})
    assert again.all_steps() == [2, 7]


def test_best_mode_max_and_nan(tmp_path, rng):
    checkpoints = RunCheckpoints(tmp_path, keep_last=1, keep_best=1, best_metric="bleu", best_mode="max")
    save_all(
        checkpoints, make_state(rng), {1: {"bleu": 3.0}, 2: {"bleu": 7.0}, 3: {"bleu": float("nan")}, 4: None}
    )
    assert checkpoints.all_steps() == [2, 4]


def test_restores_params_alone(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None})
    params = checkpoints.restore_params(abstract(state).params)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    with pytest.raises(UserError, match="holds no checkpoint of step 9"):
        checkpoints.restore_params(abstract(state).params, step=9)
    with pytest.raises(UserError, match=r"kernel has shape \[16, 8\], this model's has \[16, 4\]"):
        checkpoints.restore_params(abstract(make_state(rng, width=4)).params)


@pytest.mark.parametrize("name", ["plan", "foundation/llm", "tokenizer/targets", "templates/asr"])
def test_another_fingerprint_is_refused_by_name(tmp_path, rng, name):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None})
    other = dataclasses.replace(PROVENANCE, fingerprints={**PROVENANCE.fingerprints, name: "other"})
    with pytest.raises(UserError, match=f"made with another {name}"):
        checkpoints.restore(abstract(state), other)
    # The plan differs with whatever its rows are made of, which is what should be named.
    other.fingerprints["plan"] = "other"
    with pytest.raises(UserError, match=f"made with another {name}"):
        checkpoints.restore(abstract(state), other)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("lr = 2\nnew.rate = 3", r"another plan \(lr was 1 and is 2, new.rate was not set and is 3\)"),
        (
            "# lr = 3\nfrom a import b\nlr = \\\n    {'a': 1,\n     'b': 2}",
            r"lr was 1 and is \{'a': 1, 'b': 2\}\)",
        ),
        ("", r"another plan \(lr was 1 and is not set\)"),
        ("lr = 1", r"another plan \(the configuration is the same, so what its tasks read has changed\)"),
    ],
)
def test_why_a_plan_is_another_is_told_as_far_as_the_configuration_tells(tmp_path, rng, config, told):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None})
    changed = PROVENANCE.fingerprints | {"plan": "other"}
    with pytest.raises(UserError, match=told):
        checkpoints.restore(
            abstract(state), dataclasses.replace(PROVENANCE, config=config, fingerprints=changed)
        )


@pytest.mark.parametrize(
    ("name", "needed"), [("plan", False), ("templates/asr", False), ("foundation/llm", True)]
)
def test_a_trained_model_is_used_with_other_data_and_prompts(tmp_path, rng, name, needed):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None})
    other = dataclasses.replace(PROVENANCE, fingerprints={**PROVENANCE.fingerprints, name: "other"})
    if needed:
        with pytest.raises(UserError, match=f"made with another {name}"):
            checkpoints.restore_params(abstract(state).params, other)
    else:
        params = checkpoints.restore_params(abstract(state).params, other)
        jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_other_versions_and_configuration_are_notes(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None})
    other = dataclasses.replace(PROVENANCE, config="lr = 2", packages={**PROVENANCE.packages, "jax": "9.9"})
    restored = checkpoints.restore(abstract(state), other)
    assert restored is not None
    assert restored.notes == [f"jax was {jax.__version__}, is 9.9", "the configuration has changed"]


def test_another_model_is_refused_with_the_parameter_named(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None})
    with pytest.raises(
        UserError, match=r"opt_state/mu/adapter/kernel has shape \[16, 8\], this model's has \[16, 6\]"
    ):
        checkpoints.restore(abstract(make_state(rng, width=6)), PROVENANCE)
    renamed = state._replace(params={"adapter": {"kernle": state.params["adapter"]["kernel"]}})
    with pytest.raises(UserError, match="holds parameter params/adapter/kernel, which this model lacks"):
        checkpoints.restore(abstract(renamed), PROVENANCE)


def test_a_newer_format_is_refused(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    newer = dataclasses.replace(PROVENANCE, format_version=FORMAT_VERSION + 1)
    assert checkpoints.save(1, state, DataCursor(0, "p1"), newer)
    checkpoints.wait()
    with pytest.raises(UserError, match="newer release"):
        checkpoints.restore(abstract(state), PROVENANCE)


def test_a_half_written_checkpoint_is_not_taken(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None, 2: None})
    checkpoints.close()
    # What a killed save leaves behind: the folder under its temporary name.
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    again = RunCheckpoints(tmp_path)
    assert again.all_steps() == [1]
    restored = again.restore(abstract(state), PROVENANCE)
    assert restored is not None and restored.step == 1


def test_damage_is_told_in_one_sentence(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, state, {1: None})
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.restore(abstract(state), PROVENANCE)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no run of slm_jax"):
        RunCheckpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="choose an empty or a new directory"):
        claim_run_directory(tmp_path / "run")
    with pytest.raises(UserError, match="cannot write run directory"):
        claim_run_directory(tmp_path / "run" / "below")


def test_a_newer_run_directory_is_refused(tmp_path):
    claim_run_directory(tmp_path)
    assert claim_run_directory(tmp_path) == Path(tmp_path)
    (tmp_path / "slm_run.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(UserError, match="newer release"):
        claim_run_directory(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"keep_last": 0}, {"keep_best": 1}, {"keep_best": 1, "best_metric": "wer", "best_mode": "low"}],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options):
    with pytest.raises(UserError):
        RunCheckpoints(tmp_path, **options)


def test_a_save_does_not_tell_jax_that_the_run_is_at_an_earlier_step(tmp_path, rng, monkeypatch):
    asked = []
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: bool(asked.append(step))
    )
    checkpoints = RunCheckpoints(tmp_path)
    save_all(checkpoints, make_state(rng), {1: None})
    checkpoints.close()
    assert checkpoints.all_steps() == [1] and asked == []


def test_a_save_that_fails_because_a_process_is_lost_is_no_mistake_of_the_user(tmp_path, rng, monkeypatch):
    def lose(*args, **options):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    checkpoints = RunCheckpoints(tmp_path)
    for method, call in (
        ("save", lambda: save_all(checkpoints, make_state(rng), {1: None})),
        ("wait_until_finished", checkpoints.wait),
    ):
        monkeypatch.setattr(checkpoints._manager, method, lose)
        # A launcher starts the run again after anything but a mistake.
        with pytest.raises(jax.errors.JaxRuntimeError):
            call()


# Orbax writes several arrays at a time and asks for the outcome of the first that fails alone: Python then
# complains about the other failures when their futures are collected.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_sentence_and_spares_earlier_checkpoints(tmp_path, rng):
    state = make_state(rng)
    checkpoints = RunCheckpoints(tmp_path, keep_last=1)
    save_all(checkpoints, state, {1: None})
    big = state._replace(params={"adapter": {"kernel": jnp.asarray(rng.normal(size=(512, 512)))}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writes past the limit fail with an error of the operating system, as they do on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(UserError, match="cannot save a checkpoint") as failure:
            checkpoints.save(2, big, DataCursor(0, "p1"), PROVENANCE)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(failure.value)
    again = RunCheckpoints(tmp_path, keep_last=1)
    assert again.all_steps() == [1]
    restored = again.restore(abstract(state), PROVENANCE)
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)
