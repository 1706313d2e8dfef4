"""A small run on packed real audio, as one of some processes, and what forks such processes: a program.

`faults.py` starts one as `fault_run.py nursery`: it imports all that a run needs, computes nothing, and forks
a process for every line of JSON on its standard input. A start then takes a second instead of ten. The
processes are real ones, with their own devices, threads and sockets.
"""

import dataclasses
import faulthandler
import json
import os
import select
import signal
import sys
import time
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax._src import compilation_cache, compiler
from jax.experimental import multihost_utils  # noqa: F401, so that no child imports it

from slm_jax.data.audio_files import load_utterance
from slm_jax.data.batch import BatchShape
from slm_jax.data.iterator import TrainBatches
from slm_jax.data.plan import Packing, plan_mixture
from slm_jax.data.vocabularies import ByteVocabulary
from slm_jax.errors import EXIT_MISTAKE, EXIT_STOPPED, UserError
from slm_jax.multihost import joining
from slm_jax.multihost.environment import Processes
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.registration import register_mixture
from slm_jax.training.loop import LoopConfig, train
from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig

LENGTHS = {"speech": 8_000, "inputs": 120, "targets": 60}
ROWS = 8
POSITION = 640
VOCAB, EMBED, MLP = 300, 16, 32


@dataclasses.dataclass(frozen=True)
class Start:
    """One process of a run.

    Attributes:
      corpus: folder of `faults.write_corpus`.
      model_dir, cache_dir: the run's directory, and where indices of its tasks are kept.
      mesh: sizes of the axes data, fsdp and tensor.
      devices: of this process.
      steps, period, seed: of the run, and between its checkpoints.
      pause: seconds before each utterance is read, so that steps take a while.
      port, count, index: of the processes.
      heartbeat, meeting: seconds after which a silent process is lost, and for all of them to meet.
    """

    corpus: str
    model_dir: str
    cache_dir: str
    mesh: tuple[int, int, int]
    devices: int
    steps: int
    period: int
    seed: int
    pause: float
    port: int
    count: int
    index: int
    heartbeat: int
    meeting: int


class Listener(nn.Module):
    """Predicts each target token from the one before and from what the row's speech sounds like."""

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        def kernel(name: str, axes: tuple[str, str], shape: tuple[int, int]) -> Any:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.3), axes)
            return self.param(name, init, shape)

        speech_BKS = batch["speech"].astype(jnp.float32) / 32768
        frames_BPS = speech_BKS.reshape(speech_BKS.shape[0], -1, POSITION)
        heard_BPD = nn.silu(frames_BPS @ kernel("ear", ("mel", "embed"), (POSITION, EMBED)))
        before_BT = jnp.pad(batch["targets"], ((0, 0), (1, 0)))[:, :-1]
        x_BTD = kernel("table", ("vocab", "embed"), (VOCAB, EMBED))[before_BT]
        x_BTD = x_BTD + jnp.mean(heard_BPD, 1, keepdims=True)
        hidden_BTM = nn.silu(x_BTD @ kernel("wi", ("embed", "mlp"), (EMBED, MLP)))
        hidden_BTM = nn.Dropout(0.1)(hidden_BTM, deterministic=not self.has_rng("dropout"))
        return hidden_BTM @ kernel("wo", ("mlp", "vocab"), (MLP, VOCAB))


class ListenerObjective:
    """Cross-entropy of Listener."""

    samples_per_position = POSITION
    takes_packed_rows = packs = True

    def __init__(self):
        self.model = Listener()
        self.parts = {}

    def init(self, rng: jax.Array, batch: Any) -> dict[str, Any]:
        return dict(self.model.init(rng, batch))

    def loss(self, params: Any, frozen: Any, batch: Any, rng: jax.Array) -> Any:
        logits: Any = self.model.apply({"params": params}, batch, rngs={"dropout": rng})
        targets, weights = batch["targets"][..., None], batch["loss_weights"]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, -1)[..., 0]
        return jnp.sum(losses * weights), jnp.sum(weights), {}

    def flops(self, shapes: Any) -> dict[str, int]:
        return {}


def _write_to_cache(key, seconds, module_name, backend, executable, host_callbacks) -> None:
    """Keeps what any process compiled: JAX keeps process 0's alone, and each compiles some of its own."""
    if not host_callbacks:
        compilation_cache.put_executable_and_time(key, module_name, executable, backend, int(seconds))


def run(start: Start) -> int:
    """Trains as one process; returns its exit status as `slm train` does."""
    compiler._cache_write = _write_to_cache
    jax.config.update("jax_num_cpu_devices", start.devices)
    joining.HEARTBEAT_SECONDS = start.heartbeat
    processes = Processes(start.count, start.index, f"localhost:{start.port}", found="the campaign")
    with joining.joined(processes, start.meeting):
        for name in ("a", "b"):
            register_asr(
                name, manifests={"train": f"{start.corpus}/{name}.jsonl"}, vocabulary=ByteVocabulary()
            )
        register_mixture("mix", {"a": 2.0, "b": 1.0})
        mesh = make_mesh(*start.mesh)
        shape = BatchShape.from_feature_lengths(LENGTHS, rows=ROWS, samples_per_position=POSITION, segments=6)
        plan = plan_mixture(
            "mix", "train", LENGTHS, shape, cache_dir=start.cache_dir, seed=start.seed,
            packing=Packing(True, block=32),
        )  # fmt: skip

        def load(reference: Any) -> Any:
            time.sleep(start.pause)
            return load_utterance(reference)

        # Training and data describe a placed batch each for itself.
        source: Any = TrainBatches(plan, shape, batch_sharding(mesh), load=load)
        config = LoopConfig(
            train_steps=start.steps,
            log_period=1,
            checkpoint_period=start.period,
            seed=start.seed,
            log_ids=True,
        )
        optimizer = AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=4))
        result = train(
            ListenerObjective(),
            source,
            model_dir=start.model_dir,
            config=config,
            optimizer=optimizer,
            mesh=mesh,
        )
    return 0 if result.finished else EXIT_STOPPED


def nursery() -> Start:
    """Forks a process for each line `{"number", "log", "start"}`; returns in each of them what it is to do.

    Writes `{"number", "pid"}` and, in the end, `{"number", "status", "at", "cpu"}`.
    """
    living: dict[int, int] = {}
    unread = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01 if living else 1.0)
        if ready:
            if not (read := os.read(0, 1 << 16)):
                sys.exit(0)
            *lines, unread = (unread + read).split(b"\n")
            for line in map(json.loads, lines):
                pid = os.fork()
                if pid == 0:
                    return _born(line)
                living[pid] = line["number"]
                _tell({"number": line["number"], "pid": pid})
        for pid in list(living):
            found, status, used = os.wait4(pid, os.WNOHANG)
            if found:
                ended = os.waitstatus_to_exitcode(status)
                cpu = round(used.ru_utime + used.ru_stime, 2)
                _tell({"number": living.pop(pid), "status": ended, "at": time.time(), "cpu": cpu})


def _born(line: dict[str, Any]) -> Start:
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(line["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number, file in enumerate((nothing, log, log)):
        os.dup2(file, number)
    # As `slm` does.
    faulthandler.register(signal.SIGUSR1, 2, all_threads=True)
    return Start(**{**line["start"], "mesh": tuple(line["start"]["mesh"])})


def _tell(what: dict[str, Any]) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


def main(words: list[str]) -> NoReturn:
    if words != ["nursery"]:
        sys.exit("usage: fault_run.py nursery; faults.py starts it")
    start = nursery()
    try:
        sys.exit(run(start))
    except UserError as error:
        # As `slm` does; of several processes `joined` has done it before.
        print(f"slm: error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


if __name__ == "__main__":
    main(sys.argv[1:])
