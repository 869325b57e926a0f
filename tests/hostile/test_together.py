"""Several processes and threads in one place: none harms what another one writes."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import vitcut
from vitcut.cli import main
from vitcut.runs import Run
from vitcut.store import lock_folder

WRITER = """
import sys
from vitcut.store import write_text
for number in range(150):
    write_text(sys.argv[1], f"{sys.argv[2]} {number}")
"""
HOLDER = """
import sys
from vitcut.store import lock_folder
held = lock_folder(__import__("pathlib").Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts a process that holds the lock of a folder."""
    started = []

    def hold(folder: Path) -> None:
        words = [sys.executable, "-c", HOLDER, str(folder)]
        started.append(
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert started[-1].stdout.readline() == "held\n"

    yield hold
    for process in started:
        process.communicate()


def test_writers_of_one_file_do_not_sweep_each_other_away(tmp_path):
    path = tmp_path / "settings.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stderr=subprocess.PIPE)
        for name in "abc"
    ]
    told = [writer.communicate()[1] for writer in writers]
    assert told == [b""] * 3
    assert path.read_text().endswith("149")
    assert [item.name for item in tmp_path.iterdir()] == ["settings.json"]


def test_whoever_comes_second_leaves_the_first_ones_new_run_alone(
    tmp_path, monkeypatch, holder, capsys
):
    monkeypatch.chdir(tmp_path)
    real = Run.claim

    def late(run: Run, *given, **more):
        # The first process makes the directory after the second one saw that there is none.
        run.path.mkdir(parents=True)
        holder(run.path)
        (run.path / "config.yaml").write_text("begun")
        return real(run, *given, **more)

    monkeypatch.setattr(Run, "claim", late)
    monkeypatch.setattr("vitcut.runs._PATIENCE_S", 0)
    words = "train --source drawn --task drawn --image-size 16 --patch-size 8 --out new"
    assert main(words.split()) == 2
    assert "new is in use by another process" in capsys.readouterr().err
    assert (tmp_path / "new" / "config.yaml").read_text() == "begun"


def test_of_processes_that_train_together_only_the_first_locks(tmp_path, monkeypatch, holder):
    (tmp_path / "run").mkdir()
    holder(tmp_path / "run")
    monkeypatch.setattr("vitcut.runs._PATIENCE_S", 0)
    monkeypatch.setenv("RANK", "1")
    Run(tmp_path / "run").claim({"a": 1})
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Exception, match="in use by another process"):
        Run(tmp_path / "run").claim({"a": 1})


def test_threads_of_one_process_share_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("vitcut.runs.lock_folder", _slowly)
    monkeypatch.setattr("vitcut.runs._PATIENCE_S", 0)
    runs, failed = [Run(tmp_path / "run") for _ in range(4)], []

    def claim(run: Run) -> None:
        try:
            run.claim({"a": 1})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=claim, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def _slowly(folder: Path, *, wait: bool = True) -> int | None:
    threading.Event().wait(0.05)
    return lock_folder(folder, wait=wait)


def test_a_folder_that_somebody_called_old_is_not_ours(tmp_path):
    (tmp_path / "out" / ".photos.old").mkdir(parents=True)
    with pytest.raises(Exception, match="not empty and holds no run"):
        Run(tmp_path / "out")
    assert (tmp_path / "out" / ".photos.old").is_dir()


FORKER = """
import os, sys, time
from vitcut.runs import Run
run = Run(sys.argv[1])
run.claim({"a": 1})
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("forked", flush=True)
sys.stdin.read()
"""


def test_a_child_of_a_killed_process_holds_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("vitcut.runs._PATIENCE_S", 0)
    words = [sys.executable, "-c", FORKER, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(words, **pipes, start_new_session=True)
    assert parent.stdout.readline() == "forked\n"
    try:
        parent.kill()
        parent.wait()
        Run(tmp_path / "run").claim({"a": 1})
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdin.close()
        parent.stdout.close()


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_where_locks_are_missing_it_is_said_once(tmp_path, monkeypatch, capsys, missing):
    def refused(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    if missing == "module":
        monkeypatch.setattr("vitcut.store.fcntl", None)
    else:
        monkeypatch.setattr("vitcut.store.fcntl.flock", refused)
    vitcut.runs._say_unlocked.cache_clear()
    for name in "ab":
        Run(tmp_path / name).claim({"a": 1})
    vitcut.runs._say_unlocked.cache_clear()
    told = capsys.readouterr().err
    assert told.count("has no file locks") == 1
    assert "start no second command in one run directory" in told
