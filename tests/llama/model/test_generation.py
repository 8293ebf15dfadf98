"""Generation: the golden continuation, unequal prompts, stop tokens, sampling, compiles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.model.config import LlamaConfig
from examples.llama.model.generation import Completion, Generator, Sampling, nucleus
from examples.llama.model.hf import load_params, read_config
from examples.llama.model.llama import apply, structure
from tests.llama.random_params import random_params

GOLDEN = Path(__file__).parents[2] / "golden"
FOLDERS = pytest.mark.parametrize("name", ["hf_llama_untied", "hf_llama31_tied"])
CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
)
PROMPTS = [[3], [7, 1, 9, 4, 4, 2, 11], [5, 6, 30], [40, 2, 2, 9, 21, 17, 8, 3], [12, 13]]


def make(scan_layers=True, batch_size=4, prompt_tokens=8, new_tokens=10, **arguments):
    params = random_params(CONFIG, scan_layers=scan_layers)
    # Larger than a test model's usually are: choices that hang on all tokens and are no near ties.
    params = jax.tree.map(lambda x: x * np.float32(3), params)
    return Generator(
        structure(CONFIG, scan_layers=scan_layers),
        params,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        **arguments,
    ), params


@pytest.fixture(scope="module")
def generator():
    return make()[0]


@pytest.fixture(scope="module")
def greedy(generator):
    return generator(PROMPTS)


@FOLDERS
def test_golden_greedy_continuation(name):
    config = read_config(GOLDEN / name)
    golden = np.load(GOLDEN / name / "logits.npz")["greedy"]
    prompt = golden[:, :8].tolist()
    generator = Generator(
        structure(config),
        load_params(GOLDEN / name, config),
        batch_size=len(prompt),
        prompt_tokens=8,
        new_tokens=golden.shape[1] - 8,
    )
    new = [completion.tokens for completion in generator(prompt)]
    np.testing.assert_array_equal(new, golden[:, 8:])


def test_unequal_prompts_equal_the_plain_model(greedy):
    """Each row as if it were alone, without cache, padding or batch."""
    graphdef = structure(CONFIG)
    params = make()[1]

    @jax.jit
    def predictions(tokens):
        return jnp.argmax(apply(graphdef, params)(tokens), axis=-1)

    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        tokens = list(prompt)
        for _ in range(10):
            padded = np.zeros((1, 18), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(predictions(padded)[0, len(tokens) - 1]))
        assert completion == Completion(tokens[len(prompt) :], False)
    assert len({tuple(completion.tokens) for completion in greedy}) == len(PROMPTS)


def test_batch_order_and_padding_do_not_matter(generator, greedy):
    assert generator(PROMPTS[::-1]) == greedy[::-1]
    assert generator(PROMPTS[1:2]) == greedy[1:2]
    wider, _ = make(prompt_tokens=13, batch_size=5)
    assert wider(PROMPTS) == greedy


def test_unscanned_layers(greedy):
    assert make(scan_layers=False)[0](PROMPTS) == greedy


def test_stop_tokens(greedy):
    stop = greedy[1].tokens[3], greedy[2].tokens[0]
    stopped = make(stop_ids=stop)[0](PROMPTS)
    for before, after in zip(greedy, stopped, strict=True):
        places = [i for i, token in enumerate(before.tokens) if token in stop]
        if places:
            assert after == Completion(before.tokens[: places[0]], True)
        else:
            assert after == before
    assert stopped[2] == Completion([], True)


def test_prefill_and_decoding_compile_once(greedy):
    del greedy  # whatever else these need is compiled by now
    generator, _ = make(stop_ids=[0])
    events = []

    def count(name, *_, **__):
        if "backend_compile" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for sampling in (Sampling(), Sampling(0.7), Sampling(1.3, top_p=0.5, seed=9)):
            generator(PROMPTS, sampling)
            generator(PROMPTS[:2], sampling)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert generator._prefill._cache_size() == generator._decode._cache_size() == 1
    # The two programs and the making of a key.
    assert len(events) <= 3


def test_sampling_follows_the_seed_and_the_prompts_place(generator, greedy):
    warm = Sampling(1.0, seed=3)
    drawn = generator(PROMPTS, warm)
    assert drawn == generator(PROMPTS, warm)
    assert drawn != generator(PROMPTS, Sampling(1.0, seed=4))
    assert drawn != greedy
    assert make(batch_size=2)[0](PROMPTS, warm) == drawn
    # Equal prompts at different places draw differently.
    twice = generator([PROMPTS[0]] * 2, warm)
    assert twice[0] != twice[1]


def test_small_top_p_and_temperature_are_greedy(generator, greedy):
    assert generator(PROMPTS, Sampling(1.0, top_p=1e-6)) == greedy
    assert generator(PROMPTS, Sampling(1e-4)) == greedy


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    kept = nucleus(jnp.broadcast_to(logits, (4000, 4)), 0.75)
    drawn = jax.random.categorical(jax.random.key(0), kept)
    shares = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.03)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.05])
def test_nucleus_is_the_smallest_set(top_p):
    logits = jax.random.normal(jax.random.key(1), (5, 30)) * 2
    kept = np.asarray(nucleus(logits, top_p)) > -np.inf
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    for row, keep in zip(probabilities, kept, strict=True):
        assert row[keep].sum() >= top_p - 1e-6
        assert row[keep].sum() - row[keep].min() < top_p
        assert keep.all() or row[keep].min() >= row[~keep].max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prompt_tokens": 60}, r"more than the model's max_seq_len \(64\)"),
    ],
)
def test_sizes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("prompt", [[], list(range(9))])
def test_prompts_are_checked(generator, prompt):
    with pytest.raises(ValueError, match=f"prompt 1 has {len(prompt)} tokens, it needs 1 to 8"):
        generator([[1], prompt])


@pytest.mark.parametrize("arguments", [(-1.0,), (1.0, 0.0), (1.0, 1.5), (float("inf"),)])
def test_sampling_is_checked(arguments):
    with pytest.raises(ValueError, match="must be"):
        Sampling(*arguments)
