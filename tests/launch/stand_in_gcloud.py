"""Stands in for gcloud: a Cloud TPU VM whose hosts are folders and processes of this machine.

In the folder CLOUD: `state` of the queued resource, `hosts/I` the home of host I, `calls` what was asked, and
`unreachable` while hosts do not answer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
HOSTS = int(os.environ.get("CLOUD_HOSTS", "2"))


def flag(name: str, default: str = "") -> str:
    return next((word.partition("=")[2] for word in sys.argv if word.startswith(f"--{name}=")), default)


def state() -> str:
    file = CLOUD / "state"
    return file.read_text() if file.exists() else ""


def ssh() -> int:
    if state() != "ACTIVE" or (CLOUD / "unreachable").exists():
        print("Failed to execute command on multiple workers.", file=sys.stderr)
        return 255
    running = []
    for index in range(HOSTS):
        home = CLOUD / "hosts" / str(index)
        directory = flag("output-directory")
        output = (Path(directory) / f"{index}.log").open("w") if directory else None
        environment = {**os.environ, "HOME": str(home), "TPU_WORKER_ID": str(index)}
        # As sshd does: the user's shell gets the command's text.
        command = ["bash", "-c", flag("command")]
        running.append(subprocess.Popen(command, cwd=home, env=environment, stdout=output))
    return next((status for process in running if (status := process.wait())), 0)


def scp() -> int:
    source, _ = [word for word in sys.argv[5:] if not word.startswith("--")]
    for home in (CLOUD / "hosts").iterdir():
        shutil.copy(source, home)
    return 0


def main() -> int:
    with (CLOUD / "calls").open("a") as calls:
        calls.write(" ".join(word for word in sys.argv[1:] if not word.startswith("--command")) + "\n")
    match sys.argv[1:]:
        case ["compute", "tpus", "queued-resources", "create", *_]:
            for index in range(HOSTS):
                (CLOUD / "hosts" / str(index)).mkdir(parents=True)
            (CLOUD / "state").write_text("ACTIVE")
        case ["compute", "tpus", "queued-resources", "delete", *_]:
            shutil.rmtree(CLOUD / "hosts")
            (CLOUD / "state").unlink()
        case ["compute", "tpus", "queued-resources", "describe", *_] if state():
            print(state())
        case ["compute", "tpus", "tpu-vm", "describe", *_] if state() == "ACTIVE":
            print("READY")
        case ["compute", "tpus", "tpu-vm", "ssh", *_]:
            return ssh()
        case ["compute", "tpus", "tpu-vm", "scp", *_]:
            return scp()
        case ["storage", "ls", url]:
            bucket = CLOUD / url.removeprefix("gs://")
            if not bucket.is_dir():
                return 1
            print("".join(f"{url}{entry.name}/\n" for entry in bucket.iterdir()))
        case _:
            return 1
    return 0


sys.exit(main())
