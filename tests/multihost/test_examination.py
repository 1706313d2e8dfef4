"""Phases of one process, and how what several have found is judged."""

import shutil
from pathlib import Path

import jax
import pytest
from several import Several

from slm_jax.errors import UserError
from slm_jax.multihost import bandwidth, clocks, devices, shared_storage
from slm_jax.multihost.examination import Verdict, by_value, differing
from slm_jax.multihost.versions import source_fingerprint, versions
from slm_jax.partitioning.mesh import MESH_AXES, make_mesh


class LocalFiles:
    """Files of a folder, of which some are not to be seen or come back changed."""

    def __init__(self, hidden: str = "none", changed: str = "none"):
        self._hidden, self._changed = hidden, changed

    def write(self, path, data):
        Path(path).write_bytes(data)

    def read(self, path):
        if path.endswith(self._hidden):
            raise FileNotFoundError(2, "No such file", path)
        return Path(path).read_bytes()[:: -1 if path.endswith(self._changed) else 1]

    def remove(self, path):
        Path(path).unlink()

    def nearest(self, directory):
        return directory

    def free(self, path):
        return shutil.disk_usage(path).free


def test_a_phase_tells_what_it_found():
    examination = Several(1)
    assert examination.examine("x", lambda: 3, lambda found: Verdict(f"found {found}")) == [3]
    assert examination.said == ["x             ok: found [3]"] and not examination.problems


def test_a_phase_that_fails_tells_the_mistake_and_goes_on(capsys):
    examination = Several(1)

    def mistake():
        raise UserError("--flag is 'x'")

    def bug():
        raise LookupError("no such thing\nat all")

    for look in (mistake, bug):
        assert examination.examine("x", look, lambda found: Verdict("fine")) is None
    assert examination.said == [
        "x             failed: process 0 of 1: --flag is 'x'",
        "x             failed: process 0 of 1: LookupError: no such thing",
    ]
    assert examination.problems[0] == "x: process 0 of 1: --flag is 'x'"
    assert "Traceback" in capsys.readouterr().err
    assert examination.place() is None


def test_a_place_is_the_phase_however_busy():
    examination = Several(1)
    with examination.phase("storage"):
        before = examination.place()
        examination.at("reads from /x")
        after = examination.place()
    assert before and after and before.mark == after.mark
    assert after.what == "'storage' (reads from /x)"


def test_values_are_told_with_those_who_have_them():
    names = Several(3).names
    assert by_value({0: "a", 1: "b", 2: "a"}, names) == [
        "process 0 of 3 and process 2 of 3: a",
        "process 1 of 3: b",
    ]
    assert differing("jax", ["1", "2", "2"], names) == (
        "jax is 2 on process 1 of 3 and process 2 of 3, 1 on process 0 of 3"
    )
    assert differing("jax", ["1", "1"], names) is None


def test_clocks():
    close = clocks.judge(Several(3), [[1.0, 2.0, 3.0], [3.0, 2.2, 3.1], [0.9, 1.9, 2.9]])
    assert close == Verdict("at most 0.10 s from that of process 0")
    far = clocks.judge(Several(3), [[1.0, 2.0, 3.0], [6.0, 8.2, 8.1], [-1.0, 0.0, 1.0]])
    assert far.problems == [
        "the clock of process 1 of 3 and process 2 of 3 is 5.0 s ahead of that of process 0 of 3, "
        "process 1 of 3 most; expected at most 1 s (is NTP running?)"
    ]


def test_devices_of_all_processes():
    def found(platform="gpu", kind="H100", local=8, total=16, processes=2):
        return {
            "platform": platform,
            "kinds": [[kind, local]],
            "local": local,
            "global": total,
            "processes": processes,
        }

    def problems(*all_found):
        return devices.judge(Several(2), [*all_found]).problems

    assert not problems(found(), found())
    (fallen,) = problems(found(), found("cpu", "cpu", 1))
    assert fallen.startswith("process 1 of 2 has nothing but CPUs where others have gpu")
    (kinds,) = problems(found(), found(kind="A100"))
    assert kinds == "the devices of a process is 8 x H100 on process 0 of 2, 8 x A100 on process 1 of 2"
    (alone,) = problems(found(total=8), found())
    assert alone == "JAX counts 8 devices on process 0 of 2, expected 16, the sum of all"


def test_the_source_has_a_fingerprint(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "gin").mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("1")
        (tmp_path / folder / "gin" / "y.gin").write_text("A = 1")
        (tmp_path / folder / f"{folder}.pyc").write_text(folder)
    assert source_fingerprint(tmp_path / "a") == source_fingerprint(tmp_path / "b")
    (tmp_path / "b" / "gin" / "y.gin").write_text("A = 2")
    assert source_fingerprint(tmp_path / "a") != source_fingerprint(tmp_path / "b")
    assert versions({"XLA_FLAGS": "--x"})["XLA_FLAGS"] == "--x" and versions({})["XLA_FLAGS"] == "not set"
    assert versions({})["jax"] == jax.__version__


@pytest.mark.parametrize("axis", MESH_AXES)
def test_a_sum_over_each_axis_is_right(axis):
    measured = bandwidth.all_reduce(make_mesh(data=2, fsdp=1, tensor=2, slices=2), axis, 4 * 1000)
    assert measured.seconds > 0 and measured.wrong == []


def test_a_wrong_sum_is_found(monkeypatch):
    monkeypatch.setattr(jax.lax, "psum", lambda part, axis: jax.lax.pmax(part, axis))
    measured = bandwidth.all_reduce(make_mesh(), "data", 64)
    assert len(measured.wrong) == 8


def test_a_directory_that_works(tmp_path):
    examination = Several(1)
    shared_storage.examine_storage(examination, LocalFiles(), str(tmp_path))
    assert examination.said[0].startswith(
        f"storage       ok: {tmp_path} is written and read by all; the slowest"
    )
    assert not [*tmp_path.iterdir()]


def test_a_directory_that_cannot_be_written(tmp_path):
    examination = Several(1)
    folder = tmp_path / "missing"
    shared_storage.examine_storage(examination, LocalFiles(), str(folder))
    assert examination.problems == [
        f"storage: process 0 of 1: cannot write to {folder}: No such file or directory"
    ]


def test_a_directory_that_gives_back_other_bytes(tmp_path):
    examination = Several(1)
    shared_storage.examine_storage(examination, LocalFiles(changed="_bulk"), str(tmp_path))
    assert examination.problems == [
        f"storage: process 0 of 1: read other bytes in {tmp_path} than were written there"
    ]


def test_a_directory_that_shows_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_storage, "_SEEN_SECONDS", 0.0)
    examination = Several(1)
    shared_storage.examine_storage(examination, LocalFiles(hidden="_0"), str(tmp_path))
    assert examination.problems == [
        f"storage: process 0 of 1 does not see what process 0 of 1 wrote in {tmp_path}; expected a directory "
        "that all hosts share"
    ]


def test_a_directory_that_cannot_be_looked_for(tmp_path, capfd):
    class Stale(LocalFiles):
        def nearest(self, directory):
            raise OSError(116, "Stale file handle")

    class Company(Several):
        """Two processes, of which the other one finds all well."""

        def gathered(self, value):
            waited.append(value)
            return [value, {"found": other} if isinstance(value, dict) else False]

    waited = []
    other = {"directory": str(tmp_path), "error": None, "unseen": [], "free": 1}
    examination = Company(2)
    shared_storage.examine_storage(examination, Stale(), str(tmp_path))
    assert examination.problems == [f"storage: process 0 of 2: cannot look for {tmp_path}: Stale file handle"]
    # It comes to all four places where the others wait.
    assert len(waited) == 4 and "Traceback" not in capfd.readouterr().err
