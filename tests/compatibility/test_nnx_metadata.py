"""The state of ``unboxed(tx)`` says where it belongs: what NNX's trainers read, place, restore and compile."""

from __future__ import annotations

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_optax
import sage_optax
from layout_optax import ParamLayout, state_shardings, unboxed
from tests.compatibility import runs
from tests.compatibility.nnx_model import make_model

OPTIMIZERS = {
    "sage_hybrid": lambda: unboxed(sage_optax.sage_hybrid(1e-2, mu_dtype="int8")),
    "lorapre_adamw": lambda: unboxed(runs.OPTIMIZERS["lorapre_adamw"]()),
    "accumulated": lambda: optax.MultiSteps(
        unboxed(
            optax.inject_hyperparams(
                lorapre_optax.lorapre_lion, static_args=lorapre_optax.STATIC_ARGS
            )(1e-2, 2)
        ),
        2,
    ),
}


def optimizer_state(optimizer):
    return nnx.state(optimizer, nnx.optimizer.OptState)


def pairs(*trees):
    return zip(*(jax.tree.leaves(nnx.as_pure(tree)) for tree in trees), strict=True)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trainer_that_reads_the_metadata_places_the_state_right(name, kind, tmp_path):
    """As Tunix does it: before the first step and after a restore, with one compilation for all steps."""
    mesh = runs.make_mesh(kind)
    with jax.set_mesh(mesh):
        model = make_model()
        tx = OPTIMIZERS[name]()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        expected = state_shardings(tx, nnx.state(model, nnx.Param))

        def place():
            state = optimizer_state(optimizer)
            put = (
                jax.sharding.reshard
                if kind == AxisType.Explicit
                else (jax.lax.with_sharding_constraint)
            )
            specs = nnx.get_named_sharding(state, mesh)
            nnx.update(optimizer, jax.tree.map(put, state, specs))

        def check():
            for array, sharding in pairs(optimizer.opt_state, expected):
                assert array.sharding.is_equivalent_to(sharding, array.ndim)

        for array, sharding in pairs(optimizer.opt_state, expected):
            assert array.ndim == 0 or array.sharding.is_equivalent_to(sharding, array.ndim)
        place()
        check()

        def loss_fn(model, tokens):
            graphdef, params = nnx.split(model)
            loss = lambda p, tokens: runs.cross_entropy(nnx.merge(graphdef, p)(tokens), tokens)  # noqa: E731
            return runs.auto(loss, mesh)(params, tokens)

        traces = []

        @nnx.jit
        def step(model, optimizer, tokens):
            traces.append(1)
            optimizer.update(model, nnx.grad(loss_fn)(model, tokens))

        tokens = runs.batch(0, mesh)
        compiled = []

        def listen(event, duration, **_):
            if event.endswith("backend_compile_duration"):
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            for _ in range(3):
                step(model, optimizer, tokens)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert len(traces) == len(compiled) == 1
        check()
        saved = jax.tree.map(np.asarray, nnx.as_pure(optimizer_state(optimizer)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", optimizer_state(optimizer))
            state = optimizer_state(nnx.Optimizer(model, tx, wrt=nnx.Param))
            template = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                state,
                nnx.get_named_sharding(state, mesh),
            )
            checkpointer.wait_until_finished()
            nnx.update(optimizer, checkpointer.restore(tmp_path / "state", template))
        check()
        for found, was in pairs(optimizer_state(optimizer), saved):
            np.testing.assert_array_equal(found, was)
        step(model, optimizer, tokens)
        assert len(traces) == 1


class Scanned(nnx.Module):
    """Names as MaxText gives them: logical, with the scanned axis beside them."""

    def __init__(self):
        names = {"eager_sharding": False}
        self.embedding = nnx.Param(
            jnp.ones((64, 16)), out_sharding=("vocab", "embed"), tag="mine", **names
        )
        self.kernel = nnx.Param(
            jnp.ones((16, 3, 32)),
            out_sharding=("embed", "mlp"),
            param_scan_axis=1,
            **{nnx.PARTITION_NAME: "layers", **names},
        )
        # MaxText's own variables hold their names twice, the older way too.
        self.twice = nnx.Param.from_metadata(
            jnp.ones((16, 3, 32)),
            {**self.kernel.get_metadata(), "sharding_names": ("embed", "layers", "mlp")}
            | {"out_sharding": ("embed", "layers", "mlp")},
        )
        self.scale = nnx.Param(jnp.ones(16))


LAYOUT = {
    "embedding": ParamLayout("embedding", (0,), (1,)),
    "kernel": ParamLayout("matrix", (2,), (0,)),
    "twice": ParamLayout("matrix", (2,), (0,)),
    "scale": ParamLayout("vector", (), (0,)),
}


@pytest.mark.parametrize("drops", [False, True], ids=["keeps", "drops"])
@pytest.mark.parametrize(("rank", "split"), [(8, True), (6, False)])
def test_logical_names_are_projected_before_any_mesh_is_known(rank, split, drops):
    """As MaxText does it: shapes first, rules for mesh axes later; eight devices bound what a name means.

    MaxText too has JAX drop mesh axes of one device from types.
    """
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", drops)
    try:
        check_logical_names(rank, split)
    finally:
        jax.config.update("jax_remove_size_one_mesh_axis_from_type", False)


def check_logical_names(rank, split):
    tx = unboxed(lorapre_optax.low_rank_ema(0.9, rank, layout=LAYOUT))
    made = nnx.eval_shape(lambda: nnx.Optimizer(Scanned(), tx, wrt=nnx.Param))
    held = made.opt_state
    names = lambda leaf: leaf.get_metadata().get("out_sharding")  # noqa: E731
    assert names(held.left["kernel"]) == ("layers", "embed" if split else None, "mlp")
    assert names(held.left["twice"]) == names(held.left["kernel"])
    assert names(held.right["kernel"]) == ("embed", "mlp" if split else None, "layers")
    assert names(held.left["embedding"]) == ("embed" if split else None, "vocab")
    assert names(held.full["scale"]) is None
    assert type(held.left["embedding"]) is nnx.optimizer.OptVariable
    assert held.left["embedding"].get_metadata()["tag"] == "mine"
    assert "param_scan_axis" not in held.left["kernel"].get_metadata()
    rules = (("vocab", "tensor"), ("embed", "fsdp"), ("mlp", "tensor"), ("layers", None))
    with nnx.logical_axis_rules(rules):
        specs = nnx.get_partition_spec(held)
    assert specs.left["embedding"].get_value() == P("fsdp" if split else None, "tensor")
    assert specs.left["kernel"].get_value() == P(None, "fsdp" if split else None, "tensor")


def test_two_names_on_a_rank_axis():
    """Mesh axes go together; of logical names, which rules take one by one, the first goes alone."""
    layout = {"kernel": ParamLayout("matrix", (0, 1), (2,))}
    tx = unboxed(lorapre_optax.low_rank_ema(0.9, 8, layout=layout))

    def right(names, mesh=None):
        box = nnx.Param(jnp.ones((4, 16, 32)), out_sharding=names, mesh=mesh, eager_sharding=False)
        return tx.init({"kernel": box}).right["kernel"].get_metadata()["out_sharding"]

    mesh = runs.make_mesh(AxisType.Auto)
    assert right(("fsdp", "tensor", None), mesh) == (("fsdp", "tensor"), None)
    assert right(("heads", "kv", "embed")) == ("heads", "embed")
    assert right((None, "kv", "embed")) == ("kv", "embed")
    assert right((None, ("fsdp", "tensor"), None), mesh) == (("fsdp", "tensor"), None)
    assert right(("fsdp", None, "tensor"), mesh) == ("fsdp", "tensor")
    assert right(NamedSharding(mesh, P("fsdp", None, "tensor"))) == ("fsdp", "tensor")


def test_an_init_that_explicit_axes_refuse_gets_no_metadata_and_a_warning():
    def init(params):
        return {"u": jnp.linalg.svd(params["w"])[0], "mu": jnp.zeros_like(params["w"])}

    tx = unboxed(optax.GradientTransformation(init, lambda g, s, p=None: (g, s)))
    params = {"w": nnx.Param(jnp.eye(8), out_sharding=("x", "y"), eager_sharding=False)}
    with pytest.warns(UserWarning, match="unboxed: the state gets no sharding metadata"):
        state = tx.init(params)
    assert isinstance(state["mu"], jax.Array)


def test_functional_state_keeps_its_variables():
    mesh = runs.make_mesh(AxisType.Auto)
    tx = unboxed(lorapre_optax.low_rank_ema(0.9, 2))
    with jax.set_mesh(mesh):
        params = nnx.state(make_model(), nnx.Param)
        shardings = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        updates, after = jax.jit(tx.update, out_shardings=(None, shardings))(params, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for spec, sharding in zip(
        jax.tree.leaves(nnx.get_named_sharding(after, mesh)),
        jax.tree.leaves(shardings),
        strict=True,
    ):
        assert isinstance(spec, NamedSharding)
        assert spec.spec == sharding.spec


def test_many_parameters():
    """A mesh axis for each axis of each parameter is no mesh that could be: only its names count."""
    names = {"out_sharding": ("embed", "mlp"), "eager_sharding": False}
    params = {str(i): {"kernel": nnx.Param(jnp.ones((64, 16)), **names)} for i in range(40)}
    state = unboxed(lorapre_optax.low_rank_ema(0.9, 8)).init(params)
    for i in range(40):
        assert state.left[str(i)]["kernel"].get_metadata()["out_sharding"] == ("embed", "mlp")
