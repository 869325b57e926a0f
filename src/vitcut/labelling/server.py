"""Serve a label page to the browsers of this machine, and save the label file as it changes.

The address holds a secret, so that other users and pages of other sites cannot guess it.
"""

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any, cast

from vitcut.errors import ConfigError, TaskError, VitcutError, one_line
from vitcut.labelling.gallery import Gallery
from vitcut.store import atomic_path
from vitcut.task import Task, parse_labels

MAX_BODY_BYTES = 4 << 20
"""Of a label file; one of ImageNet's thousand classes has 40 kB."""
_SIDE = 256
"""Of pictures, in pixels."""
_TIMEOUT_S = 30
_PICTURE = re.compile(r"pictures/([0-9]{1,6})-([0-9]{1,9})\.jpg")
_LENGTH = re.compile(r"[0-9]{1,15}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class RefusedError(Exception):
    """A request that is not answered, with the status that says why."""

    def __init__(self, status: HTTPStatus, told: str) -> None:
        super().__init__(told)
        self.status = status


class LabelServer(ThreadingHTTPServer):
    """Serves one page, its pictures and one label file."""

    daemon_threads = True

    def __init__(
        self, page: str, gallery: Gallery, path: Path, read: Callable[[], str], *, port: int = 0
    ) -> None:
        """Listen on 127.0.0.1; `serve_forever` answers.

        Args:
            page: The HTML.
            gallery: The pictures.
            path: The label file. It need not be there.
            read: Gives the label file as the page takes it.
            port: 0 finds a free one.

        Raises:
            ConfigError: The port is taken, or not allowed.
        """
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on port {port} ({error.strerror}): choose another --port, or leave "
                "it out"
            ) from None
        self.token = secrets.token_urlsafe(32)
        self.page, self.gallery, self.path, self.read_labels = page.encode(), gallery, path, read
        self.saving = Lock()
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def tag(self) -> str:
        """What tells one content of the label file from all others, as HTTP quotes it."""
        with suppress(FileNotFoundError):
            return f'"{hashlib.sha256(self.path.read_bytes()).hexdigest()}"'
        return '"none"'

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what went wrong; a browser that closes a connection is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT_S

    @property
    def _own(self) -> LabelServer:
        return cast("LabelServer", self.server)

    def version_string(self) -> str:
        return "vitcut"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing; the address is a secret."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def _answer(self, method: Callable[[str], None]) -> None:
        try:
            method(self._checked_path())
        except RefusedError as refusal:
            self._send(refusal.status, {"error": str(refusal)})
        except VitcutError as error:
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": one_line(error)})
        except OSError as error:
            with suppress(OSError):
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": one_line(error)})

    def _checked_path(self) -> str:
        """What is asked for, below the secret.

        Raises:
            RefusedError: The request is not of this page.
        """
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0] not in self._own.hosts:
            # A name that leads here, but is not ours: DNS rebinding.
            raise RefusedError(
                HTTPStatus.FORBIDDEN, "wrong Host: open the address that was printed"
            )
        origins = self.headers.get_all("Origin", [])
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            raise RefusedError(HTTPStatus.FORBIDDEN, "wrong Origin: another page asks")
        secret = f"/{self._own.token}/"
        given, place = self.path[: len(secret)], self.path[len(secret) :]
        if not secrets.compare_digest(given.encode(), secret.encode()):
            raise RefusedError(HTTPStatus.NOT_FOUND, "not found")
        # The page itself may be opened from anywhere, such as a link in a notebook.
        if place and self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise RefusedError(HTTPStatus.FORBIDDEN, "another site asks")
        return place

    def _get(self, place: str) -> None:
        server = self._own
        if place == "":
            self._send(HTTPStatus.OK, server.page, kind="text/html; charset=utf-8")
        elif place == "task":
            with server.saving:
                tag, text = server.tag(), server.read_labels()
            self._send(HTTPStatus.OK, {"text": text}, tag=tag)
        else:
            asked = _PICTURE.fullmatch(place)
            try:
                position = server.gallery.shown[int(asked[1])][int(asked[2])] if asked else None
            except IndexError:
                position = None
            if position is None:
                raise RefusedError(HTTPStatus.NOT_FOUND, "not found")
            picture = server.gallery.thumbnail(position, _SIDE)
            self._send(HTTPStatus.OK, picture, kind="image/jpeg")

    def _put(self, place: str) -> None:
        if place != "task":
            raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "only the label file is written")
        if self.headers.get("Origin") is None:
            raise RefusedError(HTTPStatus.FORBIDDEN, "no Origin: another program asks")
        if self.headers.get("Content-Type") != "application/yaml":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/yaml")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not _LENGTH.fullmatch(length):
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected Content-Length")
        if int(length) > MAX_BODY_BYTES:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_BODY_BYTES} bytes"
            )
        known = self.headers.get("If-Match")
        if known is None:
            raise RefusedError(HTTPStatus.PRECONDITION_REQUIRED, "expected If-Match")
        with suppress(TimeoutError):
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                return self._save(body, known)
        raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, "the request broke off")

    def _save(self, body: bytes, known: str) -> None:
        try:
            entries = parse_labels(body.decode("utf-8"), origin=self._own.path.name)
        except UnicodeDecodeError:
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "expected UTF-8") from None
        with self._own.saving:
            if self._own.tag() != known:
                raise RefusedError(
                    HTTPStatus.CONFLICT, f"{self._own.path.name} was changed elsewhere"
                )
            with atomic_path(self._own.path) as part:
                part.write_bytes(body)
            tag = self._own.tag()
        try:
            Task(**entries)
            problem = None
        except TaskError as error:
            problem = one_line(error)
        self._send(HTTPStatus.OK, {"problem": problem}, tag=tag)

    def _send(
        self,
        status: HTTPStatus,
        content: bytes | dict[str, str | None],
        *,
        kind: str = "application/json",
        tag: str | None = None,
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        # Pictures never change, and all else is asked for anew.
        cached = "private, max-age=3600" if kind == "image/jpeg" else "no-store"
        own = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": cached}
        tagged = {} if tag is None else {"ETag": tag}
        for name, value in {**own, **tagged, **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
