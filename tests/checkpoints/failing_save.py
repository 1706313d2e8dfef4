"""One of two processes that save; one of them has no room for it. A program."""

import resource
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.provenance import make_provenance
from slm_jax.multihost.environment import find_processes
from slm_jax.multihost.joining import joined
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.training.state import DataCursor


def main(directory: str, when: str) -> None:
    with joined(find_processes()):
        sharding = NamedSharding(make_mesh(), PartitionSpec("data"))
        numbers = np.random.default_rng(0).normal(size=(jax.device_count(), 200_000)).astype(np.float32)
        array = jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])
        checkpoints = RunCheckpoints(directory)
        checkpoints.save(1, {"w": array}, DataCursor(0, "p"), make_provenance("", {}))
        checkpoints.wait()
        if when == "small file too" and jax.process_index() == 0:
            # Orbax's thread that ends a save waits for small files beside it first.
            def full() -> None:
                if threading.current_thread() is not threading.main_thread():
                    raise OSError(28, "No space left on device")

            checkpoints._manager._non_blocking_metadata_store.wait_until_finished = full
        if jax.process_index() == (0 if when == "small file too" else 1):
            # A write beyond it fails as one to a full disk does, where the signal is ignored.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        checkpoints.save(2, {"w": array}, DataCursor(4, "p"), make_provenance("", {}))
        print(f"at {time.time()}", flush=True)
        try:
            if when == "steps":
                while True:
                    checkpoints.check()
                    time.sleep(0.01)
            checkpoints.wait()
        except BaseException:
            checkpoints.close(failed=True)
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
