"""Mixture-of-experts training as pure functions on PyTorch."""

import warnings

with warnings.catch_warnings():  # without numpy PyTorch warns once, when it first looks for it
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch

    torch.device("cpu")

from .graphs import graphed
from .models.moe import MoEParams, moe_forward, moe_init, shard_params
from .ops import random
from .ops.balance import MoEStats, update_expert_bias
from .ops.combine import combine, reduce
from .ops.core.naming import checkpoint_name
from .ops.dispatch import Plan, align_rows, dispatch, expand
from .ops.experts import ExpertParams, experts_grouped_mm
from .ops.random import dropout
from .ops.route import RouterConfig, RouterParams, Routing, route
from .parallel.mesh import make_mesh
from .parallel.shard_map import shard_map
from .params import P
from .transforms import (
    compress,
    exact_on_overflow,
    offload,
    remat,
    save,
    save_everything,
    save_nothing,
    value_and_grad,
)

__version__ = "0.2.0"

__all__ = [
    "ExpertParams",
    "MoEParams",
    "MoEStats",
    "P",
    "Plan",
    "RouterConfig",
    "RouterParams",
    "Routing",
    "align_rows",
    "checkpoint_name",
    "combine",
    "compress",
    "dispatch",
    "dropout",
    "exact_on_overflow",
    "expand",
    "experts_grouped_mm",
    "graphed",
    "make_mesh",
    "moe_forward",
    "moe_init",
    "offload",
    "random",
    "reduce",
    "remat",
    "route",
    "save",
    "save_everything",
    "save_nothing",
    "shard_map",
    "shard_params",
    "update_expert_bias",
    "value_and_grad",
]
