"""The launchers that are shell scripts, read by ShellCheck."""

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_sound(script: str):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [str(shellcheck), "--shell=bash", str(LAUNCH / script)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
