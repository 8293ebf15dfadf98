"""Pictures of rows that differ in rank: which there are, how rows are told apart, where names stand."""

from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.peers import PEERS
from examples.llama.comparing import palette
from examples.llama.comparing.labels import spread
from examples.llama.comparing.palette import MOST_COLOURED, PALE, coloured, row_styles
from examples.llama.comparing.plots import plot_comparison, styled
from examples.llama.comparing.rank_plot import has_ranks, plot_ranks
from examples.llama.comparing.rows import Row, family, markdown_table
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.optimizers.variants import parse_variant

PLAIN = ("adamw", "adamw:matrix_rate=0.25", "sinkgd")
RANKED = tuple(
    f"lorapre_adamw:rank={rank}{options}"
    for rank in (4, 8, 16)
    for options in ("", ":options=recommended")
)


def row(key, perplexity=30.0, state=0.5, status="finished", rank=None):
    variant = parse_variant(key)
    curve = [(1000.0 * k, 4.0 / k + math.log(perplexity)) for k in range(1, 5)]
    return Row.from_dict(
        {
            "optimizer": variant.optimizer,
            "label": variant.label,
            "status": status,
            "learning_rate": 1e-3,
            "rate_source": "given",
            "heldout_loss": math.log(perplexity),
            "train_loss": 2.5,
            "steps": 8,
            "tokens": 8000,
            "parameters": 10,
            "optimizer_state_bytes": int(state * 2**20),
            "state_ratio": state,
            "tokens_per_second": 1e3,
            "median_step_seconds": 0.1,
            "heldout_curve": curve,
            "train_curve": curve,
            "variant": key,
            "rank": rank or variant.options.get("rank"),
            "options": dict(variant.options),
        }
    )


def test_rows_that_differ_in_rank_alone_are_one_family():
    keys = {family(row(key)).key for key in RANKED}
    assert keys == {"lorapre_adamw", "lorapre_adamw:options=recommended"}
    assert family(row(RANKED[1])).label == "LoRA-Pre Adam recommended"
    assert has_ranks([row(key) for key in RANKED])
    assert not has_ranks([row(key) for key in (*PLAIN, *RANKED[:2])])
    assert not has_ranks([row(RANKED[0]), row(RANKED[2], status="non_finite")])
    # The rank of the preset counts as well as one that was given.
    assert has_ranks([row("galore", rank=48), row("galore:rank=16")])


def test_an_optimizer_has_a_colour_a_family_a_marker_and_a_rank_a_line():
    rows = [row(key) for key in (*PLAIN, *RANKED)]
    styles = row_styles(rows)
    looks = [tuple(style.values()) for style in styles]
    assert len(set(looks)) == len(looks)
    for one, style in zip(rows, styles, strict=True):
        assert style["color"] == palette.colour(one.optimizer)  # whatever else is in the picture
    paper, recommended = styles[3::2], styles[4::2]
    assert {style["marker"] for style in paper}.isdisjoint(s["marker"] for s in recommended)
    for one in (paper, recommended):
        assert len({style["marker"] for style in one}) == 1
        assert len({style["linestyle"] for style in one}) == 3


def test_of_many_rows_the_best_of_ten_optimizers_have_colour():
    few = [row(key) for key in PLAIN]
    assert coloured(few) == few
    names = [name for name in palette.OPTIMIZERS if name in OPTIMIZERS]
    many = [row(name, 30.0 + i + j) for i, name in enumerate(names) for j in (0.5, 0.0)]
    shown = coloured(many)
    assert len(shown) == MOST_COLOURED
    assert [one.optimizer for one in shown] == names[:MOST_COLOURED]
    assert all(
        abs(x - round(x)) < 1e-9 for x in (one.heldout_perplexity for one in shown)
    )  # the better of the two
    styles = styled(many, shown)
    assert sum(style["color"] != PALE for style in styles) == MOST_COLOURED


def test_no_two_optimizers_share_a_colour():
    # Other tests of this process may have registered crossings of rules, which are grey.
    own = {
        name
        for name, entry in OPTIMIZERS.items()
        if entry.factory.__module__.startswith("examples.")
    }
    assert set(palette.OPTIMIZERS) == own | set(PEERS)
    colours = {palette.colour(name) for name in palette.OPTIMIZERS}
    assert len(colours) == len(palette.OPTIMIZERS)
    assert palette.PALE not in colours


@pytest.mark.parametrize("copies", [1, 3])
def test_pictures_are_drawn_of_few_rows_and_of_many(tmp_path, copies):
    rows = [
        row(
            f"{key}:weight_decay=0.{copy}", 20.0 + 3 * i + copy, 0.0 if key == "sinkgd" else 0.2 * i
        )
        for copy in range(copies)
        for i, key in enumerate((*PLAIN, *RANKED))
    ]
    rows.append(row("lion", status="non_finite"))
    for plot in (plot_comparison, plot_ranks):
        path = tmp_path / plot.__name__ / "picture.png"
        plot(rows, path, "title", "python -m x " + "--long-option value " * 40)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_names_in_the_margin_keep_their_order_and_a_gap():
    heights = [5.0, 0.0, 1.0, 1.0, 50.0, 12.0, 49.0, 200.0]
    places = spread(heights, 10.0)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    found = [places[i] for i in order]
    assert all(b - a >= 10.0 - 1e-9 for a, b in itertools.pairwise(found))
    assert places[-1] == 200.0
    assert sum(places) == pytest.approx(sum(heights))
    assert spread([], 1.0) == []


def test_the_table_says_once_what_each_optimizer_stores():
    lines = markdown_table([row(key) for key in ("galore:rank=16", *RANKED)]).splitlines()
    at = lines.index("What each stores:")
    assert lines[at + 2 : at + 5] == [
        "- GaLore: a projection of the larger side and two moments on the smaller, (max + 2 min) r "
        "numbers per matrix; two moments for the rest",
        "- LoRA-Pre Adam: two factor pairs, (2p + 2q) r numbers per p x q matrix; two moments for the rest",
        "",
    ]
    assert lines[at - 2].startswith("| LoRA-Pre Adam r=16 recommended | 30.00 |")
    assert lines[-1].startswith("Rates: GaLore r=16 given;")
