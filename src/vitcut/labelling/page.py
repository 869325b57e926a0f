"""What the label page holds: the classes, what WordNet says of them, pictures, and a label file."""

import base64
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from vitcut.errors import DataError, TaskError
from vitcut.groupings import suggest
from vitcut.labelling.gallery import Gallery
from vitcut.labels import Labels
from vitcut.pages import assemble
from vitcut.progress import say, track
from vitcut.task import Task, parse_labels
from vitcut.wordnet import imagenet_names, path_to, synsets

_GROUPS = 6
"""How many groups are suggested, as by `vitcut.suggest`."""
_SIDE = 128
"""Of the pictures in a file, in pixels."""
_SERVED, _IN_FILE = "img-src 'self' data:; connect-src 'self'", "img-src data:"
"""What a page that is served may load, and one that is a file."""


def read_label_file(path: Path, labels: Labels) -> str:
    """The text of a label file that names classes by the data's ids; it may be unfinished.

    Where the file on disk names them otherwise, as by ancestors, classes are listed one by one.

    Args:
        path: It need not be there.
        labels: The data's classes.

    Raises:
        TaskError: It cannot be read, is no label file, or names classes that the data lacks.
    """
    if not path.exists():
        empty = {"name": path.stem, "excluded": {}, "groups": {}}
        return yaml.safe_dump(empty, sort_keys=False, allow_unicode=True)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read the label file {path}: {error}") from None
    found = parse_labels(text, origin=str(path))
    if found["folders"]:
        raise TaskError(
            f"{path} has 'folders', so its classes are a model's: the label page groups classes of "
            "the data; give another --task"
        )
    plain = "groups" in yaml.load(text, yaml.BaseLoader)
    plain &= not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    if plain and {item.id for item in found["classes"]} <= set(labels.ids):
        return text
    listed = Task(**found).among(labels).to_dict()
    say(f"{path} does not list its classes by their ids: the page does, and comments are lost")
    # What is not listed is the rest's.
    listed["groups"].pop(found["rest"], None)
    return yaml.safe_dump(listed, sort_keys=False, allow_unicode=True)


def page_of(
    gallery: Gallery, text: str, *, task: Path, source: str, pictures: int, served: bool
) -> str:
    """The whole page.

    Args:
        gallery: The classes and their pictures.
        text: The label file to start from.
        task: The name of the label file.
        source: The name of the source.
        pictures: How many of each class the page shows at first; a file holds no more.
        served: Whether a server has the pictures and keeps the label file.
    """
    content: dict[str, Any] = {
        "version": version("vitcut"),
        "source": source,
        "file": task.name,
        "text": text,
        "served": served,
        "first": pictures,
        "classes": [_class(gallery, number) for number in range(len(gallery.labels.ids))],
        "suggested": _suggested(gallery.labels),
        "taken": {
            str(number): {
                str(at): gallery.taken_for[row]
                for at, row in enumerate(own)
                if row in gallery.taken_for
            }
            for number, own in enumerate(gallery.shown)
        },
    }
    numbers = range(len(gallery.shown))
    if pictures and served:
        content["pictures"] = [len(own) for own in gallery.shown]
    elif pictures:
        content["pictures"] = [
            [_embedded(gallery, at) for at in gallery.shown[number][:pictures]]
            for number in track(numbers, "Pictures", len(numbers), unit="classes")
        ]
    return assemble(
        "label", f"{task.name}, {source}", content, LOADS=_SERVED if served else _IN_FILE
    )


def _class(gallery: Gallery, number: int) -> dict[str, Any]:
    own, name = gallery.labels.ids[number], gallery.labels.names[number]
    told: dict[str, Any] = {"id": own, "name": name.split(",")[0].strip() or own}
    synset = _synset(gallery.labels, number)
    if synset is not None:
        found = synsets()[synset]
        above = [synsets()[key].names.split(",")[0] for key in path_to(synset)[:-1]]
        told["wordnet"] = {"id": synset, "names": found.names, "gloss": found.gloss, "above": above}
    if gallery.answers:
        told["answers"] = gallery.answers[number]
    return told


def _synset(labels: Labels, number: int) -> str | None:
    """The WordNet id of a class, which may be a more general one than ImageNet's classes."""
    if labels.ids[number] in synsets():
        return labels.ids[number]
    also = labels.also[number] if labels.also else frozenset[str]()
    return min(also & synsets().keys(), default=None)


def _suggested(labels: Labels) -> dict[str, str]:
    """A group for each class that is ImageNet's, by id."""
    synset_of = {own: _synset(labels, number) for number, own in enumerate(labels.ids)}
    known = {key for key in synset_of.values() if key in imagenet_names()}
    if len(known) < 2:
        return {}
    task = suggest(sorted(known), min(_GROUPS, len(known)), "suggested")
    group_of = {item.id: item.group for item in task.classes}
    return {own: group_of[key] for own, key in synset_of.items() if key in group_of}


def _embedded(gallery: Gallery, position: int) -> str | None:
    try:
        picture = gallery.thumbnail(position, _SIDE)
    except DataError:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
