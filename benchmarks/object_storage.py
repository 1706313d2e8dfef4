"""`slm train` in buckets of local servers that fail: run directory, frozen weights and frames all lie there.

    python benchmarks/object_storage.py --schemes s3 gs --steps 60 --share 0.05 --processes 1

Trains the quickstart's adapter in a local folder, then in a bucket whose server fails `--share` of the
requests (503, 500, reset, carried out and not answered, answer cut off) and is slow: stopped by SIGTERM half
way, gone on with, and once more with a server that is gone for good half way and comes back. Prints a row for
each.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from object_servers import ObjectServer, without_other_storage  # noqa: E402

from slm_jax import appended, object_stores, storage  # noqa: E402
from slm_jax.demo import foundation  # noqa: E402

_SLM = "import sys; from slm_jax.cli.main import main; sys.exit(main())"


def main() -> int:
    """Prints the table; the status is 1 where a curve differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", default=["s3", "gs"], choices=["s3", "gs"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.01, help="seconds, at most, before each answer")
    args = parser.parse_args()
    same = True
    with tempfile.TemporaryDirectory() as name:
        Work(Path(name), 0, 1).slm(["demo", "--to", f"{name}/corpus", "--preset", "tiny"], {})
        work = Work(Path(name), args.steps, args.processes)
        work.slm(work.train(f"{name}/local", f"{name}/local_models"), {})
        expected = appended.read_appended(f"{name}/local/steps.jsonl")
        print(
            "| run | requests | failed | tried again | checkpoints | first statuses | same curve | seconds |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for scheme in args.schemes:
            for ending in ("stopped", "storage gone"):
                with ObjectServer(scheme) as server:
                    server.share, server.delay = args.share, args.delay
                    same &= work.in_bucket(server, ending, expected)
    return 0 if same else 1


class Work:
    """Commands in a folder of their own, each run by so many processes."""

    def __init__(self, folder: Path, steps: int, processes: int):
        self.folder, self.steps, self.processes = folder, steps, processes

    def train(self, model_dir: str, models: str) -> list[str]:
        """The words of `slm train`; its foundation models are copied to `models` first."""
        parts = {"speech_encoder": foundation.speech_encoder(), "llm": foundation.llm()}
        for part, shipped in parts.items():
            storage.make_folder(f"{models}/{part}")
            for file in Path(shipped).iterdir():
                storage.write(f"{models}/{part}/{file.name}", file.read_bytes())
        bindings = {
            "CORPUS_DIR": str(self.folder / "corpus"),
            "MODEL_DIR": model_dir,
            "SPEECH_ENCODER_CHECKPOINT": f"{models}/speech_encoder",
            "LLM_CHECKPOINT": f"{models}/llm",
            "TRAIN_STEPS": self.steps,
            "BATCH_SIZE": 4,
            "WARMUP_STEPS": 4,
            "LOG_PERIOD": 2,
            "CHECKPOINT_PERIOD": 10,
            "EVALUATION": None,
        }
        flags = [f"--gin.{name}={value!r}" for name, value in bindings.items()]
        return ["train", "--gin_file", "recipes/quickstart.gin", *flags]

    def start(self, words: list[str], environment: dict[str, str]) -> list[subprocess.Popen[str]]:
        """Starts `slm`; what the first process says can be read, what others say is in `err.I`."""
        with socket.socket() as found:
            found.bind(("localhost", 0))
            address = f"localhost:{found.getsockname()[1]}"
        running = []
        for index in range(self.processes):
            given = {
                **without_other_storage(),
                "PYTHONPATH": str(ROOT),
                "SLM_CACHE_DIR": str(self.folder / "cache"),
                **environment,
            }
            if self.processes > 1:
                given |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(self.processes),
                    "JAX_PROCESS_ID": str(index),
                }
            command = [sys.executable, "-c", _SLM, *words]
            with (self.folder / f"err.{index}").open("w") as err:
                errors = err if index else subprocess.PIPE
                running.append(
                    subprocess.Popen(command, env=given, cwd=self.folder, stderr=errors, text=True)
                )
        return running

    def slm(self, words: list[str], environment: dict[str, str]) -> str:
        """Runs `slm` to its end, which must be a good one; returns what its first process said."""
        running = self.start(words, environment)
        said = running[0].communicate()[1]
        assert [process.wait() for process in running] == [0] * len(running), said
        return said

    def in_bucket(self, server: ObjectServer, ending: str, expected: bytes) -> bool:
        """Trains in a bucket, cut off half way, and prints the row; returns whether the curve is the same."""
        os.environ.update(server.environment)
        object_stores.store.cache_clear()
        run = f"{server.scheme}://bucket/run"
        words, began = self.train(run, f"{server.scheme}://bucket/models"), time.monotonic()
        patience = {storage.PATIENCE_VARIABLE: "5"} if ending == "storage gone" else {}
        running = self.start(words, {**server.environment, **patience})
        said: list[str] = []
        assert running[0].stderr is not None
        for line in running[0].stderr:
            said.append(line)
            if re.match(rf"step {self.steps // 2 // 2 * 2}/", line):
                if ending == "stopped":
                    running[-1].send_signal(signal.SIGTERM)
                else:
                    server.away = True
        first = ", ".join(str(process.wait()) for process in running)
        server.away = False
        said += self.slm(words, server.environment).splitlines(keepends=True)
        same = appended.read_appended(f"{run}/steps.jsonl") == expected
        names = [name for name in storage.list_folder(f"{run}/checkpoints") if name.isdigit()]
        again = sum(", attempt " in line for line in said)
        seconds = time.monotonic() - began
        print(
            f"| {server.scheme}, {ending} | {server.requests} | {server.failed.total()} | {again} "
            f"| {', '.join(names)} | {first} | {'yes' if same else 'NO'} | {seconds:.0f} |",
            flush=True,
        )
        if ending == "storage gone":
            print(f"  {next(line for line in said if line.startswith('slm: ')).strip()}", flush=True)
        lines = appended.read_appended(f"{run}/steps.jsonl").splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, self.steps + 1))
        return same


if __name__ == "__main__":
    sys.exit(main())
