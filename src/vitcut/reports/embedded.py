"""A cut model in the report's page: the browser answers pictures with it, and nothing is sent."""

import base64
import gzip
import tempfile
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from vitcut.circuit import Circuit
from vitcut.compact.info import preprocessing_of
from vitcut.compact.model import CompactViT
from vitcut.errors import ArtefactError, ConfigError
from vitcut.pages import csp_hash
from vitcut.results import Results
from vitcut.runs import CIRCUIT_FILE, find_cut


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """The model of one point, as the page holds it."""

    point: str
    parts: tuple[str, ...]
    """Heads and MLPs, in the order of what they wrote."""
    groups: tuple[str, ...]
    turned: bool
    """Whether pictures are turned as their EXIF entry says."""
    onnx: bytes

    @classmethod
    def of(cls, run: Path, results: Results | None, point: str | None) -> "EmbeddedModel":
        """Write the model of a run for the page.

        Args:
            run: The run directory.
            results: What was measured in it.
            point: The point whose model is wanted; None takes the run's only one.

        Raises:
            ArtefactError: There is no such model, or it is damaged.
            ExactnessError: The page would compute something else than the model.
        """
        from vitcut.exports.watched import write_watched

        found = () if results is None else results.points
        folder = next((run / one.model for one in found if one.name == point and one.model), None)
        folder = find_cut(run, None) if folder is None else folder
        model = CompactViT.from_pretrained(folder)
        if model.plan.shape.channels not in {1, 3}:
            raise ConfigError("with-model takes a model of pictures in grey or RGB")
        taken = preprocessing_of(model.info)
        info = replace(model.info, preprocessing=taken).complete(model.plan.shape.num_classes)
        if not (folder / CIRCUIT_FILE).is_file():
            raise ArtefactError(f"{folder} holds no {CIRCUIT_FILE}: cut the model again")
        by_kind = bool(Circuit.load(folder / CIRCUIT_FILE).graph.kinds)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.onnx"
            parts = write_watched(model, info, path, by_kind=by_kind)
            onnx = path.read_bytes()
        return cls(
            point=point or "model",
            parts=tuple(parts),
            groups=info.group_names,
            turned=taken.framing.orientation == "apply",
            onnx=onnx,
        )

    def elements(self) -> dict[str, str]:
        """For `pages.assemble`: ONNX Runtime, the model, and the script that runs it."""
        assets = resources.files("vitcut") / "assets" / "report"
        script = (assets / "model.js").read_text(encoding="utf-8")
        runtime = (assets / "runtime.wasm.gz").read_bytes()
        held = {"runtime": runtime, "model": gzip.compress(self.onnx, mtime=0)}
        kind = "application/octet-stream"
        elements = [
            f'\n<script type="{kind}" id="{name}">{base64.b64encode(content).decode()}</script>'
            for name, content in held.items()
        ]
        return {
            "MODEL_POLICY": f" 'sha256-{csp_hash(script)}' 'wasm-unsafe-eval'",
            "MODEL": "".join(elements) + f'\n<script type="module">{script}</script>',
        }
