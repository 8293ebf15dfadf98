"""Peers that no library here provides, after their papers' rules: APOLLO, APOLLO-Mini and Fira."""

from benchmarks.baselines.apollo import ScaleByApolloState as ScaleByApolloState
from benchmarks.baselines.apollo import apollo as apollo
from benchmarks.baselines.apollo import apollo_mini as apollo_mini
from benchmarks.baselines.apollo import scale_by_apollo as scale_by_apollo
from benchmarks.baselines.fira import ScaleByFiraState as ScaleByFiraState
from benchmarks.baselines.fira import fira as fira
from benchmarks.baselines.fira import scale_by_fira as scale_by_fira

__all__ = [
    "ScaleByApolloState",
    "ScaleByFiraState",
    "apollo",
    "apollo_mini",
    "fira",
    "scale_by_apollo",
    "scale_by_fira",
]
