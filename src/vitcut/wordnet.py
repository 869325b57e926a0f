"""The part of WordNet 3.0 above ImageNet-1k's classes; table and licence are in assets/wordnet."""

from dataclasses import dataclass
from functools import cache
from importlib import resources


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
