"""Imports every module of the named rooms of slm_jax from this checkout; runs in any environment."""

import importlib
import pkgutil
import sys
from pathlib import Path


def import_rooms(rooms: list[str]) -> list[str]:
    """Imports the rooms and all that is in them; returns the names of the modules."""
    imported = []
    for room in rooms:
        package = importlib.import_module(f"slm_jax.{room}")
        imported.append(package.__name__)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
            imported.append(module.name)
    return imported


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    print(f"imported {len(import_rooms(sys.argv[1:]))} modules of {', '.join(sys.argv[1:])}")
