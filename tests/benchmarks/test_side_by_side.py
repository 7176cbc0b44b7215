"""Turns, medians, best batch, bisection, rows and tables, all with clocks of the tests' own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.errors import BenchmarkError
from benchmarks.side_by_side import (
    LEAST_TURNS,
    ClockName,
    Comparison,
    Section,
    as_json,
    bisected,
    conditions,
    fastest,
    insert,
    markdown,
    median,
    median_difference,
    medians,
    quantity,
    show,
    take_turns,
    timed,
)

ROW = Comparison("a network", 0.5, "a peer", 2.0)
SECTION = Section("small", "A small table", [ROW], ["One note"])


class FakeClock:
    """A clock that moves only when an action says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def lasting(self, *seconds: float) -> Callable[[], None]:
        """An action that takes these times, one after the other."""
        left = list(seconds)

        def action() -> None:
            self.now += left.pop(0)

        return action


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_timed_is_what_the_clock_moves_on(clock: FakeClock) -> None:
    clock.now = 7.0
    assert timed(clock.lasting(1.5), clock) == 1.5


def test_actions_take_turns(clock: FakeClock) -> None:
    order: list[str] = []
    actions = {"ours": lambda: order.append("ours"), "peer": lambda: order.append("peer")}

    take_turns(actions, 3, clock)

    assert order == ["ours", "peer"] * 3


def test_times_are_kept_for_each_turn(clock: FakeClock) -> None:
    actions = {"ours": clock.lasting(1, 2, 9), "peer": clock.lasting(4, 4, 5)}
    seen: list[str] = []

    times = take_turns(actions, 3, clock, after=seen.append)

    assert times == {"ours": [1, 2, 9], "peer": [4, 4, 5]}
    assert medians(times) == {"ours": 2, "peer": 4}
    assert seen == ["ours", "peer"] * 3


def test_a_median_needs_a_turn() -> None:
    with pytest.raises(BenchmarkError, match=r"0 turns asked for; a median needs at least 1"):
        take_turns({}, 0)


def test_one_slow_turn_does_not_move_a_median() -> None:
    assert median([1.0, 1.0, 1.0, 1.0, 60.0]) == 1.0


def test_a_difference_is_taken_within_each_turn() -> None:
    # the machine was busy in the second turn, for both
    assert median_difference([3.0, 13.0, 3.0], [1.0, 11.0, 1.0], "encoder") == 2.0


def test_a_difference_that_is_noise_is_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"encoder: .* noise is larger than what"):
        median_difference([1.0], [1.0], "encoder")


def test_fastest_counts_the_best_try_and_not_the_warm_up(clock: FakeClock) -> None:
    actions = {1: clock.lasting(9, 3, 2), 8: clock.lasting(1, 4, 4), 64: clock.lasting(9, 9, 1)}

    assert fastest(actions, lambda size: actions[size](), clock=clock) == 64


def test_fastest_prefers_the_earlier_of_two_equals(clock: FakeClock) -> None:
    actions = {1: clock.lasting(1, 1, 1), 8: clock.lasting(1, 1, 1)}

    assert fastest(actions, lambda size: actions[size](), clock=clock) == 1


@given(target=st.floats(-7.0, 7.0))
def test_bisection_finds_the_knob_of_a_rising_figure(target: float) -> None:
    knob, found = bisected(lambda x: x**3, -2.0, 2.0, target, 0.01, "cube")

    assert found == knob**3
    assert abs(found - target) <= 0.01


def test_bisection_refuses_what_is_out_of_reach_and_tells_how_close_it_came() -> None:
    with pytest.raises(BenchmarkError, match=r"density: 9 is out of reach, the closest is 2;"):
        bisected(lambda x: x, 0.0, 2.0, 9.0, 0.1, "density")


def test_a_row_has_the_fields_that_machines_read() -> None:
    assert json.loads(as_json([SECTION])) == [
        {"what": "a network", "ours_s": 0.5, "peer": "a peer", "peer_s": 2.0, "ratio": 4.0}
    ]


def test_a_row_in_another_unit_says_so() -> None:
    row = Comparison("a network", 250.0, "a limit", 200.0, "MB").as_json()

    assert row == {
        "what": "a network",
        "ours_mb": 250.0,
        "peer": "a limit",
        "peer_mb": 200.0,
        "ratio": 0.8,
    }


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (123.4, "s", "123 s"),
        (12.34, "s", "12.3 s"),
        (1.234, "s", "1.23 s"),
        (0.1234, "s", "0.123 s"),
        (0.01234, "s", "12.3 ms"),
        (0.000001234, "s", "1.23 µs"),
        (934.0, "MB", "934 MB"),
        (0.05, "MB", "0.050 MB"),
    ],
)
def test_figures_have_three_digits_and_a_unit(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_a_table_on_a_terminal_and_plain_lines_elsewhere() -> None:
    terminal = Console(file=StringIO(), force_terminal=True, width=120)
    plain = Console(file=StringIO(), force_terminal=False)

    show(SECTION, terminal)
    show(SECTION, plain)

    assert isinstance(terminal.file, StringIO)
    assert isinstance(plain.file, StringIO)
    assert "│" in terminal.file.getvalue()
    assert plain.file.getvalue() == (
        "\nA small table\n    4.00 x  ours 0.500 s, a peer 2.00 s: a network\n  One note\n"
    )


def test_markdown_has_table_notes_and_conditions() -> None:
    assert markdown(SECTION, "Python 3").splitlines() == [
        "| what | ours | beside | theirs | ratio |",
        "|---|---:|---|---:|---:|",
        "| a network | 0.500 s | a peer | 2.00 s | 4.00 |",
        "",
        "* One note.",
        "* Python 3.",
    ]


def test_a_page_keeps_what_is_around_its_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- small -->\nold\n<!-- /small -->\nafter\n")

    insert(page, "small", "new")

    assert page.read_text() == "before\n<!-- small -->\nnew\n<!-- /small -->\nafter\n"


def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- small -->\nnever closed\n")

    with pytest.raises(BenchmarkError, match=r"no place for this table; add <!-- small --> and"):
        insert(page, "small", "new")

    assert page.read_text() == "<!-- small -->\nnever closed\n"


def test_a_page_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"page\.md: cannot be read \(No such file"):
        insert(tmp_path / "page.md", "small", "new")


def test_conditions_name_threads_cores_load_and_turns() -> None:
    line = conditions(("numpy", "no-such-package"), {"numba": 2}, LEAST_TURNS, ClockName.wall)

    assert "numpy " in line
    assert "no-such-package" not in line
    assert "threads: numba 2" in line
    assert "load average" in line
    assert line.endswith("medians of 5 turns, wall-clock time")


def test_conditions_of_few_turns_say_that_it_was_a_trial() -> None:
    line = conditions((), {}, LEAST_TURNS - 1, ClockName.cpu)

    assert line.endswith(
        "medians of 4 turns (fewer than 5: a trial, not a result), CPU time of one thread"
    )


def test_cpu_time_of_several_threads_is_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"CPU time adds up .* \(numba 2 threads\): set OMP"):
        ClockName.cpu.clock({"torch": 1, "numba": 2})


def test_clocks_are_those_of_the_system() -> None:
    assert ClockName.wall.clock({"numba": 2}) is time.perf_counter
    assert ClockName.cpu.clock({"numba": 1}) is time.process_time
