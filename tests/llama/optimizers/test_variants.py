"""Variants of optimizers: their keys, what cannot be read, and their rows in a comparison."""

from __future__ import annotations

import dataclasses

import pytest

from examples.llama.optimizers import variants as variants_module
from examples.llama.optimizers.options import OPTION_NAMES
from examples.llama.optimizers.rates import TUNED_RATES
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.optimizers.variants import (
    Variant,
    nearest_rate,
    parse_variant,
    parse_variant_rates,
    parse_variants,
)
from examples.llama.training.config import TrainConfig, resolve
from tests.llama import tiny


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_name_is_its_own_key_folder_and_label(name):
    variant = parse_variant(name)
    assert variant == Variant(name)
    assert (variant.key, variant.folder) == (name, name)
    assert variant.label == OPTIMIZERS[name].label
    assert variant.fields() == {"optimizer": name}


def test_a_key_has_one_form_and_reads_back():
    text = " lorapre_adamw: matrix_rate=.5 : eps=0.00000001:residual=0: bound=inf:rank=8 "
    variant = parse_variant(text)
    assert variant.key == "lorapre_adamw:rank=8:eps=1e-08:bound=inf:residual=0:matrix_rate=0.5"
    assert parse_variant(variant.key) == variant
    exact = parse_variant("adamw:b2=0.123456789012345")
    assert parse_variant(exact.key) == exact
    assert "/" not in variant.folder
    assert ":" not in variant.folder


def test_the_options_of_a_variant_arrive_in_the_settings():
    variant = parse_variant(
        "lorapre_adamw:rank=4:options=recommended:b2=0.9:weight_decay=0.5:decay_vectors=false:"
        "embedding_rate=4:matrix_rate=0.25"
    )
    config = tiny.config(None, weight_decay=0.1)
    settings = resolve(dataclasses.replace(config, **variant.fields()), tiny.MODEL)
    options = settings.options
    assert (options.rank, options.option_set, options.b2) == (4, "recommended", 0.9)
    assert (options.weight_decay, options.decay_vectors) == (0.5, False)
    assert options.role_multipliers == {"embedding": 4.0, "matrix": 0.25}
    assert set(OPTION_NAMES) <= {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam:b1=0.9", "unknown optimizer 'adam'; the optimizers are adamw"),
        ("galore:ranks=4", "'galore:ranks=4': galore takes no option 'ranks'; use one of rank, w"),
        ("adamw:rank=4", "adamw takes no option 'rank'; use one of .*b1, b2.*matrix_rate"),
        ("lion:matrix_rate=2", "lion takes no option 'matrix_rate'"),
        ("galore:rank", "'galore:rank': expected option=value, got 'rank'"),
        ("galore:rank=4:rank=8", "rank is given twice"),
        ("galore:rank=4.5", "rank must be an integer, got '4.5'"),
        ("adamw:b1=fast", "b1 must be a number, got 'fast'"),
        ("adamw:b1=nan", "b1 must be a number, got 'nan'"),
        ("adamw:matrix_rate=0", "matrix_rate must be a positive number, got '0'"),
        ("sage:damper=on", "damper must be one of both, ema, none, got 'on'"),
        ("adamw:decay_vectors=no", "decay_vectors must be true or false, got 'no'"),
    ],
)
def test_what_cannot_be_read_is_said_with_the_item_and_what_there_is(text, message):
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


def test_duplicates_are_found_whatever_their_order():
    twice = "adamw,lorapre_adamw:rank=4:b1=0.9,lorapre_adamw:b1=0.90:rank=4"
    with pytest.raises(ValueError, match=r"named twice in .*: lorapre_adamw:rank=4:b1=0\.9"):
        parse_variants(twice)
    assert len(parse_variants("galore,galore:rank=4,galore:rank=8,")) == 3


def test_rates_are_read_from_the_last_equals_sign():
    rates = parse_variant_rates("lorapre_adamw:options=paper:rank=4=2e-3, adamw = 1e-3")
    assert rates == {"lorapre_adamw:rank=4:options=paper": 2e-3, "adamw": 1e-3}
    for text, message in (
        ("galore:rank=4", "'galore:rank': expected option=value"),
        ("adamw", "expected optimizer=rate, got 'adamw'"),
        ("galore:rank=4=-1", "the rate of optimizer 'galore:rank=4' must be positive, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_variant_rates(text)


def test_a_search_starts_at_the_tabled_rate_with_the_most_of_the_options(monkeypatch):
    table = {
        "galore": (1.0, "x"),
        "galore:rank=8": (2.0, "x"),
        "galore:rank=8:b1=0.5": (3.0, "x"),
        "galore:rank=4": (4.0, "x"),
    }
    monkeypatch.setattr(variants_module, "TUNED_RATES", {"demo": table})
    assert nearest_rate("demo", parse_variant("galore:b2=0.9:rank=8")) == ("galore:rank=8", 2.0)
    assert nearest_rate("demo", parse_variant("galore:rank=8:b1=0.5")) == (
        "galore:rank=8:b1=0.5",
        3.0,
    )
    assert nearest_rate("demo", parse_variant("galore:rank=16")) == ("galore", 1.0)
    assert nearest_rate("demo", parse_variant("adamw")) is None
    assert nearest_rate("llama2_7b", parse_variant("galore")) is None


def test_tabled_keys_have_the_form_that_is_looked_up():
    for rates in TUNED_RATES.values():
        for key, (rate, source) in rates.items():
            assert parse_variant(key).key == key
            assert rate > 0
            assert source
