"""The search for a rate: where it grows, what it does with runs that diverge, what it remembers."""

from __future__ import annotations

import math

import pytest

from examples.llama.comparing.tuning import TrialStore, search_rate


def test_search_grows_past_an_edge_and_stops_at_its_limit():
    tried = []

    def loss(rate):
        tried.append(rate)
        return math.nan if rate > 0.5 else abs(math.log2(rate / 0.01))

    result = search_rate(loss, 0.08, factor=2.0, max_trials=8)
    assert result.best.rate == 0.01
    assert not result.at_edge
    assert tried == [0.08, 0.16, 0.04, 0.02, 0.01, 0.005]
    assert [trial.rate for trial in result.trials] == sorted(tried)

    limited = search_rate(lambda rate: rate, 1.0, max_trials=4)
    assert (limited.best.rate, limited.at_edge, len(limited.trials)) == (0.25, True, 4)


def test_search_leaves_rates_that_diverge_and_says_if_all_do():
    result = search_rate(lambda rate: math.inf if rate > 1e-3 else -rate, 1e-2, factor=10.0)
    assert result.best.rate == 1e-3
    with pytest.raises(RuntimeError, match=r"no rate from 0\.125 to 2 gives a finite loss"):
        search_rate(lambda rate: math.nan, 1.0, max_trials=5)
    with pytest.raises(ValueError, match="factor above 1"):
        search_rate(abs, 1.0, factor=1.0)


def test_trials_are_remembered_under_their_key_only(tmp_path):
    path, calls = tmp_path / "trials.json", []

    def run(rate):
        calls.append(rate)
        return math.inf if rate > 1 else rate

    for _ in range(2):
        remembered = TrialStore(path, {"steps": 4}).remember(run)
        assert (remembered(0.5), remembered(2.0)) == (0.5, math.inf)
    assert calls == [0.5, 2.0]
    TrialStore(path, {"steps": 5}).remember(run)(0.5)
    TrialStore(path, {"steps": 5}, keep=False).remember(run)(0.5)
    assert calls == [0.5, 2.0, 0.5, 0.5]
