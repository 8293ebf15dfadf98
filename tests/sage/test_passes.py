"""How often Sinkhorn's algorithm reads and writes a gradient on an accelerator."""

import json
import pathlib

import jax
import pytest

from benchmarks.accelerators import ahead
from benchmarks.accelerators.traffic import Move, moved_bytes, moves, reads, writes
from layout_optax import ParamLayout
from sage_optax import scale_by_sinkhorn
from tests.passes import Model

SHAPE = (2, 96, 160)
SIZE = 2 * 96 * 160
KERNELS = ParamLayout("matrix", (2,), (1,))


def traffic(dtype: str, platform: str = "cuda", **options) -> list[Move]:
    """What the update of a stack of kernels moves."""
    tx = scale_by_sinkhorn(layout=KERNELS, **options)
    gradient = jax.ShapeDtypeStruct(SHAPE, dtype)
    return Model(SIZE, platform).count(lambda g: tx.update(g, tx.init(g))[0], gradient)


@pytest.mark.parametrize("iterations", [1, 5, 20])  # 20 are a loop
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_two_reads_a_sweep_one_read_and_one_write(dtype, width, iterations):
    found = traffic(dtype, iterations=iterations)
    assert (reads(found), writes(found)) == (2 * iterations + 1, 1)
    # A bfloat16 gradient is never kept in float32.
    assert moved_bytes(found) == (2 * iterations + 2) * width * SIZE


def test_a_narrow_copy_is_written_once_and_read_in_all_sweeps_but_the_last():
    found = traffic("float32", vectors_dtype="bfloat16")
    # Copy: 4 + 2. Four sweeps: 8 x 2. The last one: 2 x 4. The direction: 4 + 4.
    assert (reads(found), writes(found)) == (12, 2)
    assert moved_bytes(found) == 38 * SIZE
    assert traffic("bfloat16", vectors_dtype="bfloat16") == traffic("bfloat16")


def test_the_count_tells_the_forms_apart():
    """The form for a CPU finds peaks, writes squares and reads those."""
    found = traffic("float32", "cpu")
    assert writes(found) == 2
    assert reads(found) == 14


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_leaves_of_one_shape_are_lowered_once(platform):
    """A further leaf of a known shape adds a call and its arguments, not Sinkhorn's operations."""

    def lines(*shapes: tuple[int, ...]) -> int:
        g = {f"w{i}": jax.ShapeDtypeStruct(shape, "float32") for i, shape in enumerate(shapes)}
        tx = scale_by_sinkhorn(layout=KERNELS)
        update = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
        return update.trace(g).lower(lowering_platforms=(platform,)).as_text().count("\n")

    one, four = lines(SHAPE), lines(*[SHAPE] * 4)
    assert four - one <= 3 * 2
    assert lines(SHAPE, (2, 96, 128)) > 1.8 * one


HLO = """
%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %y = f32[4,8]{1,0} negate(%x)
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %y)
}

%slice (a: f32[3,4,8], i: s32[]) -> f32[8] {
  %a = f32[3,4,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,4,8]{2,1,0} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,4,8}
  ROOT %r = f32[8]{0} reduce(%s), dimensions={0,1}
}

%cheap (a: f32[4,8]) -> f32[] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %c = f32[] constant(0)
}

%dear (a: f32[4,8]) -> f32[] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %r = f32[] reduce(%a), dimensions={0,1}
}

ENTRY %main (x: f32[4,8], stack: f32[3,4,8], i: s32[]) -> f32[8] {
  %x = f32[4,8]{1,0} parameter(0)
  %stack = f32[3,4,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %t = (s32[], f32[4,8]{1,0}) tuple(%i, %x)
  %w = (s32[], f32[4,8]{1,0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %y = f32[4,8]{1,0} get-tuple-element(%w), index=1
  %c = f32[] conditional(%i, %y, %y), branch_computations={%dear, %cheap}
  %z = f32[4,4]{1,0} dot(%y, %y), lhs_contracting_dims={1}
  ROOT %f = f32[8]{0} fusion(%stack, %i), kind=kLoop, calls=%slice
}
"""


def test_the_counter_knows_loops_branches_slices_and_products():
    loop, product, fusion = moves(HLO, 32)
    assert (loop.times, loop.reads, loop.writes) == (3, (128,), (128,))
    assert product.product
    assert (product.reads, product.writes) == ((128, 128), ())
    assert (fusion.reads, fusion.writes, fusion.product) == ((128,), (), False)


FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "results"


def test_xlas_own_compilers_agree():
    """The committed counts of programs compiled for an H200; what is counted here is what they do."""
    content = json.loads((FOLDER / "ahead.json").read_text())
    assert (FOLDER / "ahead.md").read_text() == ahead.page(content)
    cells = {(c["platform"], c["name"], c["dtype"]): c for c in content["cells"]}
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        found = traffic(dtype)
        for name in ("rows first", "columns first"):
            cell = cells["cuda", name, dtype]
            assert cell["writes"] == writes(found) == 1
            # Three sums over an axis that is not the last are two kernels.
            assert cell["reads"] == reads(found) + 1
            assert cell["bytes"] * SIZE == moved_bytes(found) + width * SIZE
            assert cell["temporaries"] < 0.1
