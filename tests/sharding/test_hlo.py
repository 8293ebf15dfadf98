"""The count of collectives on handwritten HLO, and on a compiled program whose traffic is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.meshes.hlo import Collective, collectives, moved

LOOPS = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %r = f32[8]{0} reduce(%x, %x), dimensions={1}, to_apply=%add
  %all = (f32[8]{0}, /*index=1*/bf16[2]{0}) all-reduce(%r, %r), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%p, %x)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%outer_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,4]{1,0}) while(%p), condition=%condition, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
}

%called (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %permuted = f32[8,4]{1,0:T(8,128)} collective-permute(%x), source_target_pairs={{0,1}}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %init = (s32[], f32[8,4]{1,0}) tuple(%x, %x)
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %all-gather-start = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%x), dimensions={0}
  %all-gather-done = f32[16,4]{1,0} all-gather-done(%all-gather-start)
  %scattered = f32[4,4]{1,0} reduce-scatter(f32[8,4]{1,0} %x), dimensions={0}, to_apply=%add
  %start = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x)
  %exchanged = (f32[4,4]{1,0}, f32[4,4]{1,0}) all-to-all(%scattered, %scattered)
  ROOT %y = f32[8,4]{1,0} call(%x), to_apply=%called
}
"""  # noqa: E501

BRANCHES = """HloModule f
%small (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %a = f32[4]{0} all-reduce(%x), to_apply=%add
}
%large (x: f32[4]) -> f32[64] {
  %x = f32[4]{0} parameter(0)
  ROOT %b = f32[64]{0} all-gather(%x), dimensions={0}
}
ENTRY main (p: pred[]) -> f32[4] {
  p = pred[] parameter(0)
  c = f32[4]{0} conditional(p, x, x), ATTRIBUTES
}
"""


def test_loops_calls_and_asynchronous_forms():
    assert collectives(LOOPS) == [
        Collective("all-reduce", 16, 15, "all"),  # two operands of 8 elements
        Collective("all-gather", 64, 1, "all-gather-start"),
        Collective("reduce-scatter", 32, 1, "scattered"),
        Collective("collective-permute", 32, 1, "start"),
        Collective("all-to-all", 32, 1, "exchanged"),
        Collective("collective-permute", 32, 1, "permuted"),
    ]
    assert moved(LOOPS) == 16 * 15 + 64 + 4 * 32


@pytest.mark.parametrize(
    "attributes",
    ["branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"],
)
def test_the_larger_branch_counts(attributes):
    text = BRANCHES.replace("ATTRIBUTES", attributes)
    assert collectives(text) == [Collective("all-gather", 64, 1, "b")]


def test_what_cannot_be_counted_is_an_error():
    unknown = LOOPS.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    with pytest.raises(ValueError, match="trip count of loop 'loop'"):
        collectives(unknown)
    assert moved(unknown, trip_count=3) == moved(LOOPS)
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule f")


def test_a_program_of_known_traffic():
    """Twenty iterations of a sum over a sharded axis: an all-reduce of each device's 4 columns."""
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))

    def body(_, y):
        return y + jnp.sin(y.sum(0, keepdims=True))

    text = jax.jit(lambda x: jax.lax.fori_loop(0, 20, body, x)).lower(x).compile().as_text()
    assert [(c.kind, c.elements, c.times) for c in collectives(text)] == [("all-reduce", 4, 20)]
    gathered = (
        jax.jit(lambda x: jax.reshard(x, NamedSharding(mesh, P()))).lower(x).compile().as_text()
    )
    assert moved(gathered) >= 8 * 16
