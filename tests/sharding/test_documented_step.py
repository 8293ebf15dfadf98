"""The step as docs/sharding.md writes it: it runs, on both kinds of mesh, and compiles once."""

from __future__ import annotations

import pathlib
import re

import jax
import jax.monitoring
import pytest
from jax.sharding import AxisType, NamedSharding

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "sharding.md"


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_the_documented_step_compiles_once(kind):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    make = 'jax.make_mesh((2, 4), ("data", "model"))'
    assert make in snippet
    if kind == "auto":
        snippet = snippet.replace(make, make[:-1] + ", axis_types=(AxisType.Auto,) * 2)")
    before, loop = snippet.split("for _ in range(3):")
    scope = {"AxisType": AxisType}
    exec(before, scope)
    batch = scope["jnp"].ones(8)  # its own compilation is not the step's
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        exec("for _ in range(3):" + loop.replace("jnp.ones(8)", "batch"), scope | {"batch": batch})
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1
    moments = [x for x in jax.tree.leaves(scope["shardings"]) if isinstance(x, NamedSharding)]
    assert sum(sharding.spec != jax.P() for sharding in moments) == 6  # 2 of embed, 4 factors of up
