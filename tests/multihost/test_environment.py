"""Who says which process of how many this is, and what is refused of it."""

import http.server
import threading

import pytest

from slm_jax.errors import UserError
from slm_jax.multihost import environment
from slm_jax.multihost.environment import Processes, find_processes

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_nothing_said_is_one_process():
    assert find_processes(environ={}) == Processes()


def test_flags_win_over_variables_and_these_over_slurm():
    variables = {
        **SLURM,
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_NUM_PROCESSES": "3",
        "JAX_PROCESS_ID": "2",
    }
    assert find_processes("b:2", 2, 1, variables) == Processes(2, 1, "b:2", found="flags")
    assert find_processes(environ=variables) == Processes(3, 2, "a:1", found="environment variables")
    # An address alone goes with what Slurm tells.
    found = find_processes("c:3", environ=SLURM)
    assert (found.count, found.index, found.coordinator, found.found) == (4, 3, "c:3", "Slurm")


def test_slurm_names_its_first_node_and_a_port_of_the_job():
    found = find_processes(environ=SLURM)
    assert found == Processes(4, 3, f"gpu07:{61440 + 70001 % 4096}", None, "Slurm")
    assert find_processes(environ={**SLURM, "JAX_COORDINATOR_PORT": "99"}).coordinator == "gpu07:99"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"),
        ("a,b", "a"),
        ("node[001-004,9],x", "node001"),
        ("node[7,9]", "node7"),
        ("rack[1-2]n[3-8]", "rack1n3"),
        ("n[1-2]-ib", "n1-ib"),
        ("host-a,host-b", "host-a"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    address = find_processes(environ={**SLURM, "SLURM_STEP_NODELIST": nodes}).coordinator
    assert address == f"{first}:{61440 + 70001 % 4096}"


def test_a_batch_script_that_starts_no_step_is_one_process():
    script = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert find_processes(environ=script) == Processes()


def test_one_task_a_node_takes_all_its_gpus():
    alone = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}
    assert find_processes(environ={**alone, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices is None


@pytest.mark.parametrize(
    ("visible", "tasks", "own"),
    [("0,1", "2(x2)", (1,)), ("0,1,2,3", "1,2,1", (2, 3)), ("5", "2(x2)", None), ("", "2(x2)", None)],
)
def test_several_tasks_of_a_node_share_the_gpus_that_all_of_them_see(visible, tasks, own):
    environ = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": visible}
    assert find_processes(environ=environ).local_devices == own


def test_gpus_that_cannot_be_shared_are_refused():
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES names 3 GPUs for 2 processes"):
        find_processes(environ={**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "MPI"),
    ],
)
def test_mpi_tells_all_but_the_coordinator(environ, found):
    with pytest.raises(UserError, match=f"{found}: process 1 of 2 without a coordinator"):
        find_processes(environ=environ)
    environ = {**environ, "JAX_COORDINATOR_ADDRESS": "a:1"}
    assert find_processes(environ=environ) == Processes(2, 1, "a:1", None, found)


def test_a_pod_of_gke(monkeypatch):
    monkeypatch.setattr(environment, "_has_tpus", lambda: True)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,other",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert find_processes() == Processes(4, 3, "localhost:8482", found="Cloud TPU")


def test_a_pod_of_tpu_machines(monkeypatch):
    metadata = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "w0:1:127.0.0.1,w1:2:127.0.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5e-8'\n",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = metadata.get(self.path.rpartition("/")[2])
            asked = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if asked and found is not None else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(environment, "_has_tpus", lambda: True)
        monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
        # `slm plan` sets it for a machine without TPUs.
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        found = find_processes()
        server.shutdown()
    assert found == Processes(2, 1, "127.0.0.1:8482", found="Cloud TPU")


@pytest.mark.parametrize(
    ("flags", "environ", "sentence"),
    [
        (("a:1", 2, None), {}, "--num_processes is given without --process_id"),
        ((None, None, 1), {}, "--process_id is given without --num_processes"),
        (("a:1", None, None), {}, "--coordinator_address is given alone"),
        (("a:1", 2, 2), {}, "flags: process 2 of 2, expected a process from 0 to 1"),
        (("a:1", 0, 0), {}, "flags: process 0 of 0"),
        (("a:1", 2, -1), {}, "flags: process -1 of 2"),
        ((None, 2, 0), {}, "without a coordinator"),
        (("a", 2, 0), {}, "coordinator 'a', expected HOST:PORT"),
        (("a:port", 2, 0), {}, "coordinator 'a:port', expected HOST:PORT"),
        (("a:70000", 2, 0), {}, "coordinator 'a:70000'"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is given without JAX_PROCESS_ID"),
        (
            (None, None, None),
            {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "is 'two', expected a whole",
        ),
    ],
)
def test_what_is_not_whole_is_refused(flags, environ, sentence):
    with pytest.raises(UserError, match=sentence):
        find_processes(*flags, environ=environ)


def test_loopback():
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]"):
        assert Processes(2, 0, f"{host}:80").on_loopback
    for host in ("10.0.0.1", "node0", "[fe80::1]"):
        assert not Processes(2, 0, f"{host}:80").on_loopback
