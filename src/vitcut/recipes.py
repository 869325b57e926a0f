"""Recipes: the settings of a whole run, one group per stage, in one YAML file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from vitcut.benchmark.settings import BenchSettings
from vitcut.compiler.settings import CutSettings
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError, one_line
from vitcut.images.settings import DataSettings
from vitcut.model.settings import VitSettings
from vitcut.names import EdgeAblation
from vitcut.selection.settings import Budget
from vitcut.settings import require_positive
from vitcut.training.settings import FinetuneSettings, TrainSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Train a ViT, find its circuits at several tau, cut each, and measure all of them."""

    task: str = "animals"
    """Name of a shipped task, or path of a label file."""
    data: DataSettings = field(default_factory=DataSettings)
    """The images."""
    vit: VitSettings = field(default_factory=VitSettings)
    """The dense model."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """Its training."""
    discover: DiscoverSettings = field(default_factory=DiscoverSettings)
    """The search; its tau and ablation are replaced by each of ``taus`` and ``ablations``."""
    taus: tuple[float, ...] = (0.01,)
    """ACDC's thresholds in nats; one point each."""
    ablations: tuple[EdgeAblation, ...] = ("mean",)
    """What stands in for cut edges while searching; each at every tau."""
    select: Budget = field(default_factory=Budget)
    """One more point, cut to a budget under linear ablation; none where there is no budget."""
    repair: FinetuneSettings | None = None
    """The repair of that point; none if None."""
    cut: CutSettings = field(default_factory=CutSettings)
    """The compilation; merging is for the points of ``taus``, not for that of a budget."""
    bench: BenchSettings = field(default_factory=BenchSettings)
    """The timing."""

    def __post_init__(self) -> None:
        if self.repair is not None and not self.select.is_given:
            raise ConfigError("repair needs a budget: give select.target_macs")
        for tau in self.taus:
            require_positive("taus", tau)
        for name, values in (("taus", self.taus), ("ablations", self.ablations)):
            if not values or len(set(values)) < len(values):
                listed = ", ".join(map(str, values)) or "none"
                raise ConfigError(f"{name} must be one or more different ones, got {listed}")


def recipe_names() -> list[str]:
    """The recipes that come with vitcut."""
    folder = resources.files("vitcut") / "assets" / "recipes"
    return sorted(Path(item.name).stem for item in folder.iterdir())


def read_recipe(recipe: str | Path, changes: Mapping[str, Any] | None = None) -> RunSettings:
    """Read a recipe, and change some of its values.

    Args:
        recipe: A shipped recipe's name, or the path of a YAML file.
        changes: By dotted key, such as ``{"train.epochs": 2}``; texts are read as YAML.

    Raises:
        ConfigError: There is no such recipe, or a key or value is not one of `RunSettings`.
    """
    path = Path(recipe)
    if path.suffix not in {".yaml", ".yml"}:
        if str(recipe) not in recipe_names():
            raise ConfigError(
                f"no recipe {str(recipe)!r}: expected one of {', '.join(recipe_names())}, or a "
                ".yaml file"
            )
        path = Path(str(resources.files("vitcut"))) / "assets" / "recipes" / f"{recipe}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for key, value in (changes or {}).items():
            *groups, name = key.split(".")
            place = content
            for group in groups:
                place[group] = place.get(group) or {}
                place = place[group]
            place[name] = yaml.safe_load(value) if isinstance(value, str) else value
    except FileNotFoundError:
        raise ConfigError(f"no recipe file at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is no readable recipe: {one_line(error)}") from None
    return settings_from(content, str(path))


def settings_from(content: Any, origin: str) -> RunSettings:
    """Settings from nested values, checked against the types of `RunSettings`.

    Args:
        content: Values by name; a single value may stand for a list of one.
        origin: The file, for messages.

    Raises:
        ConfigError: A key is unknown, or a value is of another type or out of range.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} is no recipe: expected settings by name")
    listed = {
        name: [content[name]]
        for name in ("taus", "ablations")
        if name in content and not isinstance(content[name], (list, tuple))
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunSettings, "run")
    try:
        return parser.instantiate(parser.parse_object({"run": {**content, **listed}})).run
    except (ArgumentError, TypeError) as error:
        text = one_line(error)
        unknown = re.search(r"option '([\w.]+)'", text, re.IGNORECASE)
        if unknown is None:
            raise ConfigError(f"{origin}: {text.replace('run.', '')}") from None
        known = [key.removeprefix("run.") for key in parser.get_defaults().keys()]  # noqa: SIM118
        near = get_close_matches(unknown[1], [*known, *FinetuneSettings.__dataclass_fields__], n=1)
        hint = f"did you mean {near[0]}?" if near else "vitcut run demo --print-config shows them"
        raise ConfigError(f"{origin} has no setting {unknown[1]!r}: {hint}") from None
