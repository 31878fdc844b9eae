"""A web server on loopback that fails as networks do, by a seed."""

from __future__ import annotations

import collections
import http.server
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np

FAILURES = ("503", "429", "reset", "cut", "short")


class FlakyServer:
    """Serves a folder; a share of the requests for its files fail, in all ways in turn."""

    def __init__(self, folder: Path, share: float = 0.0, seed: int = 0) -> None:
        self.folder, self.share, self.seed = folder, share, seed
        self.asked: collections.Counter[str] = collections.Counter()
        self.served: collections.Counter[str] = collections.Counter()
        self.failed: collections.Counter[str] = collections.Counter()
        self.slow = 0.0  # seconds per file
        self.lock = threading.Lock()
        self.url = ""

    def failure(self, path: str) -> str | None:
        """What goes wrong with this request for a path; after at most 4 in a row nothing."""
        with self.lock:
            number = self.asked[path]
            self.asked[path] += 1
        rng = np.random.default_rng([self.seed, *path.encode(), number])
        if number % 5 == 4 or rng.random() >= self.share:
            return None
        return FAILURES[self.failed.total() % len(FAILURES)]


@contextmanager
def flaky_server(folder: Path, **options: object) -> Iterator[FlakyServer]:
    server = FlakyServer(folder, **options)  # type: ignore[arg-type]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path)
            file = server.folder / path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            data = file.read_bytes()
            failure = server.failure(path if body else f"HEAD {path}")
            if failure in ("cut", "short") and not body:
                failure = None
            if failure:
                server.failed[failure] += 1
            if failure in ("503", "429"):
                self.send_error(int(failure))
                return
            if failure == "silence":
                threading.Event().wait(40)
                return
            if failure == "reset":  # in the middle of nothing, with a RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            shown = data[: len(data) // 2] if failure == "short" else data  # a proxy that kept half a file
            self.send_response(200)
            self.send_header("Content-Length", str(len(shown)))
            self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
            self.end_headers()
            if not body:
                return
            if server.slow:
                threading.Event().wait(server.slow)
            if failure == "cut":
                self.wfile.write(shown[: len(shown) // 3])
                self.close_connection = True
                return
            try:
                self.wfile.write(shown)
            except OSError:
                return
            if failure is None:
                with server.lock:
                    server.served[path] += 1

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    server.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
