"""Launchers as processes of their own."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class Started(list[subprocess.Popen]):
    """The processes of a test, which run in its folder.

    Args:
      folder: of the test.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
        """Starts a command; what it writes is one text, of both streams."""
        process = subprocess.Popen(
            command, cwd=self._folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.append(process)
        return process


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output = process.communicate(timeout=60)[0]
    return process.returncode, output
