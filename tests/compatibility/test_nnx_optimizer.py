"""``nnx.Optimizer``: a module and its optimizer as objects, on a mesh, through a checkpoint."""

from __future__ import annotations

import jax
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from layout_optax import state_shardings, unboxed
from tests.compatibility import runs
from tests.compatibility.nnx_model import Model, make_model


def placed(tx, shardings):
    """The same transformation, whose init puts its state where it belongs."""
    init = jax.jit(tx.init, out_shardings=shardings)
    return optax.GradientTransformationExtraArgs(init, tx.update)


class ObjectRun:
    """A run that NNX holds in two mutable objects; see `runs.Run`."""

    def __init__(self, mesh, tx):
        self.model = make_model()
        tx = unboxed(tx)
        shardings = state_shardings(tx, nnx.state(self.model, nnx.Param))
        self.optimizer = nnx.Optimizer(self.model, placed(tx, shardings), wrt=nnx.Param)
        self.traces = 0

        def loss_fn(model, tokens):
            graphdef, params = nnx.split(model)

            def loss(params, tokens):
                return runs.cross_entropy(nnx.merge(graphdef, params)(tokens), tokens)

            return runs.auto(loss, mesh)(params, tokens)

        @nnx.jit
        def step(model, optimizer, tokens):
            self.traces += 1
            loss, grads = nnx.value_and_grad(loss_fn)(model, tokens)
            optimizer.update(model, grads)
            return loss

        self._step = step

    def step(self, tokens):
        loss = float(self._step(self.model, self.optimizer, tokens))
        assert self.traces == 1
        return loss

    @property
    def tree(self):
        state = {"model": nnx.state(self.model), "optimizer": nnx.state(self.optimizer)}
        return nnx.as_pure(state)

    @tree.setter
    def tree(self, tree):
        nnx.update(self.model, tree["model"])
        nnx.update(self.optimizer, tree["optimizer"])

    @property
    def params(self):
        return nnx.as_pure(nnx.state(self.model, nnx.Param))

    @property
    def opt_state(self):
        return nnx.as_pure(self.optimizer.opt_state)


@runs.over(runs.FIRST)
def test_train_save_restore_continue(optimizer, kind, tmp_path):
    runs.check(ObjectRun, optimizer, kind, tmp_path)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("optimizer", ["sage_hybrid", "lorapre_adamw"])
def test_model_and_optimizer_made_in_one_compiled_function(optimizer, kind):
    """The way of large models: shapes first, then everything is born on its device."""
    mesh = runs.make_mesh(kind)
    tx = unboxed(runs.OPTIMIZERS[optimizer]())
    _, abstract = nnx.get_abstract_model(lambda: Model(nnx.Rngs(0)), mesh)
    shardings = state_shardings(tx, abstract)

    @nnx.jit
    def create():
        model = Model(nnx.Rngs(0))
        return model, nnx.Optimizer(model, placed(tx, shardings), wrt=nnx.Param)

    with jax.set_mesh(mesh):
        made = ObjectRun.__new__(ObjectRun)
        made.model, made.optimizer = create()
    runs.check_shardings(made, mesh, runs.specs())


def test_what_happens_without_unboxed():
    """A failure of optax that a user would meet, so that we notice when Flax mends it, and ours."""
    with jax.set_mesh(runs.make_mesh(AxisType.Auto)):
        model = make_model()
        adafactor = optax.adafactor(1e-2, min_dim_size_to_factor=1)
        with pytest.raises(ValueError, match="rank"):
            nnx.Optimizer(model, adafactor, wrt=nnx.Param)
        for name in ("sage_hybrid", "lorapre_adamw"):
            bare = runs.OPTIMIZERS[name]()
            for tx in (bare, optax.MultiSteps(bare, 2), optax.chain(optax.clip(1.0), bare)):
                with pytest.raises(TypeError, match=r"' is a Param with names .*unboxed"):
                    nnx.Optimizer(model, tx, wrt=nnx.Param)
