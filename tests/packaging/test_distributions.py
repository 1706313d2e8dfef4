"""The sdist and the wheel hold all that the command needs, and the wheel works outside the checkout."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
MADE_HERE = {".git", ".venv", ".cache", "runs", "build", "dist"}


def not_source(folder: str, names: list[str]) -> set[str]:
    """What a checkout gathers beside its source; at its top only, as `gin/runs` is source."""
    made = MADE_HERE if Path(folder) == ROOT else set()
    return {name for name in names if name in made or name.endswith(("__pycache__", ".egg-info", "_cache"))}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it, of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=not_source)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", f"{folder}/dist", f"{folder}/source"],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def wanted() -> set[str]:
    """Every module, gin file, task, set of prompts and shipped model, as paths in the package."""
    package = ROOT / "slm_jax"
    files = [path.relative_to(package) for path in package.rglob("*.py")]
    linked = [
        folder / path.relative_to(package / folder)
        for folder, pattern in ((Path("gin"), "*.gin"), (Path("tasks"), "*.py"), (Path("tasks"), "*.json"))
        for path in (package / folder).resolve().rglob(pattern)
        for path in [package / folder / path.relative_to((package / folder).resolve())]
    ]
    models = [path.relative_to(package) for path in (package / "demo/models").rglob("*") if path.is_file()]
    return {f"slm_jax/{path.as_posix()}" for path in {*files, *linked, *models}}


def test_both_distributions_hold_every_module_gin_file_and_task(distributions):
    sdist, wheel = distributions
    names = wanted()
    assert any(name.startswith("slm_jax/tasks/") for name in names)
    assert any(name.endswith(".gin") for name in names)
    assert "slm_jax/tasks/prompts/asr.json" in names
    assert sum(name.endswith("/params.safetensors") for name in names) == 2
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert names <= packed, sorted(names - packed)
    # Nothing else is installed, above all no second top-level `tasks` or `gin`.
    assert {name.split("/")[0] for name in packed} == {"slm_jax", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    with tarfile.open(sdist) as archive:
        released = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", *names} <= released


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps",
            "--target", str(target), str(distributions[1]),
        ],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return target


def outside(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs a command with the installed wheel before all else, far from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_command_works_outside_the_checkout(installed, tmp_path):
    done = outside(installed, tmp_path, sys.executable, str(installed / "bin" / "slm"), "--help")
    assert done.returncode == 0, done.stderr
    for command in ("train", "evaluate", "infer", "export", "demo", "quickstart"):
        assert re.search(rf"^\s+{command}\b", done.stdout, re.MULTILINE), done.stdout


def test_packaged_gin_files_and_tasks_are_found_outside_the_checkout(installed, tmp_path):
    script = (
        "import slm_jax, slm_jax.tasks\n"
        "from slm_jax.tasks.templates import load_templates\n"
        "assert load_templates('asr')['de']\n"
        "from slm_jax.cli.gin_config import find_gin_file, packaged_gin_files\n"
        "print(slm_jax.__file__, slm_jax.tasks.__file__)\n"
        "for name in packaged_gin_files(): print(find_gin_file(name, []))\n"
    )
    done = outside(installed, tmp_path, sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    first, *gin_files = done.stdout.splitlines()
    assert all(Path(path).is_relative_to(installed) for path in [*first.split(), *gin_files])
    assert len(gin_files) == len(list((ROOT / "gin").rglob("*.gin"))) > 0


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9a-z.]+", line) for line in lines), "name==version only"
    assert lines == sorted(lines)
    return dict(line.split("==") for line in lines)


def test_the_lock_pins_every_distribution_that_the_package_requires():
    pins = locked()
    open_requirements = [
        Requirement(text) for text in importlib.metadata.requires("slm_jax") or [] if 'extra == "' not in text
    ]
    open_requirements += [
        Requirement(text.partition(";")[0])
        for text in importlib.metadata.requires("slm_jax") or []
        if re.search(r'extra == "(demo|test|bench)"', text)
    ]
    seen: set[str] = set()
    assert len(open_requirements) > 25
    while open_requirements:
        requirement = open_requirements.pop()
        name = canonical(requirement.name)
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        assert name in pins, f"{name} is required and not locked"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} and {pins[name]}"
        # A local build such as torch 2.13.0+cpu is that release.
        installed = importlib.metadata.version(name).partition("+")[0]
        assert installed == pins[name], f"{name} is {installed} here, the lock says {pins[name]}"
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                open_requirements.append(child)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("protobuf", "<7"), ("sentencepiece", "==0.2.1"), ("pyarrow", "<26"), ("pillow", "<13")],
)
def test_the_lock_avoids_the_known_traps(name: str, allowed: str):
    # pyarrow and pillow: apache-beam, which seqio's cached tasks need beside us, goes no further.
    assert Requirement(f"{name}{allowed}").specifier.contains(locked()[name])
