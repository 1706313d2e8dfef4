"""What a checkpoint was made from, and whether a run may go on from it."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slm_jax.errors import UserError

# Raised by one whenever older code could not read what is written; newer code keeps reading older ones.
FORMAT_VERSION = 1

PACKAGES = ("slm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


@dataclass(frozen=True)
class Provenance:
    """The record that lies beside every saved state.

    Attributes:
      format_version: of the checkpoint.
      packages: package name -> version.
      config: the operative configuration as text.
      fingerprints: what must be the same to go on: `plan`, `tokenizer/<feature>`, `templates/<task>`,
        one entry for each frozen checkpoint (`foundation/llm`), and whatever else a run depends on.
    """

    format_version: int = FORMAT_VERSION
    packages: dict[str, str] = field(default_factory=dict)
    config: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as plain dictionaries."""
        return dataclasses.asdict(self)


def make_provenance(config: str, fingerprints: Mapping[str, str]) -> Provenance:
    """The record of the run at hand, with the versions of the packages installed here."""
    return Provenance(FORMAT_VERSION, package_versions(), config, dict(fingerprints))


def _changes(before: str, now: str) -> str:
    """What of a configuration in gin's words has changed, as far as it may be why a plan has."""
    old, new = _bindings(before), _bindings(now)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if changed:
        told = [
            f"{name} was {old.get(name, 'not set')} and is {new.get(name, 'not set')}" for name in changed
        ]
        return f" ({', '.join(told[:3])}{', and more' * (len(told) > 3)})"
    if before and now:
        return " (the configuration is the same, so what its tasks read has changed)"
    return ""


def _bindings(config: str) -> dict[str, str]:
    """Names and values of gin bindings, each value as one line."""
    found: dict[str, str] = {}
    name = None
    for line in config.splitlines():
        if line.startswith((" ", "\t")) and name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
        elif not line.startswith(("#", "from ", "import ")) and " = " in line:
            name, _, value = line.partition(" = ")
            found[name] = value.strip().removesuffix("\\").strip()
        else:
            name = None
    return found


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a step computes; one that is not installed is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_provenance(record: Mapping[str, Any], where: str) -> Provenance:
    """Reads a record back.

    Raises:
      UserError: a newer release of this project wrote it.
    """
    check_format_version(record.get("format_version"), where)
    known = {item.name for item in dataclasses.fields(Provenance)}
    return Provenance(**{name: value for name, value in record.items() if name in known})


def check_format_version(found: object, where: str) -> None:
    """Raises UserError unless `found` is a format version that this release reads."""
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{where}: format_version is {found!r}, expected a number from 1 to {FORMAT_VERSION}")
    if found > FORMAT_VERSION:
        raise UserError(
            f"{where}: format_version is {found}, this release reads up to {FORMAT_VERSION}; "
            "a newer release of slm_jax wrote it"
        )


def check_provenance(saved: Provenance, current: Provenance, where: str) -> list[str]:
    """Decides whether a run may go on from a checkpoint.

    Args:
      saved: the checkpoint's record.
      current: the record of the run at hand.
      where: the checkpoint, for the message.

    Returns:
      Differences that are allowed and belong into the log: package versions and configuration.

    Raises:
      UserError: a fingerprint differs, is missing, or is new; the first one is named.
    """
    # The plan last: it differs whenever the data does, and another name says why.
    names = saved.fingerprints.keys() | current.fingerprints.keys()
    for name in sorted(names, key=lambda name: (name == "plan", name)):
        before, now = saved.fingerprints.get(name), current.fingerprints.get(name)
        if before != now:
            why = _changes(saved.config, current.config) if name == "plan" else ""
            raise UserError(
                f"{where} was made with another {name}{why}: it has fingerprint {before or 'none'}, "
                f"this run has {now or 'none'}; go back to the same {name} or train in a new directory"
            )
    notes = []
    for name in sorted(saved.packages.keys() | current.packages.keys()):
        before, now = saved.packages.get(name, "none"), current.packages.get(name, "none")
        if before != now:
            notes.append(f"{name} was {before}, is {now}")
    if saved.config != current.config:
        notes.append("the configuration has changed")
    return notes
