"""A hub in this process: folders of a disk served as repositories, to whoever asks by huggingface_hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest


@contextmanager
def hub_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve ``root/OWNER/NAME/FILE`` as files of repositories; gives the list of the requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            content = self._answer()
            self.wfile.write(content)

        def _answer(self) -> bytes:
            requests.append(f"{self.command} {self.path}")
            _, owner, name, _, _, file = self.path.split("/", 5)
            repository = root / owner / name
            found = (repository / file).is_file()
            content = (repository / file).read_bytes() if found else b""
            self.send_response(200 if found else 404)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound" if repository.is_dir() else "RepoNotFound")
            self.send_header("X-Repo-Commit", hashlib.sha1(str(repository).encode()).hexdigest())
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):  # before 1.0 the latter has it by name
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
