"""Google's machines say before they are taken away; what is said becomes the SIGTERM that others send."""

import contextlib
import http.client
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

_PRODUCT = Path("/sys/class/dmi/id/product_name")
# Of Google's own libraries, for another address than `metadata.google.internal`.
_HOST = "GCE_METADATA_HOST"
# What stands there when the machine goes, under https://cloud.google.com/compute/docs/metadata.
_NOTICES = {
    "preempted": ("TRUE",),
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",),
}
_LOOK_SECONDS = 5.0


@contextlib.contextmanager
def preemption_notices(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Inside, a notice that this machine will be preempted or taken down sends SIGTERM to this process, once.

    Elsewhere than on Google's machines nothing is asked: Slurm and Kubernetes send the signal themselves.
    """
    host = environ.get(_HOST)
    if host is None and not _on_google():
        yield
        return
    over = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(host or "metadata.google.internal", over), name="slm_jax preemption", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        over.set()


def _on_google() -> bool:
    try:
        return _PRODUCT.read_text(encoding="utf-8").startswith("Google")
    except OSError:
        return False


def _watch(host: str, over: threading.Event) -> None:
    while not over.wait(_LOOK_SECONDS):
        for name, values in _NOTICES.items():
            if _ask(host, name) in values and not over.is_set():
                line = f"slm: this machine says {name}: saving, to go on elsewhere\n"
                os.write(2, line.encode())
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _ask(host: str, name: str) -> str | None:
    connection = http.client.HTTPConnection(host, timeout=5)
    try:
        path = f"/computeMetadata/v1/instance/{name}"
        connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
        response = connection.getresponse()
        return response.read(200).decode(errors="ignore").strip() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        # It answers the next time, or never; the run is none the worse for it.
        return None
    finally:
        connection.close()
