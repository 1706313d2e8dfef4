"""A notice of preemption, from a server that answers as Google's machines do."""

import http.server
import os
import signal
import threading
import time

import pytest

from slm_jax.multihost import notice
from slm_jax.multihost.notice import preemption_notices
from slm_jax.training.preemption import stop_requests


@pytest.fixture
def metadata(monkeypatch):
    said = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            known = folder == "/computeMetadata/v1/instance" and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known and name in said else 403)
            self.end_headers()
            self.wfile.write(said.get(name, "").encode())

        def log_message(self, format, *args):
            said.setdefault("asked", "yes")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(notice, "_LOOK_SECONDS", 0.05)
        yield said
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_stops_the_run_after_its_step(metadata, capfd, name, value):
    with stop_requests(0) as stop_after:
        while "asked" not in metadata:
            time.sleep(0.01)
        assert not stop_after(1)
        metadata[name] = value
        deadline = time.monotonic() + 20
        while not stop_after(2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert f"this machine says {name}" in capfd.readouterr().err


def test_a_server_that_does_not_answer_is_no_notice(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "kill", lambda *words: asked.append(words))
    monkeypatch.setattr(notice, "_LOOK_SECONDS", 0.01)
    with preemption_notices({"GCE_METADATA_HOST": "127.0.0.1:9"}):
        time.sleep(0.3)
    assert not asked


def watches() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "slm_jax preemption"}


def test_elsewhere_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(notice, "_PRODUCT", tmp_path / "none")
    before = watches()
    with preemption_notices({}):
        assert watches() <= before
    (tmp_path / "product").write_text("Google Compute Engine\n")
    monkeypatch.setattr(notice, "_PRODUCT", tmp_path / "product")
    monkeypatch.setattr(notice, "_LOOK_SECONDS", 60)
    with preemption_notices({}):
        assert len(watches() - before) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
