from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cost_models, split_circuits, vits
from test_plan import ALL, CLS, PLAN, STREAM
from tiny import REFERENCE

from vitcut.compact.operations import count_macs, dense_macs, describe, operations
from vitcut.compact.plan import (
    AttentionPlan,
    BlockPlan,
    HeadSetPlan,
    OutputPlan,
    ProjectionPlan,
)
from vitcut.compiler.planning import plan_circuit


@st.composite
def plans(draw):
    weights = draw(vits())
    return plan_circuit(weights.shape, draw(split_circuits(weights)), draw(cost_models()))


@given(plans())
@settings(max_examples=100)
def test_the_lines_of_the_table_add_up_to_all_macs(plan):
    lines = describe(plan)
    assert sum(line.macs for line in lines) == count_macs(plan)
    parts = ["embed", *(f"block {number}" for number in range(len(plan.blocks))), "classifier"]
    assert list(dict.fromkeys(line.part for line in lines)) == parts
    assert {operation.part for operation in operations(plan)} <= set(parts)


@given(plans())
@settings(max_examples=100)
def test_smooth_operations_have_the_same_products(plan):
    plain, smooth = (
        [item for item in operations(plan, smooth=smooth) if item.macs] for smooth in (False, True)
    )
    assert smooth == plain


def test_the_reference_model_has_23_2_million_macs():
    assert dense_macs(REFERENCE) == 23_204_224
    assert dense_macs(REFERENCE.at(np.arange(64) < 9)) == 23_204_224, "of all patches"


def test_a_small_plan_is_counted_by_hand():
    patches, mlp, classifier = 4 * 6 * 12, 2 * 5 * 6 * 7, 6 * 4
    assert count_macs(PLAN) == patches + mlp + classifier


def with_attention(*head_sets, projections=(), outputs=()):
    attention = AttentionPlan(
        streams=(STREAM,), projections=projections, head_sets=head_sets, outputs=outputs
    )
    block = BlockPlan(attention=attention, mlps=())
    return replace(PLAN, blocks=(block,), embeds=False)


def head_set(heads, rows, *constant, **direct):
    plain = {"queries": (), "keys": (), "values": (), "merged_values": False}
    return HeadSetPlan(heads=heads, rows=rows, constant=constant, **(plain | direct))


def test_a_fixed_pattern_is_one_product_and_the_class_token_one_query():
    plan = with_attention(
        head_set((0,), ALL, "q", "k"),
        head_set((1,), CLS, "k"),
        projections=(ProjectionPlan(streams=(0,), rows=ALL, q=(), k=(), v=(0, 1)),),
        outputs=(OutputPlan(name="out.0.0", head_set=0, heads=(0,), rows=CLS, bias=True),),
    )
    values, fixed, attended, output = 5 * 6 * 2 * 3, 5 * 5 * 3, 2 * 5 * 3, 3 * 6
    assert count_macs(plan) == values + fixed + attended + output + 6 * 4


def test_a_query_that_meets_the_tokens_directly_pays_width_instead_of_keys():
    plan = with_attention(head_set((0, 1), CLS, keys=(0,), values=(0,)))
    weights, tokens = 2 * (2 * 3 * 6), 2 * (2 * 5 * 6)
    assert count_macs(plan) == weights + tokens + 6 * 4
    constant = with_attention(head_set((0, 1), CLS, "q", keys=(0,), values=(0,)))
    assert count_macs(constant) == count_macs(plan) - 2 * 3 * 6


def test_merged_weights_pay_the_width_twice():
    merged = head_set((0, 1), CLS, queries=(0,), keys=(0,), values=(0,), merged_values=True)
    output = OutputPlan(name="out.0.0", head_set=0, heads=(0, 1), rows=CLS, bias=True)
    plan = with_attention(merged, outputs=(output,))
    assert count_macs(plan) == 2 * (2 * 6 * 6) + 2 * (2 * 5 * 6) + 6 * 4


def test_a_block_has_a_line_for_each_range_of_tokens():
    plan = with_attention(
        head_set((0,), ALL),
        head_set((0, 1), CLS, keys=(0,), values=(0,)),
        projections=(ProjectionPlan(streams=(0,), rows=ALL, q=(0,), k=(0,), v=(0,)),),
    )
    _, first, second, _ = describe(plan)
    assert (first.tokens, first.heads, first.absorbed, first.query_rows) == ("cls", 2, 2, 1)
    assert (second.tokens, second.heads, second.absorbed) == ("cls + patch", 1, 0)
    assert (first.streams, second.streams, second.query_rows) == (0, 1, 5)
