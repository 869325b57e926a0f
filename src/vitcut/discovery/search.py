"""Discover circuits: the pairs of a task, and a search for any tau on the same activations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vitcut.circuit import Circuit
from vitcut.discovery.acdc import Search, acdc
from vitcut.discovery.cache import Cache, require_room
from vitcut.discovery.settings import DiscoverSettings
from vitcut.errors import ConfigError, TaskError
from vitcut.images.load import Images, normalise
from vitcut.masked.oracle import Examples, Oracle
from vitcut.model.model import Model
from vitcut.model.weights import ViTWeights
from vitcut.names import PairMode
from vitcut.runs import CIRCUIT_FILE, Run
from vitcut.settings import as_plain
from vitcut.shapes import Float, Int, Tensor


def make_examples(
    pixels: Float[Tensor, "images channels y x"],
    groups: NDArray[np.int64],
    group_of_class: Int[Tensor, "classes"],
    settings: DiscoverSettings,
) -> Examples:
    """Pair images with corrupted ones of other groups.

    Args:
        pixels: Normalised calibration images.
        groups: The coarse group number of each image, shape [images].
        group_of_class: The group number of each class of the model.
        settings: How images are paired, and the seed.

    Raises:
        TaskError: Fewer than two groups are present.
    """
    clean, corrupted = make_pairs(groups, settings.pairs, seed=settings.seed)
    return Examples(pixels=pixels, clean=clean, corrupted=corrupted, group_of_class=group_of_class)


def make_pairs(
    groups: NDArray[np.int64], mode: PairMode, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw corrupted images for every image, from other coarse groups.

    Args:
        groups: The coarse group number of each image, shape [images].
        mode: "each_other_group": one image of each other group that is present, in ascending order
            of groups; "one_random": one image, all those of other groups being equally likely.
        seed: Equal seeds give equal pairs.

    Returns:
        The clean images of all pairs, ascending, and their corrupted ones; both index the images.

    Raises:
        TaskError: Fewer than two groups are present.
    """
    present = np.unique(groups)
    if len(present) < 2:
        raise TaskError(
            f"pairs need images of at least 2 groups, got {len(present)}: "
            "use more images or another task"
        )
    rng = np.random.default_rng(seed)
    images = np.arange(len(groups))
    if mode == "one_random":
        corrupted = np.empty_like(images)
        for group in present:
            inside = groups == group
            corrupted[inside] = rng.choice(images[~inside], size=inside.sum())
        return images, corrupted
    # [groups present, images]: a candidate from each group; that of the own group is not used.
    draws = np.stack([rng.choice(images[groups == group], size=len(images)) for group in present])
    other = groups[:, np.newaxis] != present
    return np.nonzero(other)[0], draws.T[other]


class Discovery:
    """One model and one set of pairs; a circuit for any tau, from the same cached activations.

    Attributes:
        oracle: Measures circuits by definition; its graph is that of the circuits found.
    """

    def __init__(self, weights: ViTWeights, examples: Examples, settings: DiscoverSettings) -> None:
        """Measure the full model and trace the images.

        Raises:
            ConfigError: The search does not fit into ``settings.memory_gib``.
        """
        # Before the oracle measures the full model, which takes minutes for a large one.
        require_room(weights, examples, settings)
        self._weights = weights
        self._settings = settings
        self.oracle = Oracle(weights, examples, settings.ablation, tokens=settings.tokens)
        self._cache = Cache.build(weights, self.oracle, settings)

    @property
    def num_pairs(self) -> int:
        """Pairs that the KL divergence is averaged over; images under ``mean`` and ``zero``."""
        return len(self.oracle.examples.clean)

    def find(self, tau: float, *, log: Path | None = None) -> Search:
        """Search the circuit for one tau.

        Args:
            tau: In place of the one in the settings.
            log: Decisions are appended to this file; a log cut short by a kill is continued.

        Raises:
            ArtefactError: ``log`` belongs to another search.
            ExactnessError: The fast path lost more precision than tau allows for.
        """
        settings = replace(self._settings, tau=tau)
        return acdc(self._weights, self.oracle, settings, cache=self._cache, log=log)


def find_circuits(
    model: Model, images: Images, settings: DiscoverSettings, taus: Sequence[float], run: Run
) -> Iterator[tuple[str, Circuit]]:
    """The name and circuit of the point at each tau, all from the same cached activations.

    Args:
        model: For the task of the images.
        images: Calibration images are drawn from their train split.
        settings: The search.
        taus: In place of the one in the settings.
        run: Keeps circuits and decisions; what it holds already is read back.
    """
    discovery: Discovery | None = None
    for tau in taus:
        name = f"{settings.method}-{settings.ablation}-{tau:g}"
        folder = Path("points") / name

        def find(tau: float = tau, folder: Path = folder) -> Circuit:
            nonlocal discovery
            if discovery is None:
                chosen = images.calibration(settings.images, seed=settings.seed)
                groups = images.task.group_of_class
                pixels = normalise(chosen.all(), model.preprocessing)
                examples = make_examples(
                    pixels,
                    images.task.group_of_label[chosen.labels],
                    torch.from_numpy(groups),
                    settings,
                )
                discovery = Discovery(model.weights, examples, settings)
            log = None if run.is_temporary else run.path / folder / "decisions.jsonl"
            found = discovery.find(tau, log=log)
            return Circuit(
                graph=discovery.oracle.graph,
                kept=found.kept,
                ablation=settings.ablation,
                method=settings.method,
                task=images.task.name,
                tau=tau,
                provenance={
                    "model": model.public_name,
                    "weight_hash": model.weight_hash,
                    "images_fingerprint": images.fingerprint,
                    "settings": as_plain(replace(settings, tau=tau)),
                    "kl": found.kl,
                    "pairs": discovery.num_pairs,
                    "node_evaluations": found.node_evaluations,
                    "oracle_calls": found.oracle_calls,
                    "precision": found.precision,
                    "seconds": None if found.seconds is None else round(found.seconds, 2),
                },
            )

        circuit = run.once(str(folder / CIRCUIT_FILE), find, Circuit.load)
        circuit.require_origin(model.weight_hash, images.fingerprint)
        if circuit.tau != tau:
            raise ConfigError(
                f"{run.path / folder} holds a circuit of tau {circuit.tau!r}, not {tau!r}, which "
                "has the same name: choose another --out"
            )
        yield name, circuit
