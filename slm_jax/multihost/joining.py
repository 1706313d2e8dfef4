"""Joins the processes of a run, watches that all of them are there, and takes leave of them.

JAX's coordination service sends heartbeats from threads that no lock of Python holds up. What it lacks is a
name for who is lost, and an end in time for the others: by default 100 s, and then an abort.
"""

import contextlib
import errno
import faulthandler
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from slm_jax.errors import EXIT_LOST, EXIT_MISTAKE, RemoteError, UserError, exit_status
from slm_jax.multihost.environment import Processes, proxies_in_the_way
from slm_jax.multihost.witness import Witness, answers

# A process is lost when nothing was heard of it for so long; the others end within 30 s of its death.
HEARTBEAT_SECONDS = 20
# For all processes to meet.
JOIN_SECONDS = 300
# Between looks at whether another process ended.
_LOOK_SECONDS = 2.0
# A process that hears of the end of another one has so long to end by the same cause in its own words.
_OWN_WORDS_SECONDS = 5.0
# From the last of the others' words to its end.
_LAST_WORDS_SECONDS = 1.0
# For all processes to be done.
_LEAVE_SECONDS = 600

# How JAX's runtime and its collectives begin to say what went wrong; memory is this process's own.
_STATUS = re.compile("(?!RESOURCE_EXHAUSTED)[A-Z_]+: ")

# JAX's name for what agrees where to stop.
_PREEMPTION_SERVICE = "jax_enable_preemption_service"
# Where JAX's service listens, if not where it is found.
_BIND_ADDRESS = "JAX_COORDINATOR_BIND_ADDRESS"
_HOSTS = "slm_jax/hosts"
_ENDED = "slm_jax/ended"
_DONE = "done"


class Company:
    """The processes of a run, joined; made by `join`.

    Attributes:
      processes: what was joined.
      hosts: name of the host of each process.
    """

    def __init__(self, processes: Processes, hosts: Sequence[str], client: Any):
        self.processes, self.hosts = processes, tuple(hosts)
        self._client = client
        self._leaving = threading.Event()
        self._ending = threading.Lock()
        assert processes.coordinator is not None
        self._witness = Witness(self.name(processes.index), processes.coordinator, self.name(0))
        for watch in (self._watch_lives, self._watch_ends):
            threading.Thread(target=watch, name=f"slm_jax {watch.__name__}", daemon=True).start()

    def name(self, index: int) -> str:
        """Returns `process 1 of 2 (host b)`."""
        return f"process {index} of {self.processes.count} (host {self.hosts[index]})"

    def tell(self, topic: str, text: str) -> None:
        """Writes down a text for the others, in place of the one before; raises where nobody keeps it."""
        self._client.key_value_set(f"slm_jax/{topic}/{self.processes.index}", text, allow_overwrite=True)

    def told(self, topic: str) -> dict[int, str]:
        """Returns what processes have told so far, by their numbers; raises where nobody keeps it."""
        entries = self._client.key_value_dir_get(f"slm_jax/{topic}/")
        return {int(key.rpartition("/")[2]): text for key, text in entries}

    def gathered(self, topic: str, text: str) -> list[str]:
        """Returns the texts of all processes once each has told its own; no device takes part.

        Args:
          topic: serves once.
          text: of this process.
        """
        self.tell(topic, text)
        self.meet(topic)
        told = self.told(topic)
        return [told[index] for index in range(self.processes.count)]

    def meet(self, topic: str) -> None:
        """Returns when all processes have called it; a topic serves once."""
        # Whoever waits in vain is ended by a watch.
        self._client.wait_at_barrier(f"slm_jax/{topic}", 7 * 24 * 3600 * 1000)

    def fail(self, status: int, sentence: str, stacks: bool = False) -> None:
        """Ends this process, and tells the others why: they have no need to wait for it.

        Args:
          status: exit status of all.
          sentence: for the logs of the others; this process has said it.
          stacks: whether the others write down the stacks of their threads.
        """
        if not self._ending.acquire(blocking=False):
            # A watch is about to end this process.
            time.sleep(60)
        self._leaving.set()
        self._exit(status, sentence, stacks=stacks)

    def blame(self, error: BaseException) -> None:
        """Ends this process with its error, which may be another's: what was sent to it did not arrive."""
        if _STATUS.match(str(error)):
            # Whichever watch finds the cause says it, and ends this process meanwhile.
            time.sleep(HEARTBEAT_SECONDS + 2 * _LOOK_SECONDS)
        traceback.print_exception(error)
        self.fail(1, f"{type(error).__name__}: {error}".split("\n")[0])

    def leave(self) -> None:
        """Waits for the others' ends and parts from them; whoever does not come to its own ends all."""
        try:
            self.tell(_DONE, "")
            self._client.wait_at_barrier("slm_jax/leave", _LEAVE_SECONDS * 1000)
        except Exception as error:
            self._miss(error)
        self._leaving.set()
        self._let_others_go(lambda: len(self._living()) == 1)
        jax.distributed.shutdown()
        self._witness.dismiss()
        global _company
        _company = None

    def _miss(self, error: Exception) -> None:
        """Ends this process, which has waited in vain for others to be done."""
        with contextlib.suppress(Exception):
            done = self.told(_DONE)
            if late := [self.name(index) for index in range(self.processes.count) if index not in done]:
                verb = "is" if len(late) == 1 else "are"
                sentence = f"{', '.join(late)} {verb} not done {_LEAVE_SECONDS} s after others"
                print(f"slm: {sentence}; all end", file=sys.stderr, flush=True)
                self.fail(EXIT_LOST, sentence)
        self.blame(error)

    def _living(self) -> Sequence[int]:
        return self._client.get_live_nodes(list(range(self.processes.count)))

    def _let_others_go(self, gone: Callable[[], bool]) -> None:
        """The coordinator ends with process 0, and would take with it whoever is still there."""
        deadline = time.monotonic() + _OWN_WORDS_SECONDS + 2 * _LOOK_SECONDS
        while self.processes.index == 0 and time.monotonic() < deadline and not gone():
            time.sleep(0.05)

    def _watch_lives(self) -> None:
        everyone = range(self.processes.count)
        while not self._leaving.is_set():
            # Where the service is gone JAX ends this process, and its witness says of whom it was; any other
            # error may pass.
            with contextlib.suppress(Exception):
                lost = sorted(set(everyone).difference(self._living()))
                if lost and not self._leaving.is_set():
                    # Who said why it ends is not lost.
                    self._hear(grace=0.0)
                    names = ", ".join(map(self.name, lost)) + (" is" if len(lost) == 1 else " are")
                    self._end(EXIT_LOST, f"{names} lost: no sign of life for {HEARTBEAT_SECONDS} s", lost)
            self._leaving.wait(_LOOK_SECONDS)

    def _watch_ends(self) -> None:
        while not self._leaving.wait(_LOOK_SECONDS):
            with contextlib.suppress(Exception):
                self._hear(grace=_OWN_WORDS_SECONDS)

    def _hear(self, grace: float) -> None:
        """Ends this process if another one said that it ends."""
        for key, text in self._client.key_value_dir_get(f"{_ENDED}/"):
            index, (status, stacks, sentence) = int(key.rpartition("/")[2]), text.split(" ", 2)
            if not self._leaving.wait(grace):
                self._end(int(status), f"{self.name(index)} ended: {sentence}", stacks=bool(int(stacks)))

    def _end(self, status: int, sentence: str, lost: Sequence[int] = (), stacks: bool = False) -> None:
        if self._ending.acquire(blocking=False):
            self._leaving.set()
            kind, name = "error: " if status == EXIT_MISTAKE else "", self.name(self.processes.index)
            print(f"slm: {kind}{sentence}; {name} ends, too", file=sys.stderr, flush=True)
            if stacks:
                dump_stacks()
            self._exit(status, "heard of it", lost, stacks)

    def _exit(self, status: int, sentence: str, lost: Sequence[int] = (), stacks: bool = False) -> None:
        self._witness.dismiss()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(Exception):
            text = f"{status} {stacks:d} {sentence}"[:2000]
            self._client.key_value_set(f"{_ENDED}/{self.processes.index}", text)
            awaited = self.processes.count - len(lost)
            self._let_others_go(lambda: len(self._client.key_value_dir_get(f"{_ENDED}/")) >= awaited)
            if self.processes.index == 0:
                # Whoever told a moment ago is not gone yet.
                time.sleep(_LAST_WORDS_SECONDS)
        # What waits for a lost process cannot be waited for.
        os._exit(status)


_company: Company | None = None


def company() -> Company | None:
    """Returns the processes that this one has joined; None where it is alone."""
    return _company


def dump_stacks() -> None:
    """Writes the stacks of all threads to stderr."""
    with contextlib.suppress(OSError):
        faulthandler.dump_traceback(2, all_threads=True)


def join(processes: Processes, seconds: float = JOIN_SECONDS) -> Company | None:
    """Brings the processes together; call it before JAX looks for devices.

    Args:
      processes: of `find_processes`.
      seconds: for all of them to come.

    Returns:
      None where there is one process. Where they do not meet in time, this process says so and ends.
    """
    if processes.count == 1:
        return None
    if processes.index == 0:
        _check_port(processes)
    # Who is lost is told here, with its name, and not by an abort.
    jax.config.update("jax_enable_recoverability", True)
    # It takes SIGTERM for itself, which only ends a process until `agreement` asks for more.
    jax.config.update(_PREEMPTION_SERVICE, False)
    # JAX aborts a process whose others do not come, so it gets longer than they have.
    alarm = threading.Timer(seconds, _give_up, (processes, seconds))
    alarm.daemon = True
    alarm.start()
    jax.distributed.initialize(
        processes.coordinator,
        processes.count,
        processes.index,
        local_device_ids=processes.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=round(seconds) + 60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    client = _client()
    client.key_value_set(f"{_HOSTS}/{processes.index}", socket.gethostname())
    names = [
        client.blocking_key_value_get(f"{_HOSTS}/{index}", round(seconds * 1000))
        for index in range(processes.count)
    ]
    alarm.cancel()
    global _company
    _company = Company(processes, names, client)
    return _company


def _check_port(processes: Processes) -> None:
    """Ends process 0 where it cannot listen at its port: JAX's service would crash without a word."""
    address = os.environ.get(_BIND_ADDRESS) or processes.coordinator or ""
    try:
        with socket.socket() as found:
            # As that service, to which connections of a former one that linger are no hindrance.
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(("", int(address.rpartition(":")[2])))
    except ValueError:
        return
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return
        print(
            f"slm: process 0 of {processes.count} (by {processes.found}, on host {socket.gethostname()}) "
            f"cannot listen at the port of {address}: {error.strerror}; expected a free one, which ss -ltnp "
            "tells",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_LOST)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def agreement(step: int) -> Callable[[int], bool]:
    """Has a SIGTERM to one of the processes ask all of them to stop, from here on.

    Args:
      step: where all of them are.

    Returns:
      A function that every process calls with the number of every step after `step`, and which is true in all
      of them at the same one.
    """
    from jax._src import distributed
    from jax.experimental import multihost_utils

    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update(_PREEMPTION_SERVICE, True)
        distributed.global_state.initialize_preemption_sync_manager()
    # JAX forgets a signal that comes before it knows where a process is, as while the first step is compiled.
    multihost_utils.reached_preemption_sync_point(step)
    return multihost_utils.reached_preemption_sync_point


def _give_up(processes: Processes, seconds: float) -> None:
    """Ends this process, which waits where nothing interrupts it."""
    where = processes.coordinator or ""
    silent = ", where nothing answers" if processes.index and not answers(where) else ""
    if proxies := proxies_in_the_way(where):
        silent += f"; {' and '.join(proxies)} may be why: name the coordinator's host in no_proxy"
    loopback = (
        f"; {processes.coordinator} leads every host to itself: where the processes are on several hosts, "
        "name the host of process 0"
        if processes.on_loopback
        else ""
    )
    print(
        f"slm: process {processes.index} of {processes.count} (by {processes.found}, on host "
        f"{socket.gethostname()}) did not meet the others at {processes.coordinator} within {seconds:.0f} s"
        f"{silent}{loopback}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_LOST)


@contextlib.contextmanager
def joined(processes: Processes, seconds: float = JOIN_SECONDS) -> Iterator[Company | None]:
    """Joins the processes for the time of a block, and ends this one so that no other waits for it.

    Args:
      processes, seconds: as of `join`.
    """
    company = join(processes, seconds)
    if company is None:
        yield None
        return
    try:
        yield company
    except (RemoteError, UserError) as error:
        print(f"slm: error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        company.fail(exit_status(error), str(error).splitlines()[0])
    except Exception as error:
        company.blame(error)
    except BaseException as error:
        company.fail(130 if isinstance(error, KeyboardInterrupt) else 1, type(error).__name__)
    else:
        company.leave()
