"""launch/gke_jobset.py: it prints a JobSet by JobSet's published API, with what a restart needs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

LAUNCHER = Path(__file__).parent.parent.parent / "launch" / "gke_jobset.py"
SLICE = [
    "--name",
    "mine",
    "--image",
    "registry/slm:1",
    "--accelerator",
    "tpu-v5-lite-podslice",
    "--topology",
    "4x4",
]
COMMAND = ["--", "slm", "train", "--gin_file", "mine.gin", "--gin.MODEL_DIR='gs://bucket/mine'"]
ALL_FLAGS = [
    "--slices", "2", "--queue", "multislice-queue", "--priority", "high", "--service_account", "trainer",
    "--spot", "--env", "SLM_CACHE_DIR=/tmp/cache=1", "--save_limit", "30", "--max_restarts", "7",
    "--namespace", "speech",
]  # fmt: skip


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def rendered(*arguments: str) -> dict[str, Any]:
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def known(written: dict[str, Any]) -> dict[str, Any]:
    """What of it the API's types take in; they raise for a value of another type."""
    read = JobsetV1alpha2JobSet.from_dict(written)
    assert read is not None
    return read.to_dict()


@pytest.mark.parametrize("flags", [[], ALL_FLAGS])
def test_it_is_a_jobset_by_the_published_api(flags: list[str]):
    written = rendered(*SLICE, *flags, *COMMAND)
    assert known(written) == written


@pytest.mark.parametrize("broken", ["backOffLimit", "hostNetworks"])
def test_a_field_that_the_api_does_not_know_would_be_noticed(broken: str):
    written = rendered(*SLICE, *COMMAND)
    job = written["spec"]["replicatedJobs"][0]["template"]["spec"]
    (job if broken == "backOffLimit" else job["template"]["spec"])[broken] = 0
    assert known(written) != written


def test_hosts_and_slices_are_counted_from_the_topology():
    def counted(topology: str, *flags: str) -> tuple[int, int, int, int]:
        where = [*SLICE[:-1], topology]
        (replicated,) = rendered(*where, *flags, *COMMAND)["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        chips = job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"]
        return replicated["replicas"], job["parallelism"], job["completions"], chips

    assert counted("4x4") == (1, 4, 4, 4)
    assert counted("4x4", "--slices", "3") == (3, 4, 4, 4)
    assert counted("4x4x8") == (1, 32, 32, 4)
    assert counted("2x4", "--chips_per_host", "8") == (1, 1, 1, 8)
    assert counted("1x1") == (1, 1, 1, 1)


def test_a_mistake_fails_the_set_and_anything_else_restarts_all():
    spec = rendered(*SLICE, *ALL_FLAGS, *COMMAND)["spec"]
    policy = spec["failurePolicy"]
    # Without a rule that matches, JobSet starts all jobs again.
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    assert policy["maxRestarts"] == 7
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"],
        "operator": "In",
        "values": [2],
    }
    # The API server takes a pod failure policy with this alone.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 30


def test_xpk_and_the_scheduler_find_what_they_look_for():
    written = rendered(*SLICE, *ALL_FLAGS, *COMMAND)
    assert written["metadata"]["labels"] == {
        "xpk.google.com/workload": "mine", "kueue.x-k8s.io/queue-name": "multislice-queue"
    }  # fmt: skip
    topology = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert written["metadata"]["annotations"] == {topology: "cloud.google.com/gke-nodepool"}
    template = written["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"]["labels"] == {"xpk.google.com/workload": "mine"}
    assert template["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert [taint["key"] for taint in template["spec"]["tolerations"]] == [
        "google.com/tpu", "cloud.google.com/gke-spot"
    ]  # fmt: skip
    assert (template["spec"]["priorityClassName"], template["spec"]["serviceAccountName"]) == (
        "high",
        "trainer",
    )


def test_a_host_logs_its_environment_without_secrets_and_becomes_the_command(tmp_path: Path):
    command = ["--", "sh", "-c", 'echo "process $$ says $0"; exit 76', "it's quoted"]
    written = rendered(*SLICE, *command)
    (container,) = written["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    process = subprocess.Popen(
        # As Kubernetes hands it on where no variable is meant.
        [word.replace("$$", "$") for word in container["command"]],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TPU_WORKER_ID": "3", "SLM_TOKEN": "hush"},
    )  # fmt: skip
    output = process.communicate(timeout=60)[0]
    # Kubernetes signals the process that it started.
    assert output.endswith(f"process {process.pid} says it's quoted\n") and process.returncode == 76
    assert "TPU_WORKER_ID=3\n" in output and "SLM_TOKEN=(not written)\n" in output and "hush" not in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (SLICE, "a command is missing after --"),
        ([*SLICE[:-1], "16", *COMMAND], "'16' is no topology such as 4x4 or 4x4x8"),
        (["--name", "My_run", *SLICE[2:], *COMMAND], "'My_run' is not made of at most 40 of a-z, 0-9 and -"),
        (
            [*SLICE, "--chips_per_host", "3", *COMMAND],
            "--chips_per_host=3 does not divide the 16 chips of a slice",
        ),
        ([*SLICE, "--env", "A", *COMMAND], "'A' is not of the form NAME=VALUE"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str):
    done = launch(*arguments)
    assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]
