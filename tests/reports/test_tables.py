from dataclasses import replace

from vitcut.reports.tables import point_table, print_table, split_table, to_markdown, verdict
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
        "20.00", "4.00x (3.75-4.25)",
    )  # fmt: skip
    assert len(table.headers) == len(table.rows[1])


def test_a_part_circuit_says_what_it_keeps_and_nothing_of_edges():
    cut, dense = results().points[0], results().dense
    part = replace(cut, tau=None, granularity="part", neurons_kept_fraction=0.125)
    table = point_table(replace(results(), points=(part,), comparisons=()))
    assert table.headers[:6] == (
        "point", "heads kept", "neurons kept", "coarse accuracy", "KL", "MACs",
    )  # fmt: skip
    assert table.rows[1][:4] == ("tau-0.01", "7 of 48", "12.5 %", "72.9 %")
    both = point_table(replace(results(), points=(cut, replace(part, name="part")), dense=dense))
    assert both.headers[1:5] == ("tau", "edges cut", "heads kept", "neurons kept")
    assert both.rows[1][1:5] == ("0.01", "94.5 %", "7 of 48", "-")
    assert both.rows[2][1:5] == ("-", "-", "7 of 48", "12.5 %")


def test_an_uncut_model_alone_has_no_columns_of_cuts():
    whole = Point(name="class-only", edges_total=200, edges_kept=200)
    table = point_table(Results(task="", machine={}, points=(whole,)))
    assert table.headers == ("point", "heads kept", "coarse accuracy", "KL", "MACs")


def test_the_dense_model_comes_first_with_dashes_where_nothing_was_cut():
    dense = point_table(results()).rows[0]
    assert dense == ("dense", "-", "-", "-", "73.7 %", "-", "23.20 M", "1061.00", "-")


def test_a_speedup_that_is_not_shown_stands_in_brackets():
    assert point_table(results(low=0.9)).rows[1][-1] == "[4.00x (0.90-4.25)]"


def measured(*places: tuple[str, int], compared: tuple[str, ...] = ()) -> Results:
    """A cut model timed in these runtimes at these batch sizes."""
    times = tuple(replace(latency(2.0), runtime=name, batch=batch) for name, batch in places)
    return Results(
        task="animals",
        machine={},
        points=(Point(name="tau-0.01", latency=times),),
        comparisons=tuple(
            replace(comparison(1.5), against=against, runtime=name, batch=batch)
            for against in compared
            for name, batch in places
        ),
    )


def latency_headers(results: Results, **options) -> list[str]:
    return [header for header in point_table(results, **options).headers if "batch" in header]


def test_every_batch_size_that_was_measured_has_columns_in_order():
    assert latency_headers(measured(("torch", 8), ("torch", 2))) == [
        "torch ms, batch 2", "speed-up, batch 2", "torch ms, batch 8", "speed-up, batch 8",
    ]  # fmt: skip


def test_onnxruntime_is_preferred_and_another_runtime_shown_where_it_is_asked_for():
    both = measured(("torch", 1), ("onnxruntime", 4))
    assert latency_headers(both)[0] == "onnxruntime ms, batch 4"
    assert latency_headers(both, runtime="torch")[0] == "torch ms, batch 1"


def test_nothing_is_said_of_a_runtime_that_was_not_measured():
    assert latency_headers(measured(("torch", 1)), runtime="onnxruntime") == []
    assert latency_headers(measured()) == []


def test_the_largest_batch_is_also_compared_with_the_class_only_model():
    table = point_table(measured(("torch", 2), ("torch", 8), compared=("dense", "class-only")))
    assert [header for header in table.headers if "against" in header] == [
        "against class-only, batch 8"
    ]
    assert table.rows[0][-1] == "4.00x (1.50-4.25)"


def test_a_divergence_that_rounds_to_nothing_has_no_sign():
    row = point_table(Results(task="", machine={}, points=(Point(name="a", kl=-1e-9),))).rows[0]
    assert row[3] == "0.000"


def test_a_table_that_is_too_wide_comes_in_parts_with_every_cell_whole(capsys, monkeypatch):
    table = point_table(results())
    parts = list(split_table(table, 60))
    assert len(parts) > 1
    assert [part.headers[0] for part in parts] == ["point"] * len(parts)
    assert sum((part.headers[1:] for part in parts), ()) == table.headers[1:]
    monkeypatch.setattr("vitcut.reports.tables._FILE_WIDTH", 60)
    print_table(table)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    assert "4.00x (3.75-4.25)" in shown
    assert "…" not in shown
    assert list(split_table(table, 320)) == [table]


def test_markdown_has_a_line_per_point_and_equal_columns():
    lines = to_markdown(point_table(results())).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {10}
    assert lines[1].startswith("| --- | ---: |")


def test_a_bar_in_a_name_does_not_break_markdown():
    named = replace(results(), points=(Point(name="a|b"),))
    assert r"| a\|b |" in to_markdown(point_table(named))


def test_a_table_goes_to_standard_output_in_whole_cells(capsys):
    print_table(point_table(results(low=0.9)), title="animals")
    shown = capsys.readouterr()
    assert "[4.00x (0.90-4.25)]" in shown.out
    assert "tau-0.01" in shown.out
    assert shown.err == ""


def test_brackets_in_a_name_are_shown_and_not_taken_for_a_style(capsys):
    print_table(point_table(replace(results(), points=(Point(name="[bold]cut"),))))
    assert "[bold]cut" in capsys.readouterr().out


def test_the_verdict_is_the_smallest_within_its_interval_else_the_most_accurate():
    large = Point(name="large", macs=9, accuracy_coarse=0.70, change_low=-0.1, change_high=0.01)
    small = replace(large, name="small", macs=3, accuracy_coarse=0.69)
    worse = replace(large, name="worse", macs=1, accuracy_coarse=0.5, change_high=-0.01)
    assert verdict([large, small, worse]) == "small"
    assert verdict([replace(small, change_high=-0.01), worse]) == "small"
    assert verdict([worse, replace(large, change_high=None, change_low=None)]) == "large"
    assert verdict([]) is None
