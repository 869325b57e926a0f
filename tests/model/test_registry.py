"""A fast part of what benchmarks/registry.py walks: the committed table still holds."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^\| `(.+)` \| (\w+) \| (.*) \|$", re.MULTILINE)
TABLE = {
    name: (outcome, detail)
    for name, outcome, detail in LINE.findall(
        (ROOT / "docs" / "supported-models.md").read_text(encoding="utf-8")
    )
}


@pytest.fixture(scope="module")
def registry():
    spec = importlib.util.spec_from_file_location("registry", ROOT / "benchmarks" / "registry.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "eva02_tiny_patch14_224",
        "test_vit",
        "test_vit4",
        "vit_tiny_patch16_224",
        "vit_wee_patch16_reg1_gap_256",
        "beit_base_patch16_224",
        "cait_xxs24_224",
        "levit_128s",
        "swin_tiny_patch4_window7_224",
        "vit_tiny_r_s16_p8_224",
        "xcit_nano_12_p8_224",
    ],
)
def test_a_model_is_read_or_refused_as_the_table_says(registry, name):
    outcome, detail = registry.check(name)
    expected, said = TABLE[name]
    assert outcome == expected
    assert detail.split(";")[0] == said.split(";")[0]


def test_the_table_names_every_model_and_nothing_went_wrong(registry):
    assert list(TABLE) == registry.names()
    assert {outcome for outcome, _ in TABLE.values()} == {"exact", "refused"}
