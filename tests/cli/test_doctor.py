"""`slm doctor` in two real processes: where all is well, where much is not, and where one hangs."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from slm_jax.cli.main import main
from slm_jax.errors import EXIT_LOST, EXIT_MISTAKE

HERE = socket.gethostname()
CODE = "import sys; from slm_jax.cli.main import main; sys.exit(main())"
# Process 1 never gets to see what was written.
HANGING = """if True:
    import sys, time
    from slm_jax.cli import doctor, main
    if sys.argv[-1] == "1":
        doctor._Files.read = lambda self, path: time.sleep(600)
    sys.exit(main.main())
"""
GIN = ["--gin_file", "recipes/quickstart.gin", "--gin.CORPUS_DIR='corpus'", "--gin.MODEL_DIR='run'"]


def examined(
    words: Sequence[str],
    folders: Sequence[Path],
    code: str = CODE,
    environments: Sequence[Mapping[str, str]] = ({}, {}),
    own_words: Sequence[Sequence[str]] = ((), ()),
) -> list[tuple[int, str, str]]:
    """Runs `slm doctor` in two processes, each in its own folder; returns how each ended."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    running = []
    for index, (folder, own, more) in enumerate(zip(folders, environments, own_words, strict=True)):
        flags = ["--coordinator_address", address, "--num_processes", "2", "--process_id", str(index)]
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "doctor", *words, *more, *flags],
                env={
                    **os.environ,
                    "JAX_NUM_CPU_DEVICES": "2",
                    "SLM_CACHE_DIR": str(folders[0] / "cache"),
                    **own,
                },
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *texts) for process, texts in zip(running, told, strict=True)]


def test_all_is_well(tmp_path):
    words = ["--dir", ".", *GIN, "--gin.run.MeshConfig.data=2", "--gin.run.MeshConfig.fsdp=2"]
    found = examined(words, [tmp_path, tmp_path])
    assert [status for status, _, _ in found] == [0, 0], found
    _, out, _ = found[0]
    for line in (
        r"environment +ok: 2 processes, by flags, coordinator localhost:\d+",
        rf"joining +ok: 2 processes on 1 host: {re.escape(HERE)}",
        r"versions +ok: Python .* source of slm_jax [0-9a-f]{12}",
        r"configuration ok: the same for all, SHA-256 [0-9a-f]{12}",
        r"clocks +ok: at most \d",
        r"devices +ok: 4, of each process 2 x cpu \(cpu\)",
        r"mesh +ok: slice=1, data=2, fsdp=2, tensor=1",
        r"all-reduce +ok: 1 MiB a device over data=2 in .* GB/s, .* the sum is exact",
        r"all-reduce +ok: 1 MiB a device over fsdp=2 in .* GB/s, .* the sum is exact",
        rf"storage +ok: {re.escape(str(tmp_path))} is written and read by all;",
        rf"storage +ok: {re.escape(str(tmp_path))} is written by each;",
    ):
        assert re.search(f"(?m)^{line}", out), out
    assert "ok" not in found[1][1] and "failed" not in out
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


def test_what_is_not_the_same_is_named_with_its_process(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    other = tmp_path / "other"
    (other / "optax-99.9.dist-info").mkdir(parents=True)
    (other / "optax-99.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: optax\nVersion: 99.9\n"
    )
    (other / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 60\n")
    for folder in folders:
        folder.mkdir()
    path = os.pathsep.join(filter(None, [str(other), os.environ.get("PYTHONPATH")]))
    found = examined(
        ["--dir", ".", *GIN],
        folders,
        environments=[{}, {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "1"}],
        own_words=[[], ["--gin.LOG_PERIOD=77"]],
    )
    assert [status for status, _, _ in found] == [EXIT_MISTAKE, EXIT_MISTAKE], found
    one, two = (f"process {index} of 2 (host {HERE})" for index in range(2))
    _, out, _ = found[0]
    optax = version("optax")
    for line in (
        "environment   ok: 2 processes, by flags",
        f"versions      failed: optax is {optax} on {one}, 99.9 on {two}",
        f"configuration failed: the configuration of {two} has 'LOG_PERIOD = 77' where that of {one} has",
        f"clocks        failed: the clock of {two} is ",
        f"devices       failed: the devices of a process is 2 x cpu on {one}, 1 x cpu on {two}",
        f"storage       failed: {one} does not see what {two} wrote in {folders[1]}; expected a directory",
    ):
        assert line in out, out
    assert re.search(r"is (60|59)\.\d s ahead of that of process 0", out)
    for _, _, err in found:
        assert (
            f"slm: error: doctor: versions: optax is {optax} on {one}, 99.9 on {two}; and 4 more, named"
            in err
        )
    assert not [*folders[0].iterdir(), *folders[1].iterdir()]


def test_a_phase_that_hangs_is_named_with_the_place_of_every_process(tmp_path):
    found = examined(["--dir", ".", "--timeout", "20"], [tmp_path, tmp_path], HANGING)
    assert [status for status, _, _ in found] == [EXIT_LOST, EXIT_LOST], found
    told = [line for _, _, err in found for line in err.splitlines() if "doctor: no progress for 2" in line]
    assert told, found
    assert f"process 1 of 2 (host {HERE}) is in 'storage' (reads from {tmp_path}) for " in told[0]
    assert (
        f"process 0 of 2 (host {HERE}) is in 'storage' (reads from {tmp_path}, then waits for the others)"
        in told[0]
    )
    for _, _, err in found:
        assert "Thread 0x" in err and "shared_storage.py" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--timeout", "0"], "--timeout is 0.0, expected seconds"),
        (["--gin.X=1"], "--gin.X=1 has no meaning without --gin_file or --run"),
        (["--run", "x", "--gin_file", "y"], "--run is x and --gin_file y, expected one of both"),
        (["--num_processes", "2", "--process_id", "1"], "process 1 of 2 without a coordinator"),
    ],
)
def test_flags_that_do_not_fit(words, sentence, capsys):
    assert main(["doctor", *words]) == EXIT_MISTAKE
    assert sentence in capsys.readouterr().err


def test_alone(tmp_path, capsys):
    words = ["doctor", "--dir", str(tmp_path), "--dir", "ram://bucket/folder", "--profile_steps", "2:3"]
    assert main([*words, "--run", str(tmp_path / "none")]) == EXIT_MISTAKE
    out, err = capsys.readouterr()
    assert "environment   ok: alone" in out and "devices       ok: 8, of each process 8 x cpu (cpu)" in out
    assert f"storage       ok: {tmp_path} is written" in out
    assert "storage       ok: ram://bucket/folder is written and read by all" in out
    assert (
        "slm: error: doctor: configuration: process 0 of 1" in err and "is no run: it does not exist" in err
    )
