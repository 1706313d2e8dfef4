"""Phases that all processes of a run go through together: each looks, and what all have found is judged."""

import contextlib
import json
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from slm_jax.errors import UserError
from slm_jax.multihost import joining
from slm_jax.multihost.environment import Processes
from slm_jax.multihost.hang import Place, names_text


class Verdict(NamedTuple):
    """What a phase says.

    Attributes:
      line: what was found, where all is well.
      problems: a sentence for each.
    """

    line: str
    problems: Sequence[str] = ()


class Examination:
    """One process's part in the phases; each process makes its own, and all call the same phases in order.

    Args:
      say: writes a line; of the first process alone.

    Attributes:
      processes: of the run; told once they are known.
      problems: of all phases until now, the same in all processes.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.processes = Processes()
        self.problems: list[str] = []
        self._say = say
        self._phase, self._detail, self._number = "", "", 0

    def place(self) -> Place | None:
        """Where this process is, for a watchdog: the time of a phase counts, whatever it is busy with."""
        detail = f" ({self._detail})" if self._detail else ""
        return Place(f"{self._phase!r}{detail}", self._phase) if self._phase else None

    def at(self, detail: str) -> None:
        """Says what this process is busy with inside the phase."""
        self._detail = detail

    def name(self, index: int) -> str:
        """Returns `process 1 of 2 (host b)`."""
        company = joining.company()
        return company.name(index) if company else f"process {index} of 1 (host {socket.gethostname()})"

    def names(self, indices: Sequence[int]) -> str:
        """Returns the names of processes, or of some and the number of the others."""
        if len(indices) == self.processes.count > 1:
            return "all processes"
        return names_text(indices, self.name)

    @property
    def hosts(self) -> Sequence[str]:
        """The host of each process."""
        company = joining.company()
        return company.hosts if company else [socket.gethostname()]

    def gathered(self, value: Any) -> list[Any]:
        """Returns the values of all processes in their order; each is what JSON can say."""
        company, detail = joining.company(), self._detail
        if company is None:
            return [value]
        self._number += 1
        self.at(f"{detail}, then waits for the others" if detail else "waits for the others")
        texts = company.gathered(f"examination/{self._number}", json.dumps(value))
        self.at(detail)
        return [json.loads(text) for text in texts]

    def meet(self) -> None:
        """Returns when all processes have called it, in all of them at about the same time."""
        if company := joining.company():
            self._number += 1
            company.meet(f"examination/{self._number}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what happens in a block."""
        self._phase, self._detail = name, ""
        try:
            yield
        finally:
            self._phase, self._detail = "", ""

    def examine(
        self, name: str, look: Callable[[], Any], judge: Callable[[list[Any]], Verdict]
    ) -> list[Any] | None:
        """Goes through a phase.

        Args:
          name: of the phase.
          look: finds something out in this process; what it raises is this process's problem.
          judge: gets what all have found, in the order of processes, and comes to the same in all of them.

        Returns:
          What all have found, or None where there is a problem.
        """
        with self.phase(name):
            found = self.gathered(_looked(look))
        failed = [index for index, one in enumerate(found) if "error" in one]
        if failed:
            said = by_value({index: found[index]["error"] for index in failed}, self.names)
            self.tell(name, Verdict("", said))
            return None
        values = [one["found"] for one in found]
        verdict = judge(values)
        self.tell(name, verdict)
        return None if verdict.problems else values

    def tell(self, name: str, verdict: Verdict) -> None:
        """Writes what a phase says, and keeps its problems."""
        self.problems += [f"{name}: {problem}" for problem in verdict.problems]
        if self.processes.index:
            return
        for problem in verdict.problems:
            self._say(f"{name:<13} failed: {problem}")
        if not verdict.problems:
            self._say(f"{name:<13} ok: {verdict.line}")


def _looked(look: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"found": look()}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:
        # Whatever it is, the others must not wait for this process.
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def by_value(values: dict[int, str], names: Callable[[Sequence[int]], str]) -> list[str]:
    """Returns `NAMES: VALUE` for each value of processes."""
    holders: dict[str, list[int]] = {}
    for index, value in values.items():
        holders.setdefault(value, []).append(index)
    return [f"{names(found)}: {value}" for value, found in holders.items()]


def differing(what: str, values: Sequence[object], names: Callable[[Sequence[int]], str]) -> str | None:
    """Returns `WHAT is A on ..., B on ...` where processes have different values of something, else None."""
    holders: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        holders.setdefault(str(value), []).append(index)
    if len(holders) == 1:
        return None
    # First what most have.
    ranked = sorted(holders.items(), key=lambda entry: -len(entry[1]))
    return f"{what} is " + ", ".join(f"{value} on {names(found)}" for value, found in ranked)
