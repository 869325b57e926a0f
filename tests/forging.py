"""Change a file that vitcut wrote as a forger would: with the right hash."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from vitcut.store import hash_of_read


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``change`` to a sealed JSON or YAML file, and seal it again."""
    is_yaml = path.suffix == ".yaml"
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) if is_yaml else json.loads(text)
    change(content)
    content = {key: value for key, value in content.items() if key != "sha256"}
    content["sha256"] = hash_of_read(content)
    dump = yaml.safe_dump(content, sort_keys=False) if is_yaml else json.dumps(content)
    path.write_text(dump, encoding="utf-8")
