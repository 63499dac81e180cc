"""Many devices: meshes, partition specs, ``shard_map``, and the collectives its functions use."""

from .collectives import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    pmean,
    ppermute,
    psum,
    psum_scatter,
    reduce_scatter,
)
from .mesh import make_mesh
from .shard_map import shard_map
from .spec import distribute, placements, spec_of

__all__ = [
    "all_gather",
    "all_to_all",
    "axis_index",
    "axis_size",
    "distribute",
    "make_mesh",
    "placements",
    "pmean",
    "ppermute",
    "psum",
    "psum_scatter",
    "reduce_scatter",
    "shard_map",
    "spec_of",
]
