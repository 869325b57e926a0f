"""Stream merging of a cut: what a circuit costs for it, and what it came to.

Which edges come back is decided by ``compiler/merging.py``.
"""

from typing import Any

from torch import nn

from vitcut.benchmark.evaluation import Evaluation, evaluate
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.compact.operations import describe
from vitcut.compact.plan import Plan, ViTShape
from vitcut.compiler.cost import CostModel
from vitcut.compiler.merging import MERGES, Cost, merge_streams
from vitcut.compiler.planning import plan_circuit
from vitcut.pipeline.subject import Subject


def merge(subject: Subject, circuit: Circuit, costs: CostModel) -> Circuit:
    """Merge the streams of a circuit for the batch size of a cost model."""
    shape = subject.weights.shape
    return merge_streams(circuit, merge_cost(shape, costs), shape)


def merge_cost(shape: ViTShape, costs: CostModel) -> Cost:
    """What merging brings down: the predicted milliseconds of a call."""
    return lambda circuit: costs.latency_ms(plan_circuit(shape, circuit, costs))


def num_streams(plan: Plan) -> int:
    """How many sums with a LayerNorm a compact model has."""
    return sum(row.streams for row in describe(plan))


def merge_facts(
    subject: Subject, before: CompactViT | None, after: CompactViT, circuit: Circuit
) -> dict[str, Any]:
    """What came back, and what that does: streams and KL, before and after.

    Args:
        subject: The model and images.
        before: The compact model of the circuit that was merged; None where nothing was.
        after: That of the merged one.
        circuit: The merged circuit, of whose merges this is the last.
    """
    if before is None:
        streams = num_streams(after.plan)
        return {"edges_restored": 0, "streams": [streams, streams], "kl": None}
    dense = _evaluated(subject, subject.model.model)
    return {
        "edges_restored": circuit.provenance[MERGES][-1]["edges_restored"],
        "streams": [num_streams(model.plan) for model in (before, after)],
        "kl": [_evaluated(subject, model, dense).kl for model in (before, after)],
    }


def _evaluated(subject: Subject, model: nn.Module, dense: Evaluation | None = None) -> Evaluation:
    """On the val images: the test images are for reporting."""
    return evaluate(
        model,
        subject.images.val,
        group_of_class=subject.task.group_of_class,
        preprocess=subject.normalise,
        reference_log_probs=None if dense is None else dense.log_probs,
    )
