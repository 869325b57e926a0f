from dataclasses import replace

from test_plan import ALL, CLS, PLAN, STREAM
from tiny import REFERENCE

from vitcut.compact.operations import count_macs, dense_macs, describe
from vitcut.compact.plan import (
    AttentionPlan,
    BlockPlan,
    HeadSetPlan,
    OutputPlan,
    ProjectionPlan,
)


def test_the_reference_model_has_23_2_million_macs():
    assert dense_macs(REFERENCE) == 23_204_224


def test_a_small_plan_is_counted_by_hand():
    patches, mlp, classifier = 4 * 6 * 12, 2 * 5 * 6 * 7, 6 * 4
    assert count_macs(PLAN) == patches + mlp + classifier


def with_attention(*groups, projections=(), outputs=()):
    attention = AttentionPlan(
        streams=(STREAM,), projections=projections, head_sets=groups, outputs=outputs
    )
    block = BlockPlan(attention=attention, mlps=())
    return replace(PLAN, blocks=(block,), embeds=False)


def head_group(heads, rows, *constant, **direct):
    plain = {"queries": (), "keys": (), "values": (), "merged_values": False}
    return HeadSetPlan(heads=heads, rows=rows, constant=constant, **(plain | direct))


def test_a_fixed_pattern_is_one_product_and_the_class_token_one_query():
    plan = with_attention(
        head_group((0,), ALL, "q", "k"),
        head_group((1,), CLS, "k"),
        projections=(ProjectionPlan(streams=(0,), rows=ALL, q=(), k=(), v=(0, 1)),),
        outputs=(OutputPlan(name="out.0.0", head_set=0, heads=(0,), rows=CLS, bias=True),),
    )
    values, fixed, attended, output = 5 * 6 * 2 * 3, 5 * 5 * 3, 2 * 5 * 3, 3 * 6
    assert count_macs(plan) == values + fixed + attended + output + 6 * 4


def test_a_query_that_meets_the_tokens_directly_pays_width_instead_of_keys():
    plan = with_attention(head_group((0, 1), CLS, keys=(0,), values=(0,)))
    weights, tokens = 2 * (2 * 3 * 6), 2 * (2 * 5 * 6)
    assert count_macs(plan) == weights + tokens + 6 * 4
    constant = with_attention(head_group((0, 1), CLS, "q", keys=(0,), values=(0,)))
    assert count_macs(constant) == count_macs(plan) - 2 * 3 * 6


def test_merged_weights_pay_the_width_twice():
    group = head_group((0, 1), CLS, queries=(0,), keys=(0,), values=(0,), merged_values=True)
    output = OutputPlan(name="out.0.0", head_set=0, heads=(0, 1), rows=CLS, bias=True)
    plan = with_attention(group, outputs=(output,))
    assert count_macs(plan) == 2 * (2 * 6 * 6) + 2 * (2 * 5 * 6) + 6 * 4


def test_a_block_has_a_line_for_each_range_of_tokens():
    plan = with_attention(
        head_group((0,), ALL),
        head_group((0, 1), CLS, keys=(0,), values=(0,)),
        projections=(ProjectionPlan(streams=(0,), rows=ALL, q=(0,), k=(0,), v=(0,)),),
    )
    _, first, second, _ = describe(plan)
    assert (first.tokens, first.heads, first.absorbed, first.query_rows) == ("cls", 2, 2, 1)
    assert (second.tokens, second.heads, second.absorbed) == ("cls + patch", 1, 0)
    assert (first.streams, second.streams, second.query_rows) == (0, 1, 5)
