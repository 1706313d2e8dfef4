"""An examination of processes that are not there, for what is judged."""

from collections.abc import Sequence

from slm_jax.multihost.environment import Processes
from slm_jax.multihost.examination import Examination


class Several(Examination):
    """Its processes are named without their hosts, and what it says is kept."""

    def __init__(self, count: int, hosts: Sequence[str] | None = None, coordinator: str = "a:1"):
        self.said: list[str] = []
        super().__init__(self.said.append)
        self.processes = Processes(count, 0, coordinator if count > 1 else None, found="flags")
        self._hosts = hosts or "abcdefghijklmnopqrstuvwxyz"[:count]

    @property
    def hosts(self) -> Sequence[str]:
        return self._hosts

    def name(self, index: int) -> str:
        return f"process {index} of {self.processes.count}"
