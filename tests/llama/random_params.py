"""Parameters of a test model drawn with NumPy: nothing to compile, norm scales away from 1."""

import jax
import numpy as np

from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import Params, abstract, stack_layers


def random_params(config: LlamaConfig, *, scan_layers: bool = False, seed: int = 0) -> Params:
    """The same numbers in either form; kernels N(0, 0.1^2), norm scales around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        mean, std = (1.0, 0.2) if path[-1].key == "scale" else (0.0, 0.1)
        return rng.normal(mean, std, leaf.shape).astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, abstract(config, scan_layers=False))
    return stack_layers(params) if scan_layers else params
