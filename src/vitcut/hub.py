"""Access to the Hugging Face Hub that fails within seconds where there is no network."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from vitcut.errors import ModelError

TIMM, HUB = "timm:", "hf-hub:"
"""Prefixes of model names."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ANSWERS_WITHIN_S = 5.0


@contextmanager
def hub_access() -> Generator[None]:
    """Use the Hub inside this block; where it does not answer, only what was downloaded before.

    Its own client tries again for more than a minute.

    Raises:
        ConnectionError: The Hub does not answer, and the block failed without it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before, problem = constants.HF_HUB_OFFLINE, None
    if not before:
        try:
            get_session().head(constants.ENDPOINT, timeout=_ANSWERS_WITHIN_S)
        # The client's library, and with it the class of its errors, differs by version.
        except Exception as error:
            problem = " ".join(str(error).split()) or type(error).__name__
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception:
        if problem is None:
            raise
        raise ConnectionError(
            f"{constants.ENDPOINT} does not answer ({problem}), and it was not downloaded before: "
            "check the network, or give a folder or file"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = before


def is_hub_id(model: str) -> bool:
    """Whether this can only be the name of a repository on the Hugging Face hub.

    Not if its first part is a folder here, or ``runs``, where results go if no ``--out`` is given.
    """
    parent = Path(model).parent
    here = parent.exists() or parent.name == "runs"
    return HUB_ID.fullmatch(model) is not None and not here


def require_there(model: str) -> None:
    """Refuse the path of a model where nothing is, before what reads models is imported.

    Raises:
        ModelError: Nothing is there.
    """
    if not model.startswith((TIMM, HUB)) and not Path(model.removeprefix("local-dir:")).exists():
        raise ModelError(
            f"no model at {model}: expected a folder with config.json, a run directory, a file of "
            "weights, timm:NAME, hf-hub:REPOSITORY, or animals"
        )
