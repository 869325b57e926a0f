"""The part of WordNet 3.0 above ImageNet-1k's classes; table and licence are in assets/wordnet."""

from dataclasses import dataclass, replace
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
    gloss: str
    """Its definition."""


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
        synset: Synset(names=names, hypernyms=tuple(hypernyms.split()), gloss=gloss)
        for synset, names, hypernyms, gloss in rows
    }


@cache
def imagenet_names() -> dict[str, str]:
    """The names of ImageNet-1k's classes, by id, in the usual order of the logits.

    The classes are the synsets of the table that are not an ancestor of another one.
    """
    ancestors = {above for synset in synsets().values() for above in synset.hypernyms}
    return {key: synset.names for key, synset in synsets().items() if key not in ancestors}


@cache
def imagenet_labels() -> Labels:
    """The classes of ImageNet-1k, in the usual order."""
    names = imagenet_names()
    return Labels(owner="ImageNet-1k", ids=tuple(names), names=tuple(names.values()))


def with_wordnet_ids(labels: Labels) -> Labels:
    """The same classes, with the WordNet id of each that has the name of one of ImageNet-1k's.

    Two cranes and two maillots have one name each. In a thousand classes that are ImageNet's in the
    usual order, their places tell them apart; elsewhere they get no id.
    """
    usual = imagenet_labels()
    pairs = labels.match(usual)
    in_order = len(labels.ids) == len(usual.ids) and all(at == at2 for at, at2 in pairs.items())
    if in_order and 2 * len(pairs) > len(usual.ids):
        pairs |= {at: at for at, near in enumerate(labels.may_be(usual)) if at in near}
    also = labels.also or (frozenset[str](),) * len(labels.ids)
    found = (own | {usual.ids[pairs[at]]} if at in pairs else own for at, own in enumerate(also))
    return replace(labels, also=tuple(found))


def known_synsets(labels: Labels) -> dict[str, int]:
    """Positions of the classes that are ImageNet-1k's, by WordNet id."""
    also = labels.also or ((),) * len(labels.ids)
    keys = ((key, at) for at, own in enumerate(labels.ids) for key in (own, *also[at]))
    return {key: at for key, at in keys if key in imagenet_names()}


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


@cache
def path_to(synset: str) -> tuple[str, ...]:
    """From the root down to the synset, always along the first hypernym."""
    above = synsets()[synset].hypernyms
    return (*(path_to(above[0]) if above else ()), synset)


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
