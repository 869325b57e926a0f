"""HTML pages in one file: a template, a stylesheet, a script and one JSON object.

The scripts, built from ``viewer/``, put every text of the JSON in as text, never as markup.
"""

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any


def assemble(kind: str, title: str, content: Any, **more: str) -> str:
    """A whole page.

    Args:
        kind: The folder in ``assets`` that holds the page's files, and their name.
        title: Any text.
        content: What the script reads, as JSON.
        **more: What stands for further @@NAMES@@ of the template, as it is.
    """
    assets = resources.files("vitcut") / "assets" / kind
    style, script, page = (
        (assets / f"{kind}.{suffix}").read_text(encoding="utf-8")
        for suffix in ("css", "js", "html")
    )
    values = {
        **more,
        "TITLE": html.escape(title),
        "STYLE_HASH": csp_hash(style),
        "SCRIPT_HASH": csp_hash(script),
        "STYLE": style,
        # Within a script element only "<" could end it or change what it is.
        "DATA": json.dumps(content, allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    parts = page.split("@@")
    parts[1::2] = [values[name] for name in parts[1::2]]
    return "".join(parts)


def csp_hash(text: str) -> str:
    """The hash by which a content security policy allows a script or a stylesheet."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
