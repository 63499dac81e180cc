"""Many devices: meshes, partition specs, ``shard_map``, collectives, and backends for ``dispatch``."""

from .backends import Backend
from .backends.all_to_all import AllToAll
from .backends.bounds import Bound
from .backends.deepep.transport import DeepEP, deepep
from .collectives import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    gather_params,
    pmean,
    ppermute,
    psum,
    psum_scatter,
    reduce_scatter,
)
from .mesh import make_mesh
from .processes import Processes, RankError
from .shard_map import shard_map
from .spec import distribute, placements, spec_of

__all__ = [
    "AllToAll", "Backend", "Bound", "DeepEP", "Processes", "RankError", "all_gather", "all_to_all",
    "axis_index", "axis_size", "deepep", "distribute", "gather_params", "make_mesh", "placements", "pmean",
    "ppermute", "psum", "psum_scatter", "reduce_scatter", "shard_map", "spec_of",
]  # fmt: skip
