"""What a model says of itself wherever it goes: its pictures, classes, groups and origin."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from vitcut.compact.plan import Plan
from vitcut.errors import ArtefactError, ConfigError
from vitcut.preprocessing import Preprocessing

NOTE, NOTE_VERSION = "vitcut", 1
"""Under which name a file for other software has the model's `ModelInfo.note`, and its version."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a user of a model needs to know besides its tensors."""

    preprocessing: Preprocessing | None = None
    """How pictures become what the model takes; None where that is not known."""
    class_names: tuple[str, ...] = ()
    """One per logit; empty if unknown."""
    group_names: tuple[str, ...] = ()
    group_of_class: tuple[int, ...] = ()
    """The group number of each class."""
    source_model: str | None = None
    """What the model was cut from."""
    source_sha256: str | None = None
    """Hash of the weights it was cut from."""

    def complete(self, num_classes: int) -> "ModelInfo":
        """The same with numbers for names that are unknown, and a group per class without groups.

        Args:
            num_classes: The number of logits.
        """
        names = self.class_names or tuple(map(str, range(num_classes)))
        if self.group_of_class:
            return replace(self, class_names=names)
        groups = tuple(range(len(names)))
        return replace(self, class_names=names, group_names=names, group_of_class=groups)

    def note(self, **more: Any) -> str:
        """What a file for other software says of its model, in JSON."""
        return json.dumps({"format_version": NOTE_VERSION, **asdict(self), **more})

    def require_fit(self, plan: Plan) -> None:
        """Check that this describes a model of that plan.

        Raises:
            ArtefactError: It does not.
        """
        taken, shape = self.preprocessing, plan.shape
        classes, groups = len(self.class_names), len(self.group_names)
        if taken is not None and (taken.image_size, taken.framing.channels) != (
            shape.image_size,
            shape.channels,
        ):
            raise ArtefactError(
                f"images of {taken.image_size} pixels and {taken.framing.channels} channels for a "
                f"model that takes {shape.image_size} and {shape.channels}; save the model again"
            )
        if (
            classes not in {0, shape.num_classes}
            or len(self.group_of_class) not in {0, shape.num_classes}
            or not all(0 <= group < groups for group in self.group_of_class)
            or len(set(self.group_names)) < groups
        ):
            raise ArtefactError(
                f"{classes} names and {len(self.group_of_class)} groups of {groups} for "
                f"{shape.num_classes} logits; save the model again"
            )


def preprocessing_of(info: ModelInfo) -> Preprocessing:
    """How images are prepared for a model.

    Raises:
        ConfigError: It does not say.
    """
    if info.preprocessing is None:
        raise ConfigError(
            "the model does not say how its images are made: set model.info to a ModelInfo "
            "with its preprocessing"
        )
    return info.preprocessing
