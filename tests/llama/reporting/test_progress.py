"""What is shown while something lasts: on a terminal, and in a log."""

from __future__ import annotations

import io

from rich.console import Console

from examples.llama.reporting.progress import counting, make_progress, waiting


def console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def test_what_compiles_shows_the_time_since_it_began():
    shown = console(terminal=True)
    with make_progress(shown, "adamw", 300):
        pass
    assert "adamw" in shown.file.getvalue()
    assert "0/300 0:00:00 compiling" in shown.file.getvalue()
    with waiting(shown, "compiling and completing"):
        pass
    assert "compiling and completing 0:00:00" in shown.file.getvalue()


def test_the_line_of_a_run_fits_80_columns():
    shown = console(terminal=True)
    with make_progress(shown, "sage_hybrid", 400) as progress:
        progress.update(100, loss=4.25, tokens_per_second=2000.0, rate=1e-3, remaining=300.0)
    assert "loss 4.250" in shown.file.getvalue()


def test_waiting_says_nothing_in_a_log():
    shown = console(terminal=False)
    with waiting(shown, "compiling"):
        pass
    assert shown.file.getvalue() == ""


def test_a_count_in_a_log_has_a_line_at_each_tenth():
    shown = console(terminal=False)
    with counting(shown, "problems", 100) as done:
        for number in range(1, 101):
            done(number)
    lines = shown.file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1] == "problems 100/100, 0s left"


def test_a_count_on_a_terminal():
    shown = console(terminal=True)
    with counting(shown, "prob[lems]", 4) as done:
        done(4)
    assert "prob[lems]" in shown.file.getvalue()
    assert "4/4" in shown.file.getvalue()
