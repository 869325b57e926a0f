"""Settings of the data stage."""

import subprocess
import sys

import pytest

from vitcut.errors import ConfigError
from vitcut.images.settings import DataSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": " "},
        {"image_size": 4},
        {"seed": -1},
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"val_fraction": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DataSettings(**wrong)


def test_settings_load_neither_torch_nor_numpy() -> None:
    code = (
        "import vitcut.images.settings, sys; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
