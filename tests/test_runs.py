import subprocess
import sys

import pytest

from vitcut.circuit import Circuit
from vitcut.errors import ArtefactError
from vitcut.graph import Graph
from vitcut.runs import Run, find_run, is_in_use, read_settings

SETTINGS = {"task": "drawn", "train": {"epochs": 3, "std": [0.1, 0.2]}}


def _expect_refusal(path, match, settings=SETTINGS):
    with pytest.raises(ArtefactError, match=match) as caught:
        Run(path).claim(settings)
    assert "\n" not in str(caught.value)


@pytest.fixture
def claimed(tmp_path):
    """A folder in which work was done."""
    Run(tmp_path / "run").claim(SETTINGS)
    (tmp_path / "run" / "points").mkdir()
    return tmp_path / "run"


def test_looking_at_a_folder_writes_nothing(tmp_path):
    Run(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_claimed(tmp_path):
    Run(tmp_path).claim(SETTINGS)
    assert read_settings(tmp_path).items() >= SETTINGS.items()


def test_the_same_settings_go_on_and_write_nothing(claimed):
    before = (claimed / "config.yaml").stat().st_mtime_ns
    Run(claimed).claim(SETTINGS)
    assert (claimed / "config.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"task": "animals"}, "task was 'drawn', now 'animals'"),
        (SETTINGS | {"train": {"epochs": 4, "std": [0.1, 0.2]}}, "train.epochs was 3, now 4"),
        (SETTINGS | {"train": {"epochs": 3, "std": [0.1]}}, r"train.std was \[0.1, 0.2\], now"),
        (SETTINGS | {"more": 1}, "more was None, now 1"),
        ({"task": "drawn"}, "train was .* now None"),
    ],
)
def test_other_settings_are_refused_by_the_key_that_differs(claimed, settings, message):
    _expect_refusal(
        claimed, f"holds a run of other settings: {message}.*choose another --out", settings
    )


def test_settings_may_be_mended_before_any_work_is_done(tmp_path):
    Run(tmp_path).claim(SETTINGS)
    (tmp_path / ".config.yaml.0123456789ab.part").touch()
    mended = SETTINGS | {"task": "animals"}
    Run(tmp_path).claim(mended)
    assert read_settings(tmp_path).items() >= mended.items()


def test_what_changes_no_result_may_differ(tmp_path):
    settings = {"discover": {"tau": 0.1, "memory_gib": 8.0, "precision": "float32"}}
    other = {"discover": {"tau": 0.2, "memory_gib": 1.0, "precision": "float64"}}
    Run(tmp_path).claim(settings)
    (tmp_path / "points").mkdir()
    _expect_refusal(tmp_path, "discover.tau was 0.1, now 0.2", other)
    Run(tmp_path).claim(other, free=("discover.tau",))


@pytest.mark.parametrize("name", ["train.precision", "finetune.precision", "select.memory_gib"])
def test_a_setting_of_the_same_name_that_changes_results_may_not_differ(tmp_path, name):
    group, key = name.split(".")
    Run(tmp_path).claim({group: {key: 1}})
    (tmp_path / "points").mkdir()
    _expect_refusal(tmp_path, f"{name} was 1, now 2", {group: {key: 2}})


def test_settings_may_be_corrected_before_the_first_checkpoint(tmp_path):
    Run(tmp_path).claim(SETTINGS)
    (tmp_path / "training.json").touch()
    Run(tmp_path).claim(SETTINGS | {"task": "animals"})
    assert read_settings(tmp_path)["task"] == "animals"


def test_the_timing_may_be_asked_for_later_but_not_changed_once_measured(tmp_path):
    Run(tmp_path).claim({"bench": None})
    (tmp_path / "model").mkdir()
    for seconds in (1, 2):
        run = Run(tmp_path)
        run.claim({"bench": {"seconds": seconds}}, free=run.free_bench())
    (tmp_path / "results.json").touch()
    with pytest.raises(ArtefactError, match=r"bench\.seconds was 2, now 3"):
        run.claim({"bench": {"seconds": 3}}, free=run.free_bench())


def test_a_folder_with_a_config_of_another_program_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("task: drawn\n")
    assert find_run(tmp_path) is None
    (tmp_path / "config.yaml").write_text("format_version: 2\n")
    assert find_run(tmp_path) == tmp_path


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    _expect_refusal(tmp_path, "is not empty and holds no run of vitcut: choose another --out")
    _expect_refusal(tmp_path / "thesis.tex", "is not empty and holds no run of vitcut")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "is not a run directory of this version"),
        (b"", "is not a run directory of this version"),
        (b"a: [\n", "is not readable"),
        (b"\xff\xfe\x00", "is not readable"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "points").mkdir()
    _expect_refusal(tmp_path, message)


def test_work_is_done_once_and_read_back(tmp_path, capsys):
    circuit, made = Circuit.full(Graph(num_layers=1, num_heads=1)), []

    def make():
        made.append(1)
        return circuit

    Run(tmp_path / "run").claim(SETTINGS)
    for _ in range(2):
        assert Run(tmp_path / "run").once("a/circuit.json", make, Circuit.load) == circuit
    assert made == [1]
    assert f"{tmp_path / 'run' / 'a' / 'circuit.json'} is there already" in capsys.readouterr().err


def test_one_process_at_a_time_works_in_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("vitcut.runs._PATIENCE_S", 0)
    code = """
import sys
from vitcut.runs import Run
run = Run(sys.argv[1])
run.claim({"task": "drawn"})
print("claimed", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "claimed\n"
        _expect_refusal(tmp_path / "run", "is in use by another process: wait for it to end")
        other.kill()
    Run(tmp_path / "run").claim(SETTINGS)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_process_may_come_back_to_its_own_directory(tmp_path):
    runs = [Run(tmp_path), Run(tmp_path)]
    for run in runs:
        run.claim(SETTINGS)
    assert not is_in_use(tmp_path)
    words = "from pathlib import Path; from vitcut.runs import is_in_use; import sys; "
    words += "print(is_in_use(Path(sys.argv[1])))"
    other = subprocess.run(
        [sys.executable, "-c", words, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert other.stdout == "True\n"


def test_what_killed_processes_left_is_swept_at_the_next_start(claimed):
    (claimed / "points" / ".model.0123456789ab.part" / "deep").mkdir(parents=True)
    (claimed / ".results.json.0123456789ab.part").mkdir()
    (claimed / ".model.replaced-by-vitcut").mkdir()
    (claimed / "model").mkdir()
    Run(claimed).claim(SETTINGS)
    assert sorted(path.name for path in claimed.iterdir()) == ["config.yaml", "model", "points"]
    assert list((claimed / "points").iterdir()) == []


def test_settings_that_somebody_changed_are_refused(claimed):
    text = (claimed / "config.yaml").read_text()
    (claimed / "config.yaml").write_text(text.replace("epochs: 3", "epochs: 4"))
    _expect_refusal(claimed, "was altered")
    (claimed / "config.yaml").write_text(text.replace("- 0.2", "- &a 0.2\n  - *a"))
    _expect_refusal(claimed, "is not readable: it holds an alias")


def test_a_temporary_run_goes_with_its_value():
    run = Run()
    run.claim(SETTINGS)
    path = run.path
    assert (path / "config.yaml").is_file()
    del run
    assert not path.exists()


def test_a_run_is_found_around_what_lies_in_it(claimed, tmp_path):
    assert find_run(claimed / "points") == claimed
    assert find_run(claimed) == claimed
    assert find_run(tmp_path) is None
    assert find_run(tmp_path / "nothing") is None


@pytest.mark.parametrize("version", [None, 1, 99])
def test_a_run_of_another_version_is_refused_with_what_to_do(tmp_path, version):
    written = "" if version is None else f"format_version: {version}\n"
    (tmp_path / "config.yaml").write_text(f"{written}task: drawn\n")
    with pytest.raises(ArtefactError, match=r"another version .* run its command again"):
        read_settings(tmp_path)


def test_a_value_that_occurs_twice_is_read_again(tmp_path):
    shared = [0.5, 0.5]
    settings = {"model": {"mean": shared, "std": shared}, "tau": 1.0}
    Run(tmp_path / "run").claim(settings)
    assert read_settings(tmp_path / "run") == settings


def test_the_remedy_for_a_damaged_config_works(tmp_path):
    run = tmp_path / "run"
    Run(run).claim({"tau": 1.0})
    config = run / "config.yaml"
    (run / "results.json").write_text("{}")
    for damaged in (config.read_text().replace("tau: 1.0", "tau: 2.0"), "[", "a: &b [1]\nc: *b"):
        config.write_text(damaged)
        with pytest.raises(ArtefactError, match="restore it, or choose another --out"):
            read_settings(run)
    Run(tmp_path / "another").claim({"tau": 1.0})
