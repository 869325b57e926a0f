from vitcut.benchmark.tables import point_table, print_table, to_markdown
from vitcut.results import Comparison, Latency, Point, Results


def latency(median_ms: float) -> Latency:
    return Latency(
        runtime="onnxruntime",
        device="cpu",
        dtype="float32",
        batch=64,
        threads=1,
        median_ms=median_ms,
        p10_ms=median_ms,
        p90_ms=median_ms,
        images_per_s=64000 / median_ms,
    )


def comparison(low: float) -> Comparison:
    return Comparison(
        point="tau-0.01",
        against="dense",
        runtime="onnxruntime",
        batch=64,
        threads=1,
        ratio=4.0,
        low=low,
        high=4.25,
    )


def results(low: float = 3.75) -> Results:
    cut = Point(
        name="tau-0.01",
        tau=0.01,
        edges_total=200,
        edges_kept=11,
        heads_total=48,
        heads_kept=7,
        accuracy_coarse=0.7289,
        kl=0.82,
        macs=4_200_000,
        latency=(latency(20.0),),
    )
    dense = Point(name="dense", accuracy_coarse=0.737, macs=23_200_000, latency=(latency(1061.0),))
    compared = (comparison(low),)
    return Results(task="animals", machine={}, dense=dense, points=(cut,), comparisons=compared)


def test_a_row_says_what_was_cut_kept_and_gained():
    table = point_table(results())
    assert table.rows[1] == (
        "tau-0.01", "0.01", "94.5 %", "7 of 48", "72.9 %", "0.820", "4.20 M",
        "-", "-", "20.00", "4.00x (3.75-4.25)",
    )  # fmt: skip
    assert len(table.headers) == len(table.rows[1])


def test_the_dense_model_comes_first_with_dashes_where_nothing_was_cut():
    dense = point_table(results(), batches=(64,)).rows[0]
    assert dense == ("dense", "-", "-", "-", "73.7 %", "-", "23.20 M", "1061.00", "-")


def test_a_speedup_that_is_not_shown_stands_in_brackets():
    assert point_table(results(low=0.9)).rows[1][-1] == "[4.00x (0.90-4.25)]"


def test_latency_of_another_runtime_is_not_shown():
    row = point_table(results(), runtime="torch").rows[1]
    assert row[-4:] == ("-", "-", "-", "-")


def test_markdown_has_a_line_per_point_and_equal_columns():
    lines = to_markdown(point_table(results())).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {12}
    assert lines[1].startswith("| --- | ---: |")


def test_a_bar_in_a_name_does_not_break_markdown():
    named = results().with_point(Point(name="a|b"))
    assert r"| a\|b |" in to_markdown(point_table(named))


def test_a_table_goes_to_standard_output_in_whole_cells(capsys):
    print_table(point_table(results(low=0.9)), title="animals")
    shown = capsys.readouterr()
    assert "[4.00x (0.90-4.25)]" in shown.out
    assert "tau-0.01" in shown.out
    assert shown.err == ""


def test_brackets_in_a_name_are_shown_and_not_taken_for_a_style(capsys):
    print_table(point_table(results().with_point(Point(name="[bold]cut"))))
    assert "[bold]cut" in capsys.readouterr().out
