"""The part of WordNet 3.0 above ImageNet-1k's classes; table and licence are in assets/wordnet."""

from dataclasses import dataclass
from functools import cache
from importlib import resources

from vitcut.labels import Labels, plain_name


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One meaning in WordNet."""

    names: str
    """Its synonyms, separated by commas, as ImageNet lists them."""
    hypernyms: tuple[str, ...]
    """The ids of the next more general synsets, in WordNet's order; none for the root."""


@cache
def synsets() -> dict[str, Synset]:
    """Every synset of the table, by id, in the order of the ids."""
    table = resources.files("vitcut") / "assets" / "wordnet" / "imagenet-1k.tsv"
    rows = (
        line.split("\t")
        for line in table.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    return {
        synset: Synset(names=names, hypernyms=tuple(hypernyms.split()))
        for synset, names, hypernyms in rows
    }


@cache
def imagenet_names() -> dict[str, str]:
    """The names of ImageNet-1k's classes, by id, in the usual order of the logits.

    The classes are the synsets of the table that are not an ancestor of another one.
    """
    ancestors = {above for synset in synsets().values() for above in synset.hypernyms}
    return {key: synset.names for key, synset in synsets().items() if key not in ancestors}


def imagenet_labels() -> Labels:
    """The classes of ImageNet-1k, in the usual order."""
    names = imagenet_names()
    return Labels(owner="ImageNet-1k", ids=tuple(names), names=tuple(names.values()))


@cache
def classes_below() -> dict[str, tuple[str, ...]]:
    """The classes of ImageNet-1k below every synset, by its id; a class is below itself."""
    below: dict[str, list[str]] = {key: [] for key in synsets()}
    for class_id in imagenet_names():
        above, waiting = {class_id}, [class_id]
        while waiting:
            found = set(synsets()[waiting.pop()].hypernyms) - above
            above |= found
            waiting.extend(found)
        for key in above:
            below[key].append(class_id)
    return {key: tuple(classes) for key, classes in below.items()}


def find_synsets(written: str) -> tuple[str, ...]:
    """The ids of the synsets that have an id or a name, whatever its case."""
    if written in synsets():
        return (written,)
    return _synsets_of_name().get(plain_name(written), ())


@cache
def _synsets_of_name() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for key, synset in synsets().items():
        for name in map(plain_name, synset.names.split(",")):
            found[name] = (*found.get(name, ()), key)
    return found
