"""Outlives a process that ends without a word, and says who it was and whether its coordinator is gone.

JAX aborts a process the moment its coordinator is gone, and the kernel kills one that takes too much memory:
neither lets the process say anything. Run as a program, with nothing but the standard library.
"""

import signal
import socket
import subprocess
import sys
from pathlib import Path

# What tells the witness that nothing happened.
_FAREWELL = b"farewell"
_CONNECT_SECONDS = 5.0
# What a client of gRPC says first, with an empty frame of settings; its server answers with its own.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"


class Witness:
    """A small process that looks on.

    Args:
      name: of this process, such as `process 1 of 2 (host b)`.
      coordinator: `host:port`.
      coordinator_name: of the process that holds it.
    """

    def __init__(self, name: str, coordinator: str, coordinator_name: str):
        # Isolated, so that it starts in a moment and nothing of the environment changes what it is.
        command = [sys.executable, "-ISs", str(Path(__file__)), name, coordinator, coordinator_name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)

    def dismiss(self) -> None:
        """This process ends as it should, or has said why it does not."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_FAREWELL)
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            # It is gone, or ends by itself soon after.
            return


def answers(address: str) -> bool:
    """Returns whether the coordinator at `host:port` answers: one that hangs takes connections, too."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS) as connection:
            connection.sendall(_HTTP2_PREFACE)
            return bool(connection.recv(1))
    except OSError:
        return False


def main(name: str, coordinator: str, coordinator_name: str) -> None:
    """Waits for the end of the process that started it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        # These are for the process; whoever sends them to its group means it.
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read().endswith(_FAREWELL):
        return
    if coordinator_name == name:
        why = "it was killed or crashed, and with it goes the coordinator of all"
    elif answers(coordinator):
        why = "it was killed (by the kernel, where memory ran out) or crashed"
    else:
        why = f"{coordinator_name} with the coordinator {coordinator} is lost, and this one ends with it"
    print(f"slm: {name} ended without a word: {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
