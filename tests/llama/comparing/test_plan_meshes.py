"""A mesh divides an optimizer's state as it divides the parameters: eight devices hold an eighth each."""

from __future__ import annotations

import pytest

from examples.llama.comparing.memory import Planner
from examples.llama.model.config import preset
from examples.llama.optimizers.variants import parse_variants

OPTIMIZERS = (
    "lorapre_adamw,lorapre_adamw:options=recommended,lorapre_muon,lorapre_muon:table_rank=128,"
    "lorapre_lion,lorapre_sinkgd,sage_hybrid,sage_hybrid_int8"
)
MESHES = {"fsdp": {"fsdp": 8}, "tensor": {"tensor": 8}, "both": {"fsdp": 2, "tensor": 4}}


@pytest.mark.parametrize("rank", [64, 256, 1024])
@pytest.mark.parametrize("name", MESHES)
def test_a_device_holds_an_eighth(name, rank):
    mesh = {"data": 1, "fsdp": 1, "tensor": 1, **MESHES[name]}
    planner = Planner(preset("llama3.1_8b"), rank=rank, mesh=mesh)
    alone = Planner(preset("llama3.1_8b"), rank=rank)
    for variant in parse_variants(OPTIMIZERS):
        row, whole = planner.row(variant), alone.row(variant)
        assert row.all_devices_state == whole.state_bytes
        # The norms are whole on each device, and so are their moments: nearly all that SinkGD keeps
        # at a small rank.
        of_norms = row.state["vector"]
        assert of_norms == whole.state["vector"] <= 2.2e6
        assert 8 * (row.state_bytes - of_norms) <= 1.05 * (whole.state_bytes - of_norms)
        if "sinkgd" not in variant.key:
            assert 8 * row.state_bytes <= 1.05 * whole.state_bytes


def test_low_rank_moments_cost_less_than_adamw_under_fsdp():
    planner = Planner(preset("llama3.1_8b"), rank=1024, mesh={"data": 1, "fsdp": 8, "tensor": 1})
    adamw, low_rank = map(planner.row, parse_variants("adamw,lorapre_adamw"))
    assert low_rank.state_bytes < 0.46 * adamw.state_bytes  # once 1.919, with factors whole
