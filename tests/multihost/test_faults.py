"""The campaign of `benchmarks/faults.py` in short, and that it would tell."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


def may_mount(folder: Path) -> bool:
    """Whether a file system of a run's own can be full or stand still here."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            return False
    except OSError:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return os.geteuid() == 0


def test_runs_that_are_hit_go_on_as_if_they_were_not(faults, tmp_path, rng, capfd, monkeypatch):
    # Every other layout is a program more to compile.
    monkeypatch.setattr(faults, "LAYOUTS", (faults.LAYOUTS[0], faults.LAYOUTS[3]))
    # A save without room elsewhere is that of tests/checkpoints/test_failing_save.py.
    last = "full_disk" if may_mount(tmp_path / "mounted") else "kill_all"
    kinds = ["lost_host", "damage", "term_all", "kill_one", last]
    log = tmp_path / "log.jsonl"
    words = [
        *("--runs", str(len(kinds)), "--seed", str(int(rng.integers(1 << 30))), "--faults", ",".join(kinds)),
        *("--heartbeat", "4", "--pause", "0.02", "--jobs", "3"),
        *("--log", str(log), "--folder", str(tmp_path)),
        *("--compiled", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(tmp_path / "compiled")),
    ]
    status = faults.main(words)
    found = capfd.readouterr()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert status == 0, found.err
    assert sorted(record["fault"] for record in records) == sorted(kinds)
    assert all(record["struck"] for record in records)
    by_fault = {record["fault"]: record for record in records}
    assert by_fault["damage"]["damage"]
    assert found.out.count("\n| ") == len(kinds) + 1
    # Once more it has nothing left to do, and tells the same.
    assert faults.main(words) == 0
    assert capfd.readouterr().out.splitlines()[-1] == found.out.splitlines()[-1]


def test_what_is_not_as_it_should_be_is_told(faults, tmp_path):
    layout = faults.LAYOUTS[2]
    plan = faults.Planned(0, "kill_one", "step", layout, layout, 5, 0.5, 1, 1.0, ("flip", 1))
    fault = faults.Fault(plan, "step", 1.0, at=1.0, killed={1})
    lost = "slm: process 1 of 2 (host a) is lost: no sign of life for 20 s; process 0 of 2 (host a) ends, too"

    def ended(statuses, logs, seconds=21.0, saved=(3,), began=0, hangs=()):
        return faults.Attempt(layout, list(statuses), list(logs), began, seconds, list(hangs), list(saved), 5)

    assert faults.check_ends(plan, ended((76, -9), (lost, "")), fault) == []
    assert faults.check_ends(plan, ended((76, -9), ("", "")), fault)
    assert faults.check_ends(plan, ended((2, -9), (lost, "")), fault)
    assert faults.check_ends(plan, ended((76, -9), (lost, ""), seconds=31.0), fault)
    assert faults.check_ends(plan, ended((-9, -9), (lost, ""), hangs=(0,)), fault)
    struck = ended((76, -9), (lost, ""))
    last = ended((0, 0), ("", ""), began=3)
    assert faults.check_restored(plan, struck, last, 2, 3) == []
    assert faults.check_restored(plan, struck, ended((0, 0), ("", "")), 5, 3)
    assert faults.check_restored(plan, struck, last, 7, 3)

    # Curves: one bit, another example, a step that is not there.
    campaign = faults.Campaign(None, tmp_path, 2, 3, 0, 0.0, 4)
    whole = {"losses": {1: 0.5, 2: 0.25}, "ids": {1: {"0": ["a"]}, 2: {"0": ["b"]}}}

    (tmp_path / "steps.1.jsonl").write_text("")

    def curve(lines):
        (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        problems = []
        faults.check_curve(campaign, tmp_path, plan, [struck], {layout: whole}, problems)
        return problems

    lines = [{"step": 1, "loss": 0.5, "ids": {"0": ["a"]}}, {"step": 2, "loss": 0.25, "ids": {"0": ["b"]}}]
    assert curve(lines) == []
    assert curve([lines[0], {**lines[1], "loss": 0.25000000000000006}])
    assert curve([lines[0], {**lines[1], "ids": {"0": ["c"]}}])
    assert curve(lines[:1])
