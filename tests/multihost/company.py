"""One of some processes that gather numbers from each other, until one does what it is told; a program."""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from slm_jax.errors import UserError
from slm_jax.multihost import joining
from slm_jax.multihost.environment import find_processes


def main(what: str, who: int, rounds: int) -> None:
    processes = find_processes()
    with joining.joined(processes) as company:
        assert company is not None and company.name(processes.index).startswith("process")
        for number in range(rounds):
            gathered = multihost_utils.process_allgather(np.asarray([processes.index, number]))
            assert gathered.tolist() == [[index, number] for index in range(processes.count)]
            time.sleep(0.05)
            if number == 5 and processes.index == who:
                print(f"at {time.time()}", flush=True)
                if what == "mistake":
                    raise UserError("--flag is 'x', expected 'y'")
                if what == "bug":
                    raise LookupError("no such thing")
                if what == "memory":
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
                if what == "kill":
                    os.kill(os.getpid(), 9)
        if what == "stop":
            reached = joining.agreement(7)
            multihost_utils.sync_global_devices("all are watched")
            if processes.index == who:
                os.kill(os.getpid(), signal.SIGTERM)
            # JAX looks for the signal every second; no step is done meanwhile.
            time.sleep(4)
            print(f"stops after {next(step for step in range(8, 100) if reached(step))}", flush=True)
        if what == "late" and processes.index == who:
            time.sleep(60)
    print(f"left with {jax.process_count()}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 4:
        joining.HEARTBEAT_SECONDS = int(sys.argv[4])
    if sys.argv[1] == "late":
        joining._LEAVE_SECONDS = 2
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
