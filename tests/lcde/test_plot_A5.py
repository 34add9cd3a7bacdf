"""Figure 2: the fewest blocks that pass, bounds where that was not found."""

import json
import math
from pathlib import Path

import pytest

from lcde import plot_A5
from lcde._logs import read_runs
from lcde.plot_A5 import (
    NEEDED,
    Need,
    agreement,
    our_needs,
    published_needs,
    table,
    told,
)
from tests.lcde.helpers import Record, a5, write

SOON = "open: fewer steps than published"


def needs(tmp_path: Path, *given: Record) -> dict[tuple[str, int], list[Need]]:
    log = write(tmp_path / "runs.jsonl", *given)
    return our_needs(read_runs(str(log), NEEDED, "make"))


def test_the_first_depth_that_passes_counts(tmp_path):
    found = needs(
        tmp_path,
        a5("S4", 4, 1, False, steps=500),
        a5("S4", 4, 2, True, steps=300),
        a5("S4", 3, 1, True, steps=100),
        a5("S4", 6, 2, False, steps=900),
    )
    assert found == {
        ("S4", 3): [Need(1, 1, 100, True)],
        ("S4", 4): [Need(2, 2, 500, True)],
        ("S4", 6): [Need(math.inf, 2, 900, True)],
    }


def test_a_depth_that_failed_at_a_shorter_length_counts_as_failed(tmp_path):
    found = needs(tmp_path, a5("S4", 3, 1, False), a5("S4", 5, 2, True))
    assert found["S4", 5] == [Need(2, 2, 2000, True)]
    alone = needs(tmp_path, a5("S4", 3, 1, False, seed=1), a5("S4", 5, 2, True))
    assert alone["S4", 5] == [Need(2, 2, 2000, False)]  # another seed's failure


def test_the_published_figure_is_read_with_its_bounds():
    found = published_needs()
    assert found["S4", 5] == [Need(2, 2, 80_000, True)]
    assert found["Mamba", 14] == [Need(math.inf, 4, 990_000, True)]
    assert ("Mamba", 16) not in found  # never run
    assert [found["LinearCDE", n][0].blocks for n in (3, 20)] == [1, 1]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ([(1, 1)], "1"),
        ([(2, 2), (2, 2)], "2"),
        ([(3, 3), (1, 1), (2, 2)], "2 (1 .. 3)"),
        ([(math.inf, 4)], "> 4 in 2,000 steps"),
        ([(1, 1), (math.inf, 2)], "1 (1 .. > 2 in 2,000 steps)"),
    ],
)
def test_blocks_are_told_as_median_and_range(seeds, said):
    assert told([Need(blocks, tried, 2000, True) for blocks, tried in seeds]) == said


def test_fewer_blocks_that_were_not_tried_leave_a_bound():
    assert told([Need(2, 2, 10, False)]) == "<= 2"


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (Need(2, 2, 9, True), 2, "yes"),
        (Need(1, 1, 9, True), 2, "no: fewer suffice"),
        (Need(3, 3, 9, True), 2, "no: more are needed"),
        (Need(math.inf, 2, 9, True), 2, "no: more are needed"),
        (Need(math.inf, 1, 9, True), 2, "open: deeper was not tried"),
        (Need(3, 3, 9, False), 2, "open: fewer were not tried"),
        (Need(math.inf, 2, 8, True), 2, SOON),
        (Need(3, 3, 8, True), 2, SOON),
        (Need(1, 1, 8, True), 2, "no: fewer suffice"),
        (Need(math.inf, 4, 8, True), math.inf, "yes"),
        (Need(math.inf, 2, 9, True), math.inf, "open: deeper was not tried"),
    ],
)
def test_agreement_is_left_open_where_bounds_leave_it_open(ours, theirs, said):
    assert agreement([ours], [Need(theirs, 4, 9, True)]) == said


def test_a_panel_for_each_model_shows_medians_ranges_and_arrows(tmp_path):
    found = needs(
        tmp_path,
        *(a5("RNN", n, 1, True, seed=s) for n in (3, 4) for s in (0, 1, 2)),
        a5("S5", 3, 1, True),
        a5("S5", 3, 1, False, seed=1),
        a5("S5", 3, 2, True, seed=1),
        a5("S5", 4, 1, False),
        a5("S5", 4, 2, False),
    )
    figure = plot_A5.draw(found, published_needs(), "caption")
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == ["LinearCDE", "RNN", "Transformer", "S4", "Mamba", "S5"]
    drawn = {x.get_label(): x for x in panels["RNN"].get_lines()}
    assert list(drawn["ours"].get_xdata()) == [3, 4]
    assert list(drawn["ours"].get_ydata()) == [1, 1]
    assert list(drawn["published"].get_xdata())[-1] == 20
    s5 = panels["S5"]
    lines = {x.get_label(): x for x in s5.get_lines()}
    assert list(lines["ours"].get_xdata()) == [3]
    spans = [list(x.get_ydata()) for x in s5.get_lines() if x.get_label() != "ours"]
    assert spans == [[1, 2]]
    assert [arrow.xyann for arrow in s5.texts] == [(4, 2)]
    assert s5.texts[0].xy[1] > 2  # upwards: more than the two that were tried
    assert [arrow.xyann for arrow in panels["S4"].texts] == [(20, 4)]


def test_the_command_draws_both_files_and_prints_the_table(tmp_path, capsys):
    write(
        tmp_path / "runs.jsonl",
        *(a5("LinearCDE", n, 1, True, seed=s) for n in (3, 8) for s in (1, 2)),
        a5("Transformer", 3, 1, False, hidden_dim=128),
    )
    assert plot_A5.main(["--results-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for suffix, start in (("pdf", b"%PDF"), ("png", b"\x89PNG")):
        path = tmp_path / f"A5_plot_shaded_regions.{suffix}"
        assert path.read_bytes().startswith(start)
        assert f"saved {path}" in out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    assert rows[2:] == [
        ["LinearCDE", "3", "1", "1", "2", "yes"],
        ["LinearCDE", "8", "1", "1", "2", "yes"],
        ["Transformer", "3", "1", "> 1 in 2,000 steps", "1", SOON],
    ]
    assert "LinearCDE: hidden_dim 64; Transformer: hidden_dim 128" in out


def test_values_are_written_in_the_form_of_the_published_ones(tmp_path):
    write(tmp_path / "runs.jsonl", a5("S4", 8, 2, False), a5("S4", 3, 1, True))
    path = tmp_path / "new" / "a5.json"
    flags = ["--results-dir", str(tmp_path), "--json", str(path)]
    assert plot_A5.main(flags) == 0
    found = json.loads(path.read_text())
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["runs"]]
    assert [(row["length"], row["reached"]) for row in rows] == [(3, True), (8, False)]
    assert found["settings"]["S4"]["hidden_dim"] == 64
    assert found["threshold"] == {"S4": 0.9}
    assert all(line.count("[") < 2 for line in path.read_text().splitlines())


def test_values_that_cannot_be_written_are_one_line(tmp_path, capsys):
    write(tmp_path / "runs.jsonl", a5("S4", 3, 1, True))
    flags = ["--results-dir", str(tmp_path), "--json", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        plot_A5.main(flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_published_figure_alone_lists_every_cell():
    rows = table({}, published_needs()).splitlines()[2:]
    assert len(rows) == len(published_needs()) == 14 * 5 - 1 - 3  # four never run


def test_a_mixture_is_refused(tmp_path, capsys):
    mixed = [a5("S4", 3, 1, True), a5("S4", 4, 1, True, hidden_dim=1024)]
    write(tmp_path / "runs.jsonl", *mixed)
    with pytest.raises(SystemExit) as stop:
        plot_A5.main(["--results-dir", str(tmp_path)])
    assert stop.value.code == 2
    assert "hidden_dim: 64, 1024; expected equal" in capsys.readouterr().err
