"""The gin examples of docs/sources.md name classes and arguments that exist."""

import re
from pathlib import Path

import gin
import pytest

from slm_jax.cli import gin_config
from slm_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(r"^```gin\n(.*?)^```", (ROOT / "docs" / "sources.md").read_text("utf-8"), re.M | re.S)
IMPORTS = """
from __gin__ import dynamic_registration
from slm_jax.data import sources
from slm_jax.tasks import asr
"""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split()[0])
def test_examples_parse(tmp_path: Path, block: str):
    (tmp_path / "a.gin").write_text(block if "__gin__" in block else IMPORTS + block)
    macros = "REGISTER_TASKS" in block
    (tmp_path / "b.gin").write_text(f"include 'runs/common.gin'\ninclude '{tmp_path}/a.gin'\n")
    gin_config.parse([str(tmp_path / ("b.gin" if macros else "a.gin"))])
    names = re.findall(r"sources\.(\w+)", block)
    assert names
    assert all(name in gin.config_str() for name in names)


def test_a_wrong_argument_is_found(tmp_path: Path):
    (tmp_path / "a.gin").write_text(IMPORTS + "sources.TableSource.tabels = {}")
    with pytest.raises(UserError, match="tabels"):
        gin_config.parse([str(tmp_path / "a.gin")])
