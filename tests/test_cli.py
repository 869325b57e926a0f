import os
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import wraps

import pytest
import yaml
from forging import forge
from PIL import Image

from vitcut import cli
from vitcut.__main__ import entry
from vitcut.circuit import Circuit
from vitcut.cli import LOADERS, VERBS, build_parser, main
from vitcut.graph import Graph
from vitcut.preprocessing import numbers
from vitcut.training.settings import TrainSettings

LABELS = "groups: {round: {disc: disc, dodo: dodo}, angular: {square: square}}"
NUM_FLAGS = 95
DRAWN = ["--source", "drawn", "--task", "drawn"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Names that commands may use, and a cache of their own."""
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "truncated.zip").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "labels.yaml").write_text(LABELS)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "points").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("format_version: 3\ntaus: [0.5]\n")
    forge(tmp_path / "other" / "config.yaml", lambda _: None)
    (tmp_path / "bogus.yaml").write_text("task: drawn\nbogus: 3\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("task: [\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "tau.yaml").write_text("task: drawn\ndata: {source: drawn}\ntaus: [-1.0]\n")
    (tmp_path / "repair.yaml").write_text("task: drawn\nrepair: {epochs: 2}\n")
    (tmp_path / "patches.yaml").write_text("task: drawn\ndata: {source: drawn, image_size: 20}\n")
    return tmp_path


def _files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def _error(arguments, capsys):
    """The one line of an error; nothing else may be printed or written."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitcut: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("vitcut: error: ").rstrip("\n")


ERRORS = {
    "a truncated archive": (
        ["train", "--source", "truncated.zip", "--task", "drawn"],
        "truncated.zip is not a complete .zip archive",
    ),
    "an empty folder": (["train", "--source", "empty"], "empty has no images"),
    "a source that does not exist": (
        ["train", "--source", "nowhere"],
        "source 'nowhere' does not exist",
    ),
    "a label file with an unknown id": (
        ["train", "--source", "drawn", "--image-size", "8", "--task", "labels.yaml"],
        "names 1 classes that the data lacks: dodo",
    ),
    "a label file that is none": (
        ["train", "--source", "drawn", "--task", "bogus.yaml"],
        "is not a label file",
    ),
    "an unknown task": (["train", "--task", "nope", "--source", "drawn"], "no task named 'nope'"),
    "a negative tau": (["discover", "--tau", "-1"], "tau must be a finite number > 0, got -1.0"),
    "a tau of zero": (["discover", "--tau=0"], "tau must be a finite number > 0, got 0.0"),
    "a tau that is nan": (["discover", "--tau", "nan"], "tau must be a number, got nan"),
    "a tau that is .nan": (["discover", "--tau", ".nan"], "tau must be a finite number > 0"),
    "a text file as model": (
        ["discover", "--model", "text.txt", *DRAWN],
        "text.txt is a file: expected a model folder",
    ),
    "an empty folder as model": (
        ["discover", "--model", "empty", *DRAWN],
        "empty holds no config.json",
    ),
    "a model that does not exist": (
        ["discover", "--model", "nowhere", *DRAWN],
        "no model at nowhere",
    ),
    "an unknown timm model": (
        ["discover", "--model", "timm:resnet9999", *DRAWN],
        "timm has no architecture 'resnet9999'",
    ),
    "a text file as circuit": (["cut", "text.txt"], "text.txt is not a readable circuit file"),
    "no circuit": (["cut", "empty"], "no circuit at empty"),
    "nothing to repair": (
        ["finetune", "nowhere"],
        "no compact model at nowhere: expected a run directory that `vitcut cut` wrote",
    ),
    "a folder of something else to repair": (
        ["finetune", "foreign"],
        "no compact model at foreign",
    ),
    "a repair that learns nothing": (
        ["finetune", "empty", "--coarse-weight=0", "--fine-weight=0", "--label-weight=0"],
        "one of coarse_weight, fine_weight, label_weight must be > 0",
    ),
    "a repair of the dense model that is and is not wanted": (
        ["finetune", "empty", "--repair-dense", "false", "--repaired-dense", "other"],
        "leave one of them out",
    ),
    "no run": (
        ["bench", "empty"],
        "nothing was measured in empty: expected the run directory of a finished `vitcut run`",
    ),
    "an unknown flag": (["discover", "--tua", "1"], "unrecognized arguments: --tua 1"),
    "a flag without its value": (["discover", "--tau"], "--tau: expected one argument"),
    "a value of another kind": (
        ["discover", "--memory-gib", "much"],
        "memory-gib must be a number, got much",
    ),
    "a word too many": (["discover", "extra"], "unrecognized arguments: extra"),
    "neither circuit nor budget": (["cut"], "cut needs a circuit"),
    "both circuit and budget": (
        ["cut", "empty", "--target-macs", "0.2"],
        "cut takes a circuit or a budget, got both",
    ),
    "a budget that is to be merged": (
        ["cut", "--target-macs", "0.2", "--merge"],
        "merge brings edges back to a circuit that is there, got a budget",
    ),
    "no images to merge for": (
        ["cut", "empty", "--merge", "--batch", "0"],
        "batch must be between 1 and 65536",
    ),
    "two budgets": (
        ["cut", "--target-macs", "0.2", "--target-latency", "0.2"],
        "got target-macs and target-latency",
    ),
    "no MACs": (["cut", "--target-macs", "0"], "target-macs must be above 0 and below 1 of dense"),
    "more MACs than dense": (["cut", "--target-macs", "1.5"], "below 1 of dense, got 1.5"),
    "a latency that is .nan": (["cut", "--target-latency", ".nan"], "target-latency must be above"),
    "MACs below the smallest model": (
        ["cut", "--target-macs", "0.0001"],
        "target-macs 0.0001 cannot be met: the smallest model that still sees the image has 0.0",
    ),
    "MACs above the uncut model": (
        ["cut", "--target-macs", "0.9999"],
        "target-macs 0.9999 leaves nothing to cut: compiled and uncut the model has 0.8",
    ),
    "a runtime that is not there": (
        ["cut", "--target-latency", "0.2", "--runtime", "pt2"],
        "one of torch, torch-compile, onnxruntime, openvino, got pt2",
    ),
    "a search by fills of whole parts": (
        ["discover", "--ablation", "linear"],
        "one of zero, mean, resample, got linear",
    ),
    "searches by fills of whole parts": (
        ["run", "demo", "--ablations", "mean,linear"],
        "one of zero, mean, resample, got linear",
    ),
    "an ablation that does not fold": (
        ["cut", "--target-macs", "0.2", "--ablation", "resample"],
        "ablation must be one of mean, zero, linear, got resample",
    ),
    "joint scores of a control": (
        ["cut", "--target-macs", "0.2", "--scores", "random"],
        "random scores add up: give --joint false with them",
    ),
    "other joint scores of a control": (
        ["cut", "--target-macs", "0.2", "--scores", "magnitude"],
        "magnitude scores add up: give --joint false with them",
    ),
    "a repair without a budget": (["run", "repair.yaml"], "repair needs a budget"),
    "a missing recipe file": (["run", "nope.yaml"], "no recipe file at nope.yaml"),
    "an unknown recipe": (["run", "nope"], "expected one of animals, animals-quick, demo"),
    "a recipe with an unknown key": (["run", "bogus.yaml"], "bogus.yaml has no setting 'bogus'"),
    "a recipe that is a list": (["run", "list.yaml"], "list.yaml is no"),
    "a recipe that is no YAML": (["run", "broken.yaml"], "broken.yaml is not a readable recipe"),
    "a recipe that is no text": (["run", "binary.yaml"], "binary.yaml is not a readable recipe"),
    "a recipe with a bad tau": (["run", "tau.yaml"], "taus must be a finite number > 0, got -1"),
    "images of half patches": (
        ["run", "patches.yaml"],
        "image_size must be a multiple of patch_size (8), got 20",
    ),
    "settings that do not fit": (
        ["train", "--epochs", "2", "--warmup-epochs", "2", *DRAWN],
        "warmup_epochs must be below epochs (2), got 2",
    ),
    "a new architecture for a pretrained model": (
        ["train", "--model", "animals", "--width", "32", *DRAWN],
        "width is for a new model, got a pretrained one: leave it out",
    ),
    "epochs of a fit": (
        ["train", "--model", "animals", "--freeze", "backbone", "--epochs", "9", *DRAWN],
        "epochs is for training all weights, got freeze backbone: leave it out",
    ),
    "a frozen backbone of no model": (
        ["train", "--freeze", "backbone", *DRAWN],
        "freeze is for a pretrained model (--model): leave it out",
    ),
    "an architecture of no weights": (
        ["train", "--arch", "vit_base_patch16_224", *DRAWN],
        "arch is for a model, got none: give --model, or leave it out",
    ),
    "heads that do not share the width": (
        ["train", "--num-heads", "3", *DRAWN],
        "width must be a multiple of num_heads (3), got 64",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_leaves_nothing(case, place, capsys):
    arguments, message = ERRORS[case]
    before = _files(place)
    assert message in _error([*arguments, "--out", "out"], capsys)
    assert _files(place) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian': did you mean train?"),
        (["zzz"], "no command 'zzz': expected one of demo, run, prepare"),
        (["--tau"], "no command '--tau': expected one of"),
        (["run"], "run needs a recipe: animals, animals-quick, demo, or a .yaml file"),
        (["run", "--out", "x"], "run needs a recipe"),
        (["run", "--config"], "run needs a recipe"),
        (["run", "--config=nope.yaml"], "no recipe file at nope.yaml"),
        (["cut"], "cut needs a circuit"),
        (["show", "text.txt"], "text.txt is not a readable circuit file"),
        (["show", "nowhere"], "nothing to show at nowhere"),
        (["prepare", "--source", "nowhere"], "source 'nowhere' does not exist"),
        (["prepare", "--source", ""], "source is empty"),
        (["prepare", "--image-size", "3"], "image_size must be between 8 and 8192"),
    ],
)
def test_errors_of_what_has_no_out_are_one_line_too(arguments, message, place, capsys):
    before = _files(place)
    assert message in _error(arguments, capsys)
    assert _files(place) == before


@pytest.mark.parametrize("verb", [["run", "demo"], ["train", *DRAWN]])
def test_a_folder_of_something_else_is_left_alone(verb, place, capsys):
    before = _files(place)
    line = _error([*verb, "--out", "foreign"], capsys)
    assert line == "foreign is not empty and holds no run of vitcut: choose another --out"
    assert _files(place) == before


def test_a_run_of_other_settings_is_refused_by_the_key_that_differs(place, capsys):
    before = _files(place)
    line = _error(["run", "demo", "--out", "other"], capsys)
    assert "other holds a run of other settings: taus was [0.5], now [0.03, 0.01, 0.003]" in line
    assert _files(place) == before


def test_debug_shows_the_traceback_of_an_error_that_can_be_mended(capsys):
    assert main(["discover", "--tau", "-1", "--debug"]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("\nvitcut: error: tau must be a finite number > 0, got -1.0\n")


@pytest.fixture
def taken(monkeypatch):
    """What the functions would be called with, by the verb's name; nothing is run or loaded."""
    found = {}

    def taking(name, call):
        @wraps(call)
        def take(**given):
            found[name] = given

        return take

    for kind, call in LOADERS.items():
        monkeypatch.setitem(LOADERS, kind, taking(call.__name__, call))
    for name, verb in VERBS.items():
        bare = replace(verb, call=taking(name, verb.call), show=None, check=None)
        monkeypatch.setitem(VERBS, name, bare)
    return found


@pytest.fixture
def unloaded(monkeypatch):
    """Neither models nor images are loaded."""
    for kind, call in LOADERS.items():
        monkeypatch.setitem(LOADERS, kind, wraps(call)(lambda **_: None))


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_alone_runs_or_says_what_it_needs(name, taken, capsys):
    code = main([name])
    assert code == (0 if name in taken else 2)
    assert name in taken or capsys.readouterr().err.startswith("vitcut: error: ")


def test_there_are_fewer_than_120_flags_and_a_new_one_is_added_knowingly():
    """Whoever adds a flag raises this number, and says why in the commit."""
    flags = {
        flag
        for name in VERBS
        for action in build_parser(name)._actions
        for flag in action.option_strings
        if flag.startswith("--")
    }
    assert len(flags) == NUM_FLAGS < 120
    typed = {
        *("model", "source", "task", "method", "tau", "ablation", "tokens", "images", "seed"),
        *("target_macs", "target_latency", "runtime", "batch", "threads", "memory_gib", "out"),
        *("device", "costs"),
    }
    assert {f"--{name}" for name in typed} <= flags


def test_an_interrupted_command_says_that_it_goes_on(monkeypatch, capsys):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitcut.reports.show.show_path", interrupt)
    monkeypatch.setattr(sys, "argv", ["vitcut", "show", "empty"])
    with pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command to continue\n"


def test_a_full_disk_is_told_in_one_line(monkeypatch, capsys):
    def fill(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitcut.reports.show.show_path", fill)
    assert "No space left on device" in _error(["show", "empty"], capsys)


@pytest.mark.parametrize("flag", ["--memory-gib", "--memory_gib", "--memory-gib=-1"])
def test_dashes_and_underscores_are_both_taken(flag, capsys):
    arguments = [flag] if "=" in flag else [flag, "-1"]
    line = _error(["discover", *arguments], capsys)
    assert line == "memory-gib must be a finite number > 0, got -1.0"


@pytest.mark.parametrize("flag", ["--patch-size", "--patch_size"])
def test_flags_of_settings_take_both_too(flag, capsys):
    line = _error(["train", flag, "0"], capsys)
    assert "patch_size must be between 1 and 8192" in line


def test_a_dash_in_a_value_stays(capsys):
    assert "no-where" in _error(["prepare", "--source=no-where"], capsys)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(arguments, capsys):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, verb in VERBS.items():
        assert f"  {name} " in out
        assert verb.call.__doc__.splitlines()[0] in out


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_help_that_shows_dashes(name, capsys):
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: vitcut {name} ")
    flags = [word for word in out.split() if word.startswith("--")]
    assert not [flag for flag in flags if "_" in flag]
    assert name == "show" or len(flags) > 3


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vitcut 0.")


def test_pictures_are_prepared_and_the_next_step_named(capsys):
    assert main(["prepare", "--source", "drawn", "--image-size", "8"]) == 0
    out, _ = capsys.readouterr()
    assert "2400 images of 12 classes, 0 skipped" in out
    assert "next: vitcut train --source drawn --image-size 8 --task drawn\n" in out


def test_the_step_after_prepare_repeats_what_was_typed(place, capsys):
    for number in range(6):
        for name, colour in (("a", "red"), ("b", "blue")):
            folder = place / "two words" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    assert main(["prepare", "--source", "two words", "--skip-bad-images"]) == 0
    then = "next: vitcut train --source 'two words' --skip-bad-images --task LABELS.yaml\n"
    assert capsys.readouterr().out.endswith(then)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("animals", " --source TINY_IMAGENET.zip"),
        ("timm:vit_tiny_patch16_224", " --source IMAGES --task LABELS.yaml"),
        ("my runs", ""),
    ],
)
def test_the_step_after_checks_names_the_images(model, flags, place, monkeypatch, capsys):
    monkeypatch.setattr(cli, "VERBS", {"checks": _silent("checks")})
    (place / "my runs").mkdir()
    (place / "my runs" / "config.yaml").write_text("format_version: 2\n")
    for more in ([], ["--save", "costs.json"]):
        assert main(["checks", "--model", model, *more]) == 0
        costs = " --costs costs.json" if more else ""
        then = f"{shlex.quote(model)}{flags} --target-latency 0.2{costs}\n"
        assert capsys.readouterr().out.endswith(f"next: vitcut cut --model {then}")


def _silent(name, result=None):
    """A verb that does nothing, and gives what a real one would give."""
    verb = VERBS[name]
    call = wraps(verb.call)(lambda **_given: result)
    return replace(verb, call=call, show=None if result is None else verb.show, check=None)


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_the_step_after_a_search_fills_as_it_did_or_says_how_to_search(
    ablation, unloaded, monkeypatch, capsys
):
    circuit = Circuit.full(Graph(num_layers=1, num_heads=1), ablation=ablation)
    monkeypatch.setattr(cli, "VERBS", {"discover": _silent("discover", circuit)})
    assert main(["discover", "--ablation", ablation, "--out", "found"]) == 0
    out, _ = capsys.readouterr()
    assert out.endswith(f"next: vitcut cut found --point acdc-{ablation}-0.01\n")
    assert ("for a cut, search with --ablation mean" in out) == (ablation == "resample")


def test_the_step_after_a_training_is_a_search(unloaded, monkeypatch, capsys):
    monkeypatch.setattr(cli, "VERBS", {"train": _silent("train")})
    assert main(["train", *DRAWN, "--out", "out"]) == 0
    assert capsys.readouterr().out.endswith("next: vitcut discover --model out\n")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("runtimes", ("torch", "openvino")), ("batches", (1, 16)), ("batches", (8,))],
)
def test_lists_are_taken_with_and_without_brackets(flag, value, taken):
    plain, spaced = ",".join(map(str, value)), ", ".join(map(str, value))
    dashed = f"--{flag}"
    for typed in ([dashed, plain], [f"{dashed}={plain}"], [dashed, f"[{spaced}]"]):
        assert main(["bench", "runs/cut", *typed]) == 0
        assert getattr(taken.pop("bench")["settings"], flag) == value


@pytest.mark.parametrize("typed", ["0.5,0.25,0.5", "[0.5, 0.25, 0.5]"])
def test_numbers_per_channel_of_a_model_are_taken_in_both_ways_too(typed, taken):
    assert main(["discover", "--mean", typed, "--std", "0.5"]) == 0
    given = taken["load_model"]
    assert numbers("mean", given["mean"]) == (0.5, 0.25, 0.5)
    assert numbers("std", given["std"]) == (0.5,)


SWITCHES = [
    (["prepare"], "skip-bad-images", lambda found: found["prepare"]["skip_bad_images"]),
    (["train"], "compile", lambda found: found["train"]["settings"].compile),
    (["discover"], "random-weights", lambda found: found["load_model"]["random_weights"]),
    (["cut"], "merge", lambda found: found["cut"]["settings"].merge),
    (["cut"], "joint", lambda found: found["cut"]["budget"].joint),
    (["finetune"], "repair-dense", lambda found: found["finetune"]["repair_dense"]),
    (["show", "empty"], "plan", lambda found: found["show"]["plan"]),
]


@pytest.mark.parametrize(("words", "flag", "value"), SWITCHES)
def test_a_flag_of_yes_or_no_stands_alone_or_takes_a_word(words, flag, value, taken, monkeypatch):
    if words == ["finetune"]:
        words = ["finetune", "empty"]
        monkeypatch.setattr(cli, "find_cut", lambda path, _: path)
        monkeypatch.setattr("vitcut.compiler.cut.Cut.load", lambda path: path)
    for yes in ([f"--{flag}"], [f"--{flag}", "true"], [f"--{flag}=true"], [f"--{flag}", "Yes"]):
        assert main([*words, *yes]) == 0
        assert value(taken) is True
        taken.clear()
    for no in ([f"--{flag}", "false"], [f"--{flag}=false"]):
        assert main([*words, *no]) == 0
        assert value(taken) is False
        taken.clear()


def test_fields_of_one_name_share_a_flag_and_keep_their_own_defaults(taken):
    assert main(["cut", "--target-macs", "0.5"]) == 0
    assert (taken["cut"]["settings"].seed, taken["cut"]["bench"].threads) == (0, 1)
    assert main(["cut", "--target-macs", "0.5", "--seed", "3"]) == 0
    given = taken["cut"]
    assert {given[name].seed for name in ("budget", "settings", "bench")} == {3}


@pytest.mark.parametrize("words", [["discover"], ["train", *DRAWN]])
def test_a_seed_that_is_typed_leaves_the_splits_alone(words, taken):
    assert main([*words, "--seed", "3"]) == 0
    assert taken[words[0]]["settings"].seed == 3
    assert not {"seed", "val_fraction"} & taken["load_images"].keys()


@pytest.mark.parametrize(
    "typed", [["mine.yaml"], ["--config", "mine.yaml"], ["--config=mine.yaml"]]
)
def test_a_recipe_is_the_first_word_or_the_config(typed, taken):
    assert main(["run", *typed, "--vit.depth", "3", "--taus", "0.01,0.02", "--source=x"]) == 0
    found = taken["run"]
    changes = {"vit.depth": "3", "taus": "[0.01,0.02]", "data.source": "x"}
    assert (found["recipe"], found["out"], found["changes"]) == ("mine.yaml", "runs/mine", changes)
    assert main(["demo", "--skip-bad-images", "--cut.merge", "--train.patience=5"]) == 0
    changes = {"data.skip_bad_images": "true", "cut.merge": "true", "train.patience": "5"}
    assert taken["demo"]["changes"] == changes


def test_a_pretrained_model_is_trained_by_a_recipe_of_its_own(taken):
    scratch = TrainSettings()
    words = ["train", "--model", "animals", "--epochs", str(scratch.epochs)]
    assert main(words) == 0
    given = taken["train"]["settings"]
    assert (given.epochs, given.batch_size, given.max_shift_px) == (scratch.epochs, 32, None)
    assert taken["load_images"]["new_head"] is True
    assert main([*words, "--freeze", "backbone"]) == 0
    assert taken["train"]["settings"] == scratch
    assert main(["train", *DRAWN]) == 0
    assert (taken["train"]["settings"], taken["train"]["model"]) == (scratch, None)
    assert "new_head" not in taken["load_images"]


@pytest.mark.parametrize("words", [DRAWN, ["--model", "animals"]])
def test_a_training_computes_where_it_is_told_to(words, taken):
    assert main(["train", *words]) == 0
    assert taken["train"]["settings"].device == "auto"
    assert main(["train", *words, "--device", "cpu"]) == 0
    assert taken["train"]["settings"].device == "cpu"
    assert taken.get("load_model", {"device": "cpu"})["device"] == "cpu"


def test_the_recipe_of_fine_tuning_is_printed_with_its_changes(capsys):
    words = ["train", "--model", "animals", "--layer-decay", "0.5", "--print-config"]
    assert main(words) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["layer_decay"], printed["batch_size"]) == (8, 0.5, 32)


def test_a_recipe_is_printed_with_its_changes(capsys):
    assert main(["run", "demo", "--vit.depth", "5", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["vit"]["depth"], printed["taus"]) == (5, [0.03, 0.01, 0.003])
    assert main(["demo", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["ablations"] == ["mean"]


def test_the_help_of_run_names_the_recipes_and_how_to_change_them(capsys):
    text = _help("run", capsys)
    assert "Recipes: animals, animals-quick, demo, or a .yaml file" in text
    assert "--GROUP.NAME VALUE changes one of its values" in text
    assert "default: runs/RECIPE" in text


@pytest.mark.parametrize("name", VERBS)
def test_no_help_offers_what_is_always_refused(name, capsys):
    text = _help(name, capsys)
    if name != "export":
        assert "executorch" not in text
        assert "pt2" not in text
    if name == "discover":
        assert "linear" not in text


def _help(name, capsys):
    """With one space where the terminal's width makes a new line."""
    assert main([name, "--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_loads_no_torch():
    code = """
import sys
from vitcut.cli import LOADERS, VERBS, main
for words in [["--help"], *([name, "--help"] for name in VERBS)]:
    assert main(words) == 0
heavy = {"torch", "timm", "accelerate", "onnxruntime", "openvino", "pyarrow"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
