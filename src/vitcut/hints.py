"""What to type: examples, and what to type instead of what was typed. Loads no torch."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
}
"""Python's types, in words; of several, the first counts."""
_OTHER_WORDS = {
    "cut": "prune compress shrink slim compile",
    "discover": "search find circuit",
    "eval": "evaluate test validate accuracy",
    "predict": "classify infer",
    "bench": "benchmark time latency speed profile",
    "export": "convert onnx deploy ship quantize",
    "finetune": "fine-tune repair distill retrain recover",
    "train": "fit pretrain probe",
    "show": "view print results",
    "report": "plot draw html page visualize figure",
    "info": "inspect describe summary",
    "checks": "doctor calibrate environment",
    "suggest": "propose",
    "label": "annotate name classes group",
    "run": "recipe sweep experiment",
    "prepare": "download decode",
}
"""What people may type for a command, as long as no command of that name exists."""
EXAMPLES = {
    "demo": ("", "--out runs/try"),
    "run": ("demo", "animals-quick --source tiny-imagenet-200.zip --taus 0.03,0.01"),
    "prepare": (
        "--source tiny-imagenet-200.zip",
        "--source photos --image-size 224 --skip-bad-images",
    ),
    "suggest": ("--source tiny-imagenet-200.zip --out labels.yaml",),
    "label": (
        "--source photos --task pets.yaml --serve",
        "--source tiny-imagenet-200.zip --task new.yaml --model animals --out label.html",
    ),
    "train": (
        "--source photos --image-size 64",
        "--model timm:vit_tiny_patch16_224 --source flowers.zip --freeze backbone",
    ),
    "discover": ("--model animals --source tiny-imagenet-200.zip --tau 0.01",),
    "cut": (
        "--model animals --source tiny-imagenet-200.zip --target-macs 0.2",
        "--model timm:vit_tiny_patch16_224 --source photos --task pets.yaml --target-macs 0.5,0.3",
        "runs/discover --point acdc-mean-0.01",
    ),
    "finetune": ("runs/cut --epochs 6", "runs/demo --point acdc-mean-0.01"),
    "eval": (
        "runs/cut --against animals",
        "timm:vit_tiny_patch16_224 --source photos --task cats-dogs",
    ),
    "predict": ("runs/cut picture.jpg", "runs/cut photos --json"),
    "info": ("timm:vit_tiny_patch16_224", "runs/cut"),
    "bench": ("runs/cut --runtimes torch,onnxruntime --batches 1,8 --threads 2",),
    "export": ("runs/cut --to onnx", "runs/cut --to onnx,openvino --out runs/export"),
    "checks": ("", "--save costs.json"),
    "show": ("runs/cut", "runs/cut --plan"),
    "report": ("runs/demo --out report.html", "runs/cut runs/finetune --files csv,png"),
}
"""What people type after ``vitcut COMMAND``, for its help."""
_CLASS = re.compile(r"<class '([\w.]+)'>|typing\.(?=Literal)")
_REFUSED = re.compile(
    r"--(\S+): (?:Expected an? (?P<kind>.+?)\. Got value: (?P<value>.*)"
    r"|Does not validate .*? Subtypes: \[(?P<kinds>.*?)\] Errors: .* Given value: (?P<given>.*))"
)
"""A value of the wrong type, in jsonargparse's words."""


def argument_error(text: str, flags: Sequence[str], usage: str = "") -> str:
    """What jsonargparse says of an argument, as our own errors have it.

    Args:
        text: Its message, in one line.
        flags: The flags of the command, without dashes.
        usage: How the command is typed without flags, its other arguments in capitals.
    """
    text = _CLASS.sub(r"\1", re.sub(r'^Parser key "([\w.]+)":', r"--\1:", text))
    if found := _REFUSED.fullmatch(text):
        kinds = found["kind"] or found["kinds"]
        choices = re.findall(r"'([^']+)'", kinds) if "Literal" in kinds else []
        expected = f"one of {', '.join(choices)}" if choices else ""
        for kind, told in _KINDS.items():
            expected = expected or (told if re.search(rf"\b{kind}\b", kinds) else "")
        value = found["value"] if found["kind"] else found["given"]
        near = get_close_matches(value, choices, n=1)
        meant = f": did you mean {near[0]}?" if near else ""
        if expected:
            return f"{found[1].replace('_', '-')} must be {expected}, got {value}{meant}"
    if unknown := re.match(r"[Uu]nrecognized arguments: (--[\w.]+)", text):
        if unknown[1][2:].upper() in usage.split():
            return f"{unknown[1][2:]} is typed without {unknown[1]}: {usage}"
        near = get_close_matches(unknown[1], [f"--{name}" for name in flags], n=1)
        text += f": did you mean {near[0]}?" if near else ""
    return text.rstrip(".")


def nearest_verb(name: str, verbs: Mapping[str, str]) -> str:
    """What to type instead of a command that does not exist.

    Args:
        name: What was typed.
        verbs: What each command does, by its name.
    """
    meant = {word: verb for verb, words in _OTHER_WORDS.items() for word in words.split()}
    known = {**meant, **{verb: verb for verb in verbs}}
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    if not near:
        return f"expected one of {', '.join(verbs)}"
    verb = known[near[0]]
    return f"did you mean {verb}? ({verbs[verb].rstrip('.')})"
