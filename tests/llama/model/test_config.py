"""Preset shapes: published parameter counts, overrides, validation; protocols."""

import dataclasses
import math

import jax
import pytest

from examples.llama.model.config import PRESETS, LlamaConfig, RopeScaling, preset
from examples.llama.model.llama import abstract, parameter_count
from examples.llama.training.protocols import PROTOCOLS

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sage_1.3b", 1_319_684_096),
        ("llama2_7b", 6_738_415_616),
        ("llama3.1_8b", 8_030_261_248),
        ("demo", 8192 * 192 + 4 * (4 * 192**2 + 3 * 192 * 512 + 2 * 192) + 192),
    ],
)
def test_exact_parameter_counts(name, count):
    assert parameter_count(preset(name)) == count


@pytest.mark.parametrize(
    ("name", "millions", "matrix_millions"),
    [
        ("galore_60m", 58.07, 25.30),
        ("galore_130m", 134.11, 84.93),
        ("galore_350m", 367.97, 302.38),
        ("galore_1b", 1339.08, 1207.91),
        ("sage_270m", 269.97, None),
    ],
)
def test_published_parameter_counts(name, millions, matrix_millions):
    assert round(parameter_count(preset(name)) / 1e6, 2) == millions
    if matrix_millions is not None:
        layers = abstract(preset(name))["layers"]
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(layers) if x.ndim == 3)
        assert round(count / 1e6, 2) == matrix_millions


def test_count_does_not_depend_on_the_form():
    config = preset("galore_60m", num_layers=3)
    unscanned = abstract(config, scan_layers=False)
    assert parameter_count(config) == sum(x.size for x in jax.tree.leaves(unscanned))


def test_demo_is_small_and_tied():
    demo = preset("demo")
    assert (demo.vocab_size, demo.tie_embeddings, demo.head_dim) == (8192, True, 48)


def test_llama31_rotary():
    config = preset("llama3.1_8b")
    assert config.rope_theta == 500_000
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_overrides():
    assert preset("demo", num_layers=1).num_layers == 1
    assert preset("demo", num_heads=2, num_kv_heads=2).head_dim == 96
    assert preset("demo", hidden_size=64, head_dim=10).head_dim == 10
    assert PRESETS["demo"].num_layers == 4


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match=r"unknown preset 'llama9'.*demo.*galore_60m.*sage_1\.3b"):
        preset("llama9")
    with pytest.raises(ValueError, match=r"unknown field 'layers'.*num_layers"):
        preset("demo", layers=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"vocab_size": -1}, "vocab_size must be positive"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"hidden_size": 18}, r"hidden_size \(18\) is not a multiple of num_heads \(4\)"),
        ({"hidden_size": 20}, "head_dim must be positive and even .* got 5"),
        ({"head_dim": -2}, "head_dim must be positive and even .* got -2"),
    ],
)
def test_invalid_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**{**TINY, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_freq_factor": 4.0}, "0 < low_freq_factor < high_freq_factor"),
        ({"factor": 0.0}, "must be positive"),
        ({"original_max_position_embeddings": 0}, "must be positive"),
    ],
)
def test_invalid_rope_scaling(change, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**change)


def test_config_is_static():
    first, second = LlamaConfig(**TINY), LlamaConfig(**TINY)
    assert hash(first) == hash(second)
    assert first == second
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.num_layers = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_protocols():
    galore, sage, demo = (PROTOCOLS[name] for name in ("galore", "sage", "demo"))
    assert (galore.seq_len, galore.batch_size, galore.clip_norm) == (256, 512, None)
    assert (galore.weight_decay, galore.final_rate_fraction) == (0.0, 0.1)
    assert (sage.seq_len, sage.batch_size, sage.steps, sage.clip_norm) == (512, 256, 50_000, 1.0)
    assert (sage.weight_decay, sage.final_rate_fraction) == (0.01, 0.0)
    assert galore.tokens_per_step == sage.tokens_per_step == 131_072
    assert demo.tokens_per_step == 2048
    assert {protocol.warmup_fraction for protocol in PROTOCOLS.values()} == {0.1}
    assert galore.warmup_steps == 1000
    assert all(p.seq_len <= preset("demo").max_seq_len for p in PROTOCOLS.values())
