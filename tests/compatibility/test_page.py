"""The snippets of docs/compatibility.md run, and show what the page says of them."""

from __future__ import annotations

import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layout_optax.boxes import is_box

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "compatibility.md"
PREAMBLE, *SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
SECTIONS = {section.split("\n")[0]: section for section in SECTIONS}


def code(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(title):
    """Executes the page's first snippet and then those of a section; returns what they defined."""
    names = {"__name__": f"page:{title}"}
    for snippet in code(PREAMBLE) + code(SECTIONS[title]):
        exec(compile(snippet, f"{PAGE.name}, {title}", "exec", dont_inherit=True), names)
    return names


def check_boxless_and_sharded(state):
    """No box in the state, and at least one array of it on eight different shards."""
    leaves = jax.tree.leaves(state, is_leaf=is_box)
    assert not any(map(is_box, leaves))
    shards = [{str(shard.index) for shard in leaf.addressable_shards} for leaf in leaves]
    assert max(map(len, shards)) == 8


LOOPS = [title for title, section in SECTIONS.items() if "losses" in "".join(code(section))]


def test_every_section_with_code_is_run():
    with_code = {title for title, section in SECTIONS.items() if code(section)}
    assert with_code == {*LOOPS, "MaxText-shaped parameters", "Checkpoints"}
    assert len(LOOPS) == 7


@pytest.mark.parametrize("title", LOOPS)
def test_a_loop_learns_with_sharded_state(title):
    names = run(title)
    losses = names["losses"]
    assert losses[-1] < losses[0]
    held = names["optimizer"] if "optimizer" in names else names["state"]
    state = getattr(held, "opt_state", held)
    if "nnx" in names:  # its variables carry metadata
        state = names["nnx"].as_pure(state)
    check_boxless_and_sharded(state)


def test_maxtext_shaped_parameters(capsys):
    places = run("MaxText-shaped parameters")["state_places"]
    table = capsys.readouterr().out
    assert "DenseGeneral (features, heads, head_dim), layers on axis 1" in table
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_flatten_with_path(places)[0]
    }
    (mu,) = [
        spec for path, spec in found.items() if path.endswith("mu/params/token_embedder/embedding")
    ]
    assert mu == P("tensor", "fsdp")
    assert not any("wi_0" in path or "query" in path for path in found)  # SinkGD keeps nothing


def test_checkpoint_on_another_mesh():
    names = run("Checkpoints")
    restored = names["restored"]
    assert jax.tree.structure(restored["opt_state"]) == jax.tree.structure(names["state"])
    for leaf, was in zip(
        jax.tree.leaves(restored),
        jax.tree.leaves({"params": names["params"], "opt_state": names["state"]}),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, was)
        assert leaf.sharding.mesh == names["mesh"]
    check_boxless_and_sharded(restored["opt_state"])


def test_a_state_is_carried_over_to_a_larger_vocabulary():
    names = run("Checkpoints")
    small, large = (names[name][0].inner_states for name in ("small_state", "large_state"))
    kept = [state["vector"].inner_state.mu["norm"]["scale"] for state in (small, large)]
    table = [state["embedding"].inner_state.mu["embed"] for state in (small, large)]
    # With gradients of one the momentum is 1 - 0.99^t: the norm has taken two steps, the table one.
    np.testing.assert_allclose(kept[1], 1 - 0.99**2, rtol=1e-5)
    np.testing.assert_allclose(table[1], 0.01, rtol=1e-5)
    assert [leaf.shape for leaf in table] == [(12, 8), (16, 8)]
