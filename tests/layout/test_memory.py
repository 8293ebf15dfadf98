"""memory_report against bytes counted by hand: leaf by leaf, by role, and on each device of a mesh."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from layout_optax import MemoryReport, memory_report, state_bytes
from lorapre_optax import lorapre_adamw
from sage_optax import sage_hybrid
from tests.layout.llama_trees import D, F, L, V, nnx_scanned, nnx_unscanned

MESH = AbstractMesh((2, 4), ("x", "y"))


def counts(found) -> tuple[int, int]:
    """Bytes of parameters and state."""
    return found.parameters, found.state


def row(report: MemoryReport, path: str):
    (found,) = [row for row in report.rows if row.path == path]
    return found


def test_bytes_of_every_leaf_and_role():
    report = memory_report(sage_hybrid(1e-3), nnx_scanned())
    table = row(report, "embed_tokens/embedding")
    assert (table.role, table.shape, table.dtype) == ("embedding", (V, D), "float32")
    assert counts(table.total) == counts(table.per_device) == (4 * V * D, 4 * V * D + 4 * D)
    assert {kept.field for kept in table.state} == {"mu", "magnitude"}
    assert counts(row(report, "layers/mlp/up_proj/kernel").total) == (4 * L * D * F, 0)
    assert counts(row(report, "norm/scale").total) == (4 * D, 8 * D)
    by_role = report.by_role
    assert list(by_role) == ["embedding", "vector", "matrix", "head", "shared"]
    assert counts(by_role["matrix"].total) == (4 * L * (4 * D * D + 3 * D * F), 0)
    assert by_role["shared"].total.parameters == 0
    assert by_role["shared"].total.state % 4 == 0
    assert report.devices == 1


@pytest.mark.parametrize("tree", [nnx_scanned, nnx_unscanned])
@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1e-3), optax.contrib.muon(1e-3), lorapre_adamw(1e-3, 4), sage_hybrid(1e-3)],
    ids=["adamw", "muon", "lorapre_adamw", "sage_hybrid"],
)
def test_sums_are_all_there_is(tx, tree):
    params = tree()
    if tree is nnx_scanned:  # optax's own numbers do not know stacked layers
        params = {name: params[name] for name in ("embed_tokens", "norm", "lm_head")}
    report = memory_report(tx, params)
    assert report.total.state == state_bytes(tx, params) == report.per_device.state
    assert report.total.parameters == sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    parts = [counts(part.total) for part in report.by_role.values()]
    assert tuple(map(sum, zip(*parts, strict=True))) == counts(report.total)


def test_each_device_holds_its_shard_of_parameters_and_state():
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    shardings = {"up": NamedSharding(MESH, P("x", "y"))}
    report = memory_report(lorapre_adamw(1e-3, 8), params, shardings)
    kernel = row(report, "up/kernel")
    # Factors (8, 32) and (8, 64) of two moments: split like the axis that they keep, the rank like the other.
    assert counts(kernel.total) == (4 * 64 * 32, 4 * 2 * 8 * (64 + 32))
    assert counts(kernel.per_device) == (4 * 64 * 32 // 8, 4 * 2 * 8 * (64 + 32) // 8)
    shared = row(report, "(shared)")
    assert shared.total == shared.per_device
    assert report.devices == 8
    assert report.per_device.state == kernel.per_device.state + shared.total.state


def test_what_init_makes_from_a_shape_is_on_every_device():
    params = {"up": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    sharding = NamedSharding(MESH, P("x", "y"))
    report = memory_report(optax.contrib.galore(1e-3, rank=8), params, sharding)
    kernel = row(report, "up/kernel")
    assert kernel.per_device.parameters == 4 * 64 * 32 // 8
    assert kernel.per_device.state == kernel.total.state > 0


def test_dtypes_empty_leaves_and_leaves_that_are_not_ours():
    params = {
        "embed": {"embedding": jax.ShapeDtypeStruct((12, 8), jnp.bfloat16)},
        "frozen": None,
        "odd": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float16)},
    }
    layout = {"embed": None, "frozen": None, "odd": optax.MaskedNode()}
    report = memory_report(optax.sgd(1e-3, momentum=0.9), params, layout=layout)
    assert [(r.path, r.role) for r in report.rows] == [
        ("embed/embedding", "embedding"),
        ("odd/kernel", "other"),
    ]
    assert counts(row(report, "embed/embedding").total) == (192, 192)
    assert counts(row(report, "odd/kernel").total) == (24, 24)
    assert report.rows[0].dtype == "bfloat16"


def test_boxes_count_as_what_they_hold():
    kernel = nn.Partitioned(jax.ShapeDtypeStruct((16, 8), jnp.float32), names=("a", "b"))
    params = {"up": {"kernel": kernel}}
    shardings = {"up": {"kernel": NamedSharding(MESH, P("x", None))}}
    found = row(memory_report(optax.adam(1e-3), params, shardings), "up/kernel")
    assert found.role == "matrix"
    assert counts(found.per_device) == (256, 512)


def test_a_path_that_no_rule_explains_is_named():
    params = {"odd": jax.ShapeDtypeStruct((2, 3, 4, 5), jnp.float32)}
    with pytest.raises(ValueError, match="odd"):
        memory_report(optax.adam(1e-3), params)
