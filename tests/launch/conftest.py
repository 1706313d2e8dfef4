"""What the tests of launchers share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import Started


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """Starts processes; those that are left at the test's end are killed."""
    found = Started(tmp_path)
    yield found
    for process in found:
        with process:
            process.kill()
