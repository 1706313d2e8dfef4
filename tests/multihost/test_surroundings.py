"""What a process says of its environment: GPUs hidden, shared or idle, Slurm without srun, proxies."""

import pytest
from several import Several

from slm_jax.multihost.environment import Processes, find_processes
from slm_jax.multihost.surroundings import (
    installed_gpus,
    judge,
    judge_company,
    look_around,
    namesakes,
    shared_gpus,
)

GPUS = [f"GPU-{letter}0" for letter in "abcdefgh"]


def slurm(rank: int, tasks: int, **variables: str) -> dict[str, str]:
    """The environment of a task of a step on one node."""
    return {
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_NODEID": "0",
        **variables,
    }


def around(environ, installed=GPUS):
    return look_around(environ, find_processes(environ=environ), installed)


@pytest.mark.parametrize(
    ("told", "gpus"),
    [
        (None, GPUS),
        ("2,0", ["GPU-c0", "GPU-a0"]),
        ("1,9,2", ["GPU-b0"]),
        ("GPU-d,GPU-e0", ["GPU-d0", "GPU-e0"]),
        ("MIG-1", ["MIG-1"]),
    ],
)
def test_the_gpus_that_cuda_shows(told, gpus):
    environ = {} if told is None else {"CUDA_VISIBLE_DEVICES": told}
    assert around(environ)[:3] == ((), (), tuple(gpus))


@pytest.mark.parametrize("told", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_are_missed(told):
    (problem,) = around({"CUDA_VISIBLE_DEVICES": told}).problems
    assert problem == (
        f"CUDA_VISIBLE_DEVICES is {told!r}, which names no GPU, and 8 GPUs are here; unset it or name them"
    )
    assert not around({"CUDA_VISIBLE_DEVICES": told}, []).problems
    assert not around({"CUDA_VISIBLE_DEVICES": told, "JAX_PLATFORMS": "cpu"}).problems


def test_tasks_that_see_all_gpus_take_their_share():
    visible = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}
    assert around(slurm(1, 4, **visible))[:3] == ((), (), ("GPU-c0", "GPU-d0"))


def test_a_task_with_gpus_of_its_own_takes_all_of_them():
    # Each task sees its four as 0 to 3, the other four of the node belong to the other task.
    own = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_TASK": "4"}
    assert around(slurm(1, 2, **own), GPUS[4:])[:3] == ((), (), tuple(GPUS[4:]))


def test_one_task_that_sees_one_of_eight_gpus():
    environ = slurm(0, 1, CUDA_VISIBLE_DEVICES="0", SLURM_GPUS_ON_NODE="8", SLURM_GPUS_PER_TASK="1")
    (problem,) = around(environ).problems
    assert problem.startswith("Slurm gave this node 8 GPUs for 1 task, and this one takes 1 (CUDA_VISIBLE_")
    assert "7 would idle; expected --gpus-per-task=8" in problem


def test_more_tasks_than_gpus():
    (problem,) = around(slurm(0, 5, CUDA_VISIBLE_DEVICES="0,1", SLURM_GPUS_ON_NODE="2"), GPUS[:2]).problems
    assert problem.startswith(
        "Slurm runs 5 tasks on this node for its 2 GPUs; expected at most one task a GPU"
    )


def test_a_batch_script_without_srun():
    environ = {"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    (problem,) = around(environ, []).problems
    assert problem.startswith("Slurm's job has 16 tasks, and this process was found to be alone")
    assert "`srun slm ...`" in problem
    assert not around(slurm(0, 1), []).problems


def test_proxies_are_noted_where_processes_are_to_meet():
    environ = {"https_proxy": "http://proxy:3128", "http_proxy": "http://proxy:3128", "grpc_proxy": ""}
    processes = Processes(2, 0, "a.pod:1")
    (note,) = look_around(environ, processes, []).notes
    assert note.startswith("https_proxy and http_proxy may keep processes from meeting")
    assert not around(environ, []).notes
    assert look_around({**environ, "no_proxy": "x, a.pods"}, processes, []).notes
    assert not look_around({**environ, "no_proxy": "x, .pod"}, processes, []).notes


def test_names_that_several_machines_have():
    assert namesakes(["a", "a", "b", "b"], ["1", "2", "3", "3"]) == {"a": 2}
    machines = {around({}, []).machine, around({}, []).machine}
    assert len(machines) == 1 and "" not in machines


def test_gpus_that_two_processes_of_a_machine_take():
    hosts, gpus = ["a", "a", "b"], [["0", "1"], ["1"], ["1"]]
    assert shared_gpus(hosts, gpus) == {("a", "1"): [0, 1]}


def test_installed_gpus_are_asked_of_the_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho GPU-1\necho GPU-2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert installed_gpus() == ["GPU-1", "GPU-2"]


def of_each(*machines, **more):
    return [{"problems": [], "notes": [], "gpus": [], "machine": machine, **more} for machine in machines]


def test_what_all_have_found():
    examination = Several(2, coordinator="a:1")
    assert judge(examination, of_each("m", "n")) == ("2 processes, by flags, coordinator a:1", [])
    noted = judge(examination, of_each("m", "m", notes=["http_proxy is set"]))
    assert noted.line == "2 processes, by flags, coordinator a:1; note: http_proxy is set"
    assert judge(examination, of_each("m", "n", problems=["x", "y"])).problems == ["all processes: x; y"]
    assert judge(examination, of_each("m", "n", gpus=["GPU-1"])).problems == []
    (shared,) = judge(examination, of_each("m", "m", gpus=["GPU-1"])).problems
    assert shared.startswith("all processes take the same GPU GPU-1; expected for each its own")


def test_a_coordinator_on_loopback_is_for_one_host():
    examination = Several(2, coordinator="localhost:1")
    assert not judge(examination, of_each("m", "m")).problems
    (problem,) = judge(examination, of_each("m", "n")).problems
    assert problem == (
        "the coordinator localhost:1 leads every host to itself, and there are 2 hosts; expected the address "
        "of process 0's"
    )


def test_machines_of_one_name():
    examination = Several(2, hosts=["localhost", "localhost"])
    assert judge(examination, of_each("m", "n")).line.endswith(
        "; note: 2 machines have the name localhost, which tells nobody which one is meant"
    )


def test_the_hosts_that_are_there():
    assert judge_company(Several(4, hosts="abab")) == ("4 processes on 2 hosts: a, b", ())
    assert judge_company(Several(20)).line.endswith("20 hosts: a, b, c, d, e, f, g, h, ...")
    (problem,) = judge_company(Several(3, hosts="aab")).problems
    assert problem == "host a runs 2 processes and host b 1; expected as many on each"
