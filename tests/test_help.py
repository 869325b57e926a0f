"""What helps people to type: examples, completion, and output that fits into narrow terminals."""

import re
import shlex
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import pytest

import vitcut.extras
from vitcut.cli import VERBS, _arranged, _take_changes, build_parser, main
from vitcut.hints import EXAMPLES
from vitcut.reports.checks import check_machine


@pytest.mark.parametrize("name", VERBS)
def test_every_help_ends_with_examples_that_parse(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert EXAMPLES[name]
    for example in EXAMPLES[name]:
        assert f"  vitcut {name} {example}".rstrip() in out.splitlines()
        words = [
            re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
            for word in shlex.split(example)
        ]
        parser = build_parser(name)
        if name in {"run", "demo"}:
            words, _ = _take_changes(words, parser)
        parser.parse_args(list(_arranged(parser, words)))


def _completion(shell, capsys):
    assert main(["--print-completion", shell]) == 0
    return capsys.readouterr().out


def test_a_script_for_bash_completes_commands_flags_and_values(tmp_path, capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    script = _completion("bash", capsys)
    path = tmp_path / "vitcut.bash"
    path.write_text(script)
    for name in VERBS:
        flags = [flag for action in build_parser(name)._actions for flag in action.option_strings]
        for flag in flags:
            shown = flag.replace("_", "-")
            assert shown in script or flag in {"--print_shtab"}, (name, flag)

    def complete(*words):
        typed = " ".join(shlex.quote(word) for word in words)
        code = (
            f"source {path}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
            "$(complete -p vitcut | sed 's/.*-F \\([^ ]*\\).*/\\1/') vitcut; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run([bash, "-c", code], capture_output=True, text=True, check=False)
        return set(done.stdout.split())

    assert set(VERBS) <= complete("vitcut", "")
    assert complete("vitcut", "fine") == {"finetune"}
    assert complete("vitcut", "cut", "--target-m") == {"--target-macs"}
    assert complete("vitcut", "discover", "--ablation", "m") == {"mean"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_scripts_too(shell, capsys):
    assert "finetune" in _completion(shell, capsys)


def test_another_shell_is_refused(capsys):
    for words in (["--print-completion", "fish"], ["--print-completion"]):
        assert main(words) == 2
        assert "must be one of bash, zsh, tcsh" in capsys.readouterr().err


def test_checks_tell_what_is_there_and_what_to_install(capsys, monkeypatch):
    absent = {"openvino"}
    find = vitcut.extras.find_spec
    monkeypatch.setattr(
        "vitcut.extras.find_spec", lambda name: None if name in absent else find(name)
    )
    assert main(["checks"]) == 0
    out = capsys.readouterr().out
    found = check_machine()
    for told in (
        f"vitcut {vitcut.__version__}, Python ",
        f"{found.machine['usable_cores']} of {found.machine['cores']} cores allowed",
        "GiB, ",
        "devices: cpu",
        f"torch {found.machine['versions']['torch']}",
        "pip install 'vitcut[openvino]'",
    ):
        assert told in out
    assert found.usable["export --to pt2"] is None
    assert found.calibration is None
    assert "predicted within" not in out


def test_an_extra_is_ready_when_all_its_packages_are_there(monkeypatch):
    def without_timm(name):
        if name == "timm":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("vitcut.reports.checks.version", without_timm)
    usable = check_machine().usable
    assert usable["extra train"] == "pip install 'vitcut[train]'"
    assert usable["extra cut"] == "pip install 'vitcut[cut]'"
    assert usable["extra onnx"] is None


def test_models_that_are_too_few_or_not_measured_are_refused(capsys):
    assert main(["checks", "--models", "2"]) == 2
    assert "models must be at least 3" in capsys.readouterr().err
    assert main(["checks", "--seconds", "2"]) == 2
    assert "model, models and seconds are for measuring: give save" in capsys.readouterr().err
