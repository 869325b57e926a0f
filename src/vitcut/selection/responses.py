"""Responses: how the log-probabilities of a task move when parts are cut, image by image.

The response of a part u to being cut is s_u(x,y) = < grad log q(y|x), d_u(x) > for every image x
and coarse class y. The change d_u is what cutting u does to its activation, the fill's value minus
its own. Under ``mean`` and ``zero`` that value is fixed. Under ``linear`` it is predicted from the
parts that are still kept, so cutting a part changes d of the others at its site, the heads or the
neurons of one layer and token kind (optimal brain surgeon, Hassibi and Stork 1993).

What is held in memory: of every kept feature its activation, and of every token the gradients at
the stream right after each attention and MLP. Output weights turn those into the gradients of all
features. Where positions may be cut, attention patterns and values are held too. C classes take
C - 1 backward passes, since sum_y q grad log q(y|x) = 0.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from vitcut.circuit import Circuit
from vitcut.errors import CircuitError
from vitcut.graph import Graph, SiteKey
from vitcut.masked.fill import Fill
from vitcut.masked.fitting import SiteStatistics
from vitcut.masked.part_model import PartModel
from vitcut.metrics import coarse_log_probs
from vitcut.model.weights import ViTWeights
from vitcut.progress import track
from vitcut.selection.greedy import Alive, by_site
from vitcut.selection.positions import CutParts, PositionSite, PositionTrace
from vitcut.shapes import Bool, Float, Int, Tensor

_CHUNK_GIB = 0.75
"""Memory for the forward pass of one chunk of images, which its backward passes need."""
_MOST_IN_CHUNK = 16
"""Images; more would not be faster."""
_SPAN = 8
"""Images at a time when responses are summed over tokens: few enough to stay in the cache."""
_MOST_EXACT = 8
"""Backward passes. Up to one class more than this, every class is differentiated."""
_NUM_SKETCHES = 4
"""Beyond that, random mixtures of the classes are, and one direction for the slope."""
_HELD_AS = {torch.float32: torch.bfloat16}
"""How activations and gradients are held. Their rounding, 0.4 % of each value at most, averages out
over tokens: far below what the choice of images changes."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Turns responses into nats."""

    # The factor q / 2N makes the second-order term of the KL, 1/2 mean_x sum_y q (sum_u s_u)^2, a
    # plain squared norm: ||sum_u r_u||^2 with r = sqrt(q / 2N) s. Only products of two r occur, so
    # s is kept, each product is weighted with q / 2N, and no square root is taken.

    curvature: Float[Tensor, "responses"]
    """q / 2N of each class and image."""
    slope: Float[Tensor, "responses"]
    """- p / N of each class and image."""
    kept_interaction: float = 1.0
    """What is believed of how two parts interact; see `shrunk`."""
    kept_slope: float = 1.0
    """What is believed of the slopes."""

    def shrunk(
        self, responses: Iterable[Float[Tensor, "_parts responses"]], num_images: int
    ) -> "Objective":
        """An objective that believes of interactions and slopes what is not chance.

        There are more pairs of parts than images to tell how they interact: where thousands are
        chosen for their interactions, most of what is chosen is chance. So the matrix of
        interactions is shrunk towards its diagonal by the factor with the least expected error,
        and the slopes are shrunk towards zero in the same way (Ledoit and Wolf 2004,
        doi:10.1016/S0047-259X(03)00096-4, here with the diagonal as target). Several parts that
        are cut as one candidate are a single response: among them nothing is shrunk.

        Args:
            responses: Of all parts, site by site.
            num_images: N; a response belongs to image number (position modulo N).
        """
        like = self.curvature.double()
        products = like.new_zeros(len(like), len(like))
        own = own_by_image = slope = slope_by_image = 0.0
        for some in responses:
            # [parts, classes, images] of r, in float64: sums of fourth powers.
            r = (some.double() * like.sqrt()).unflatten(1, (-1, num_images))
            products += r.flatten(1).T @ r.flatten(1)
            own += float(r.flatten(1).square().sum(1).square().sum())
            own_by_image += float(r.square().sum(1).square().sum())
            slopes = (some.double() * self.slope.double()).unflatten(1, (-1, num_images)).sum(1)
            slope += float(slopes.sum(1).square().sum())
            slope_by_image += float(slopes.square().sum())
        # Over all pairs of parts, but not a part with itself: the squared interactions, and the
        # same image by image. Both follow from products of responses, not of parts.
        images = torch.arange(num_images, device=like.device)
        blocks = products.unflatten(0, (-1, num_images)).unflatten(2, (-1, num_images))
        by_image = float(blocks[:, images, :, images].square().sum())
        pairs = float(products.square().sum()) - own
        return replace(
            self,
            kept_interaction=_kept(pairs, by_image - own_by_image, num_images),
            kept_slope=_kept(slope, slope_by_image, num_images),
        )

    def of(self, response: Float[Tensor, "*parts responses"]) -> Float[Tensor, "*parts"]:
        """The rise of the KL for a response, b + ||r||^2, in nats."""
        return self.kept_slope * (response @ self.slope) + response.square() @ self.curvature

    def interaction(
        self, response: Float[Tensor, "*parts responses"], chosen: Float[Tensor, "responses"]
    ) -> Float[Tensor, "*parts"]:
        """What two responses cost together beyond their own rises, 2 < r, r' >, in nats."""
        return 2 * self.kept_interaction * (response @ (self.curvature * chosen))

    def mutual(self, responses: Float[Tensor, "parts responses"]) -> Float[Tensor, "parts parts"]:
        """The interaction of every two of some responses."""
        return 2 * self.kept_interaction * (responses * self.curvature) @ responses.T


def _kept(total: float, by_image: float, num_images: int) -> float:
    """Of squared sums over images, the fraction that is not the variance of those sums.

    Args:
        total: The squares of the sums.
        by_image: The squares of their terms, summed.
        num_images: The number of terms.
    """
    if num_images < 2 or total <= 0:
        return 1.0
    chance = (by_image - total / num_images) * num_images / (num_images - 1)
    return min(1.0, max(0.0, 1 - chance / total))


class Probes:
    """The mixtures of log-probabilities that are differentiated, one backward pass for each.

    Few classes: an orthonormal basis B of the vectors that sum to zero, from which the responses of
    all classes follow exactly, s = (B - 1 q' B) h. Many: sketches sum_y sqrt(q) e_y log q(y|x) with
    random signs e, whose squared responses estimate sum_y q s^2 without bias, and -sum_y p log q
    for the slope. With K sketches, the standard error of an estimated score is at most sqrt(2 / K)
    of an image's share in it, sqrt(2 / (K N)) of the whole where N images contribute alike: 4.6 %
    for 4 sketches and 232 images.
    """

    def __init__(self, num_images: int, num_classes: int, *, seed: int) -> None:
        """Choose the probes.

        Args:
            num_images: N, over all chunks.
            num_classes: Coarse classes C.
            seed: Of the random signs.
        """
        self._num_images = num_images
        self.basis: Float[Tensor, "groups probes"] | None = None
        self._signs: Float[Tensor, "sketches images groups"] | None = None
        if num_classes <= _MOST_EXACT + 1:
            # An orthonormal basis whose first vector is constant; the others sum to zero.
            start = torch.cat([torch.ones(num_classes, 1), torch.eye(num_classes)[:, 1:]], 1)
            self.basis = torch.linalg.qr(start.double()).Q[:, 1:]
            self.num = num_classes - 1
        else:
            draw = torch.Generator().manual_seed(seed)
            shape = (_NUM_SKETCHES, num_images, num_classes)
            self._signs = torch.randint(0, 2, shape, generator=draw, dtype=torch.int8) * 2 - 1
            self.num = _NUM_SKETCHES + 1

    def weights(
        self,
        log_p: Float[Tensor, "images groups"],
        log_q: Float[Tensor, "images groups"],
        first: int,
    ) -> Iterator[Float[Tensor, "#images groups"]]:
        """The weight of each log-probability in each probe, for images from ``first`` on."""
        if self.basis is not None:
            yield from self.basis.T.to(log_q)[:, None]
        elif self._signs is not None:
            for signs in self._signs[:, first : first + len(log_q)]:
                yield (log_q / 2).exp() * signs.to(log_q)
            yield -log_p.exp()

    def expand(
        self, found: Float[Tensor, "probes images *parts"], log_q: Float[Tensor, "images groups"]
    ) -> Float[Tensor, "responses *parts"]:
        """The responses of all classes, or of the sketches, in the order of `objective`."""
        if self.basis is None:
            return found.flatten(0, 1)
        basis = self.basis.to(found)
        q = log_q.to(found).exp()
        spread = basis[None] - (q @ basis)[:, None]  # [images, classes, probes]
        return torch.einsum("nck,kn...->cn...", spread, found).flatten(0, 1)

    def objective(
        self, log_p: Float[Tensor, "images groups"], log_q: Float[Tensor, "images groups"]
    ) -> Objective:
        """What turns expanded responses into nats."""
        images = self._num_images
        if self.basis is not None:
            return Objective(
                curvature=log_q.exp().T.flatten() / (2 * images),
                slope=-log_p.exp().T.flatten() / images,
            )
        like = log_q.new_zeros(self.num, images)
        curvature, slope = like.clone(), like.clone()
        curvature[:-1], slope[-1] = 1 / (2 * images * (self.num - 1)), 1 / images
        return Objective(curvature=curvature.flatten(), slope=slope.flatten())


class Site(CutParts):
    """The heads or the neurons of one layer and token kind, and the responses to cutting them."""

    def __init__(
        self,
        place: SiteKey,
        alive: Bool[Tensor, "parts"],
        *,
        centred: Float[Tensor, "images tokens features"],
        gradients: Float[Tensor, "probes images tokens width"],
        writes: Float[Tensor, "width features"],
        expand: Callable[[Float[Tensor, "probes images *parts"]], Tensor],
        covariance: Float[Tensor, "features features"] | None = None,
    ) -> None:
        """Take over the activations of the parts that are alive; features are theirs alone.

        Args:
            place: Where the site is.
            alive: True for the parts that are not cut.
            centred: z of the heads (head_dim features per head), or hidden units (one feature per
                neuron), minus what a cut part becomes where nothing predicts it.
            gradients: Of each probe, at the stream that the site writes into.
            writes: What each feature adds to the stream; changed as parts are cut.
            expand: Makes the responses of all classes from those to the probes.
            covariance: Positive definite; predicts parts from one another. Without it none is.
        """
        super().__init__(place, alive)
        self._centred, self._gradients = centred, gradients
        self._writes, self._expand = writes.clone(), expand
        # Features are numbered among the parts that were alive at the start.
        self._held = alive.nonzero().flatten()
        self._size = centred.shape[2] // max(1, len(self._held))
        # [features, features]: the inverse covariance of the features that are alive, else zero.
        self._precision = None if covariance is None else torch.linalg.inv(covariance)
        # [probes, images, features]: the response to each feature if nothing predicts it.
        self._alone: Tensor | None = None

    def responses(self) -> Float[Tensor, "parts responses"]:
        """The response to cutting each part alone; zero for parts that are cut."""
        kept = self._features(self.alive)
        missed = None if self._precision is None else self._residuals(self._precision, kept)
        shape = (*self._gradients.shape[:2], int(kept.sum()))
        found = self._writes.new_zeros(shape)
        alone = found if missed is None else torch.empty_like(found)
        writes, dtype = self._writes[:, kept], self._writes.dtype
        for first in range(0, shape[1], _SPAN):
            span = slice(first, first + _SPAN)
            values = -self._centred[span][..., kept].to(dtype)
            change = None if missed is None else values @ missed
            for probe, gradients in enumerate(self._gradients[:, span]):
                along = gradients.to(dtype) @ writes
                if change is not None:
                    found[probe, span] = (along * change).sum(1)
                alone[probe, span] = along.mul_(values).sum(1)
        self._alone = found.new_zeros(*shape[:2], len(kept))
        self._alone[..., kept] = alone
        by_part = self._expand(found.unflatten(2, (-1, self._size)).sum(3))
        # [all parts of the site, responses]
        everything = found.new_zeros(len(self.alive), len(by_part))
        everything[self.alive] = by_part.T
        return everything

    def _residuals(
        self, precision: Float[Tensor, "features features"], kept: Bool[Tensor, "features"]
    ) -> Float[Tensor, "kept kept"]:
        """Times centred activations from the left: what all others leave unexplained of a part."""
        # With P the inverse covariance of what is alive, that is P_uu^-1 P_u: x for part u, so one
        # inverse gives the regressions of every part on its rest.
        blocks = precision[kept][:, kept].unflatten(0, (-1, self._size))
        numbers = torch.arange(len(blocks), device=blocks.device)
        own = blocks.unflatten(2, (-1, self._size))[numbers, :, numbers]
        return torch.linalg.solve(own, blocks).flatten(0, 1).T.to(self._writes.dtype)

    def whole_response(self) -> Float[Tensor, "responses"]:
        """The response to cutting all that is left and all that was cut since the last refresh.

        Nothing of the site stays, so nothing is predicted.
        """
        if self._alone is None:
            self.responses()
        alone = self._writes.new_zeros(()) if self._alone is None else self._alone
        return self._expand(alone @ self._features(self.alive | self._pending).to(alone))

    def refresh(self) -> Float[Tensor, "responses"]:
        """Let the others take over from the parts that were cut; return the response to those cuts.

        This is the update of optimal brain surgeon: the inverse covariance P of the kept parts K
        follows from the one before, with the gone parts G, by a downdate of rank |G|,

            P_KK - P_KG P_GG^-1 P_GK,    and K predicts G by R = - P_GG^-1 P_GK,

        so only the small block of G is inverted, not the covariance of a whole layer.
        """
        gone, kept = self._features(self._pending), self._features(self.alive)
        self._pending[:] = False
        self._alone = None
        # What the change of each gone part is, from the right of centred activations.
        missed = -torch.eye(len(gone)).to(self._writes)[:, gone]
        writes = self._writes[:, gone]
        if self._precision is not None and bool(kept.any()):
            precision = self._precision
            within = torch.linalg.inv(precision[gone][:, gone])
            across = precision[gone] * kept
            # Only what the kept parts cannot predict of the gone ones changes the stream.
            missed = -(precision[:, gone] @ within).to(self._writes)
            # From here on a change of a kept part also moves what it writes for the gone ones.
            self._writes = self._writes - writes @ (within @ across).to(self._writes)
            self._precision = (precision - across.T @ within @ across) * (kept[:, None] & kept)
        found = self._writes.new_empty(self._gradients.shape[:2])
        for first in range(0, found.shape[1], _SPAN):
            span = slice(first, first + _SPAN)
            # What the cut takes out of the stream, [images, tokens, width].
            taken = self._centred[span].to(missed) @ missed @ writes.T
            found[:, span] = (self._gradients[:, span].to(taken) * taken).sum((2, 3))
        return self._expand(found)

    def _features(self, parts: Bool[Tensor, "parts"]) -> Bool[Tensor, "features"]:
        """Which features belong to some parts, among those that were alive at the start."""
        return parts[self._held].repeat_interleave(self._size)


def held_gib(
    weights: ViTWeights, graph: Graph, num_images: int, num_classes: int, *, positions: bool
) -> float:
    """Memory that a trace of the uncut model takes, in GiB; ``positions``: if they may be cut."""
    probes, rows = Probes(1, num_classes, seed=0).num, weights.rows_of(graph)
    num_answers = num_classes if probes == num_classes - 1 else probes
    alive = Alive.useful(graph, weights.num_neurons)
    values = squares = singles = 0
    for place, parts in by_site(alive.heads, alive.neurons).items():
        features = int(parts.sum()) * _size(weights, place)
        if features:
            tokens = len(range(weights.num_tokens)[rows[place[2]]])
            values += num_images * tokens * (probes * weights.width + features)
            if positions and place[1] == "heads":
                # Patterns, [queries, tokens] per head, and values.
                pattern = int(parts.sum()) * tokens * weights.num_tokens
                values += num_images * (pattern + weights.num_tokens * features)
            squares += features**2  # The inverse covariance, in float64.
            # Responses of parts and of features, and the writes of the model and of the site.
            responses = num_images * (int(parts.sum()) * num_answers + features * probes)
            singles += responses + 2 * weights.width * features
    size = torch.finfo(_HELD_AS.get(weights.dtype, weights.dtype)).bits / 8
    singles *= torch.finfo(weights.dtype).bits // 8
    return (values * size + squares * 8 + singles) / 2**30 + _CHUNK_GIB


def trace_sites(
    weights: ViTWeights,
    pixels: Float[Tensor, "images channels y x"],
    group_of_class: Int[Tensor, "classes"],
    circuit: Circuit,
    fill: Fill,
    *,
    alive: Alive,
    log_p: Float[Tensor, "images groups"],
    statistics: dict[SiteKey, SiteStatistics] | None,
    seed: int = 0,
) -> tuple[list[Site | PositionSite], Objective]:
    """Run a cut model on some images, and give all of its sites that still have parts.

    Args:
        weights: The uncut model, in the precision to compute with.
        pixels: Normalised images.
        group_of_class: The group number of each class of the model.
        circuit: What is kept so far.
        fill: The fill of the circuit.
        alive: The parts that are not cut.
        log_p: The task distribution of the uncut model on the same images.
        statistics: Under a linear fill, the statistics of each site, which predict parts from one
            another; emptied, to free memory. None: cut parts get the values of the fill.
        seed: Of the random signs for tasks with many classes.
    """
    images, classes = log_p.shape
    held, like = _HELD_AS.get(weights.dtype, weights.dtype), weights.patch_weight
    probes = Probes(images, classes, seed=seed)
    model = PartModel(weights, circuit, fill)
    weights = weights.at(circuit.positions)
    fill = fill.on(weights)
    left = {
        place: torch.from_numpy(parts.copy())
        for place, parts in by_site(alive.heads, alive.neurons).items()
        if parts.any()
    }
    # Per site, centred activations [images, tokens, features] and gradients [probes, images,
    # tokens, width]: allocated once and filled chunk by chunk, so that no two copies ever exist.
    centred: dict[SiteKey, Tensor] = {}
    gradients: dict[SiteKey, Tensor] = {}
    chosen: dict[SiteKey, Tensor] = {}
    replaced: dict[SiteKey, Tensor] = {}
    covariances: dict[SiteKey, Tensor] = {}
    for place, parts in left.items():
        span = model.rows[place[2]]
        tokens = len(range(weights.num_tokens)[span])
        # The model may keep parts that `alive` has not: those that reach nothing.
        features = parts.repeat_interleave(_size(weights, place)).nonzero().flatten()
        chosen[place] = torch.isin(model.sites[place].features.cpu(), features)
        if statistics is None:
            means = _fill_values(weights, fill, place, span)
        else:
            site = statistics.pop(place)
            means, covariances[place] = site.means, site.covariance[features][:, features]
        replaced[place] = means[:, features].to(like)
        centred[place] = like.new_empty(images, tokens, len(features), dtype=held)
        gradients[place] = like.new_empty(probes.num, images, tokens, weights.width, dtype=held)
    positions = PositionTrace(
        model, weights, alive, chosen, num_images=images, num_probes=probes.num, held=held
    )
    log_q = log_p.new_empty(images, classes)
    step = _chunk_size(weights)
    starts = range(0, images, step)
    for start in track(starts, "gradients", len(starts), unit="batches"):
        span = slice(start, start + step)
        chunk = pixels[span].to(weights.device, weights.dtype)
        with torch.enable_grad():
            # The pixels are the only leaf; without one autograd would not record the pass.
            pool = positions.leaf(chunk)
            run = model.run(chunk.detach().requires_grad_(), trace=True, log_weights=pool)
            log_probs = coarse_log_probs(run.logits, group_of_class, classes)
            log_q[span] = log_probs.detach()
            mixtures = [
                (log_probs * mixed).sum()
                for mixed in probes.weights(log_p[span], log_q[span], start)
            ]
        for place, values in centred.items():
            kept = run.writes[place].features.detach()[..., chosen[place]]
            values[span] = kept - replaced[place]
        streams = [run.writes[place].stream for place in gradients]
        leaves = streams if pool is None else [*streams, pool]
        positions.keep(span, run)
        for probe, found in enumerate(_differentiate(mixtures, leaves)):
            for values, gradient in zip(gradients.values(), found, strict=False):
                values[probe, span] = gradient
            if pool is not None:
                positions.keep_pool(probe, span, found[-1])
    expand = partial(probes.expand, log_q=log_q)
    writes = {place: model.sites[place].writes[:, own] for place, own in chosen.items()}
    sites: list[Site | PositionSite] = [*positions.sites(gradients, writes, expand)]
    sites += [
        Site(
            place,
            parts.to(like.device),
            centred=centred.pop(place),
            gradients=gradients.pop(place),
            writes=writes[place],
            expand=expand,
            covariance=covariances.pop(place, None),
        )
        for place, parts in left.items()
    ]
    return sites, probes.objective(log_p, log_q)


def _differentiate(
    mixtures: Sequence[Float[Tensor, ""]], leaves: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """The gradients of each mixture, zero for a leaf that it does not depend on."""
    for number, mixture in enumerate(mixtures):
        yield torch.autograd.grad(
            mixture,
            leaves,
            retain_graph=number < len(mixtures) - 1,
            allow_unused=True,
            materialize_grads=True,
        )


def _size(weights: ViTWeights, place: SiteKey) -> int:
    """Features of one part of a site."""
    return weights.blocks[0].attn.q_weight.shape[1] if place[1] == "heads" else 1


def _chunk_size(weights: ViTWeights) -> int:
    """Images per forward pass and its backward passes."""
    # What autograd keeps of a block: the stream, norms, q, k, v, z, writes, and of the hidden units
    # their inputs and values.
    per_token = len(weights.blocks) * (16 * weights.width + 4 * weights.num_neurons)
    per_image = per_token * weights.num_tokens * torch.finfo(weights.dtype).bits / 8
    return max(1, min(_MOST_IN_CHUNK, int(_CHUNK_GIB * 2**30 / per_image)))


def _fill_values(
    weights: ViTWeights, fill: Fill, place: SiteKey, rows: slice
) -> Float[Tensor, "tokens features"]:
    """What the parts of a site become under a fill without maps."""
    layer, parts, _ = place
    if parts == "neurons":
        if fill.neurons is None:
            raise CircuitError("neurons are to be cut, but the fill has no values for them")
        return fill.neurons[layer, rows]
    first = weights.graph.head_source(layer, 0)
    tables = fill.sources[first : first + weights.num_heads, rows].double()
    # The fill holds what heads write into the stream, [heads, tokens, width]. Responses are taken
    # at z, before the output projection; any z that writes the same has the same effect.
    inverse = torch.linalg.pinv(weights.blocks[layer].attn.out_weight.double())
    return torch.einsum("hdw,htw->thd", inverse, tables).flatten(1)
