"""Pretrained weights of timm, faked: a file that timm reads, and resizes, as it does its own."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn


def fake_pretrained(
    patched: pytest.MonkeyPatch, name: str, path: Path, *, num_classes: int
) -> nn.Module:
    """The weights that ``timm.create_model(name, pretrained=True)`` finds from now on."""
    torch.manual_seed(0)
    create = timm.create_model
    model = create(name, num_classes=num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save(model.state_dict(), path)
    own = {"file": str(path), "num_classes": num_classes, "custom_load": False}

    def created(asked, **given):
        return create(asked, **given, **({"pretrained_cfg_overlay": own} if asked == name else {}))

    patched.setattr(timm, "create_model", created)
    return model.eval()
