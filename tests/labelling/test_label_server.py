"""What the label server answers, and above all what it refuses."""

import http.client
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vitcut
from vitcut.errors import ConfigError
from vitcut.labelling.server import MAX_BODY_BYTES
from vitcut.task import load_task

TEXT = "name: new\ngroups:\n  round: {disc: disc, ring: ring}\n  angular: {square: a square}\n"


@pytest.fixture
def server(serve, drawn):
    return serve(drawn)


def ask(server, method, place="task", *, body=None, path=None, **headers):
    """Ask as a browser would, but for what is given; None leaves a header out."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    host = f"127.0.0.1:{server.server_port}"
    sent = {"Host": host}
    if method == "PUT":
        sent |= {"Origin": f"http://{host}", "Content-Type": "application/yaml"}
        sent |= {"If-Match": server.tag(), "Content-Length": str(len(body or b""))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(
        method, path or f"/{server.token}/{place}", skip_host=True, skip_accept_encoding=True
    )
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_a_change_is_saved_as_it_was_sent(server):
    answer, _ = ask(server, "GET")
    assert answer.headers["ETag"] == '"none"'
    answer, content = ask(server, "PUT", body=TEXT.encode())
    assert (answer.status, content) == (200, b'{"problem": null}')
    assert server.path.read_text() == TEXT
    assert load_task(server.path).groups == ("round", "angular")
    assert ask(server, "GET")[0].headers["ETag"] == answer.headers["ETag"] == server.tag()
    assert [path.name for path in server.path.parent.iterdir()] == ["new.yaml"]


def test_an_unfinished_file_is_saved_and_says_what_a_task_lacks(server):
    answer, content = ask(server, "PUT", body=b"groups: {round: {disc: disc}}\n")
    assert answer.status == 200
    assert b"needs at least 2 groups, got 1" in content


def test_the_page_and_its_pictures_are_served_and_may_not_be_shown_in_others(server):
    answer, content = ask(server, "GET", "")
    assert answer.status == 200
    assert b"connect-src 'self'" in content
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "Python" not in answer.headers["Server"]
    answer, content = ask(server, "GET", "pictures/11-35.jpg")
    assert (answer.headers["Content-Type"], content[:3]) == ("image/jpeg", b"\xff\xd8\xff")


REFUSALS = {
    "another Host": ("GET", 403, {"Host": "evil.example"}),
    "a Host of another port": ("GET", 403, {"Host": "127.0.0.1:1"}),
    "no Host": ("GET", 403, {"Host": None}),
    "another Origin": ("GET", 403, {"Origin": "http://evil.example"}),
    "an Origin that is null": ("PUT", 403, {"Origin": "null"}),
    "no Origin": ("PUT", 403, {"Origin": None}),
    "a page of another site": ("GET", 403, {"Sec_Fetch_Site": "cross-site"}),
    "a page of another port": ("PUT", 403, {"Sec_Fetch_Site": "same-site"}),
    "a form": ("PUT", 415, {"Content_Type": "text/plain"}),
    "no length": ("PUT", 411, {"Content_Length": None}),
    "a negative length": ("PUT", 411, {"Content_Length": "-1"}),
    "a length of many digits": ("PUT", 411, {"Content_Length": "9" * 5000}),
    "a body in chunks": ("PUT", 411, {"Transfer_Encoding": "chunked"}),
    "too large a body": ("PUT", 413, {"Content_Length": str(MAX_BODY_BYTES + 1)}),
    "a body that breaks off": ("PUT", 408, {"Content_Length": "9"}),
    "no version": ("PUT", 428, {"If_Match": None}),
    "a stale version": ("PUT", 409, {"If_Match": '"0"'}),
    "any version": ("PUT", 409, {"If_Match": "*"}),
    "a method that deletes": ("DELETE", 501, {}),
    "a method that posts": ("POST", 501, {}),
    "a method that asks for options": ("OPTIONS", 501, {}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_request_that_is_not_of_this_page_is_refused(server, name, monkeypatch):
    server.path.write_text("groups: {}\n")
    monkeypatch.setattr("vitcut.labelling.server._Handler.timeout", 0.2)
    method, status, headers = REFUSALS[name]
    body = TEXT.encode() if "If_Match" in headers else None
    answer, content = ask(server, method, body=body, **headers)
    assert answer.status == status
    assert server.token.encode() not in content
    assert server.path.read_text() == "groups: {}\n"


@pytest.mark.parametrize(
    "path",
    ["/", "/task", "/{wrong}/task", "/{wrong}/", "/{token}", "/{token}x/task", "/{token}/../task",
     "/{token}/new.yaml", "/{token}/task/", "/{token}/task?x", "/{token}/%2e%2e/x",
     "/{token}/pictures/0-36.jpg", "/{token}/pictures/12-0.jpg", "/{token}/pictures/0--1.jpg",
     "/{token}/pictures/0-0.jpg/../..", "http://x/{token}/task"],
)  # fmt: skip
def test_no_other_path_is_there(server, path):
    asked = path.format(token=server.token, wrong="x" * len(server.token))
    assert ask(server, "GET", path=asked)[0].status == 404


@pytest.mark.parametrize("place", ["", "new.yaml", "pictures/0-0.jpg"])
def test_nothing_but_the_label_file_is_written(server, place):
    assert ask(server, "PUT", place, body=b"x")[0].status == 405


@pytest.mark.parametrize(
    "body", [b"- a", b"groups: [", b"\xff", b"groups: {a: [[x]]}", b"rubbish: 1\ngroups: {}"]
)
def test_what_is_no_label_file_is_not_written(server, body):
    answer, content = ask(server, "PUT", body=body)
    assert answer.status == 422
    assert content.startswith(b'{"error": "')
    assert not server.path.exists()


def test_a_second_editors_change_is_not_written_over(server):
    known = server.tag()
    server.path.write_text("groups: {theirs: {disc: disc}}\n")
    answer, content = ask(server, "PUT", body=TEXT.encode(), If_Match=known)
    assert (answer.status, content) == (409, b'{"error": "new.yaml was changed elsewhere"}')
    assert "theirs" in server.path.read_text()
    assert ask(server, "PUT", body=TEXT.encode())[0].status == 200
    server.path.unlink()
    assert ask(server, "PUT", body=TEXT.encode(), If_Match=known)[0].status == 200


def test_a_full_disk_is_told_and_keeps_the_file(server, monkeypatch):
    server.path.write_text("groups: {}\n")

    write = Path.write_bytes

    def fill(path, content):
        write(path, content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    answer, content = ask(server, "PUT", body=TEXT.encode())
    assert (answer.status, b"No space left" in content) == (500, True)
    assert server.path.read_text() == "groups: {}\n"


def test_a_port_that_is_taken_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot listen on port {server.server_port} "):
        vitcut.label("drawn", serve=True, port=server.server_port, task=tmp_path / "new.yaml")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_quietly(tmp_path, number):
    words = ["label", "--source", "drawn", "--serve", "--task", "new.yaml", "--no-pictures"]
    ran = subprocess.Popen(
        [sys.executable, "-m", "vitcut", *words],
        cwd=tmp_path,
        env={**os.environ, "VITCUT_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = ran.stderr.readline()
    assert re.fullmatch(
        r"the label page is at http://127\.0\.0\.1:\d+/[\w-]{43}/ .*saves new\.yaml\)\n", line
    )
    ran.send_signal(number)
    out, err = ran.communicate(timeout=20)
    assert (ran.returncode, err) == (0, "")
    assert out == "next: vitcut train --source drawn --task new.yaml\n"
