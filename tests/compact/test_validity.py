"""Plans are checked as a whole: whatever is compiled passes, and nothing out of place does."""

import json
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import cost_models, skipping_a_head, split_circuits, vits
from tiny import random_vit

from vitcut.circuit import Circuit
from vitcut.compact.plan import Plan
from vitcut.compact.validity import find_fault
from vitcut.compiler.planning import plan_circuit
from vitcut.errors import ArtefactError

WEIGHTS = random_vit(num_heads=3, num_prefix=2, num_read=1, patch_readout="mean")
UNCUT = plan_circuit(WEIGHTS.shape, Circuit.full(WEIGHTS.split_graph))


@given(st.data())
@settings(max_examples=60)
def test_every_plan_that_is_compiled_can_be_read_back(data):
    weights = data.draw(vits())
    circuit, costs = data.draw(split_circuits(weights)), data.draw(cost_models())
    plan = plan_circuit(weights.shape, circuit, costs)
    assert find_fault(plan) is None
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(split_circuits(WEIGHTS), cost_models(), st.integers(0, 10**6))
@example(skipping_a_head(WEIGHTS.graph), None, 0)
@settings(max_examples=40)
def test_an_index_or_a_range_out_of_place_is_refused(circuit, costs, drawn):
    """One number of the plan is changed to one beyond all sizes, or to a negative one."""
    content = plan_circuit(WEIGHTS.shape, circuit, costs).to_dict()
    places = [place for place in _numbers(content) if place[0] != "shape"]
    if not places:
        return
    *path, last = places[drawn % len(places)]
    inner = content
    for key in path:
        inner = inner[key]
    for value in (-1 - inner[last], 10**6):
        changed = json.loads(json.dumps(content))
        place = changed
        for key in path:
            place = place[key]
        place[last] = value
        with pytest.raises(ArtefactError) as caught:
            Plan.from_dict(changed)
        assert "\n" not in str(caught.value)


def _numbers(content, place=()):
    if isinstance(content, (dict, list, tuple)):
        inner = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in inner:
            yield from _numbers(value, (*place, key))
    elif type(content) is int:
        yield place


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c["shape"].update(num_layers=3), "2 blocks, its shape says 3"),
        (lambda c: c["shape"].update(image_size=5), "do not fill 5 pixels"),
        (lambda c: c["shape"].update(width=2**40), "width must be from 1"),
        (lambda c: c["shape"].update(width=0), "width must be from 1"),
        (lambda c: c["shape"].update(num_read=3), "reads 3 of 2 prefix tokens"),
        (lambda c: c["shape"].update(eps=0.0), "eps must be between"),
        *(
            (lambda c, kept=kept: c["shape"].update(kept_patches=kept), "are not rising numbers")
            for kept in ([], [1, 0, 2, 3], [0, 1, 1, 2], [0, 1, 2, 4], [-1, 0, 1, 2])
        ),
        (lambda c: c["shape"].update(kept_patches=[0, 2, 3]), "tokens 0 to 6 of 5"),
        (lambda c: c.update(embeds=False), "was not written before"),
        (lambda c: c["readout"].reverse(), "reads other tokens than its readout"),
        (lambda c: c["readout"].append(c["readout"][0]), "reads other tokens than its readout"),
        (lambda c: c["readout"][0]["terms"].clear(), "table of"),
        (lambda c: c["blocks"][0]["mlps"][0].update(name="embed"), "embed is written twice"),
        (lambda c: c["blocks"][0]["mlps"].clear(), "was not written before"),
        (lambda c: c["blocks"][0].update(attention=None), "was not written before"),
        (lambda c: c["blocks"][0]["attention"]["outputs"].clear(), "without heads or outputs"),
        (lambda c: c["blocks"][0]["attention"]["projections"].clear(), "no projection computes"),
        (
            lambda c: c["blocks"][0]["attention"]["outputs"][0].update(heads=[0, 0]),
            r"is of heads \[0, 0\]",
        ),
        (
            lambda c: c["blocks"][0]["attention"]["head_sets"][0].update(constant=["v", "q"]),
            "with constant v, q",
        ),
    ],
)
def test_a_plan_that_cannot_be_computed_is_refused_with_what_is_wrong(change, fault):
    content = json.loads(json.dumps(UNCUT.to_dict()))
    change(content)
    with pytest.raises(ArtefactError, match=fault) as caught:
        Plan.from_dict(content)
    assert str(caught.value).endswith("save the model again")


def test_a_product_without_a_bias_needs_a_reader():
    mlp = UNCUT.blocks[1].mlps[0]
    unread = replace(mlp, name="mlp.unread", bias=False, stream=replace(mlp.stream, name="more"))
    block = replace(UNCUT.blocks[1], mlps=(*UNCUT.blocks[1].mlps, unread))
    fault = find_fault(replace(UNCUT, blocks=(UNCUT.blocks[0], block)))
    assert fault == "nothing reads mlp.unread, so that nothing holds its bias"
