"""A model in stages: which layers each stage of a pipeline has, and which rank holds it."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.core.axes import axis_sizes, describe
from ..parallel.mesh import is_pipeline, stage_mesh
from .config import DecoderConfig
from .counts import flops_of_parts
from .params import ModelParams, specs


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which layers each stage has, and which rank along ``pp`` holds it.

    ==========  ======================================================================
    ``layers``  for each stage, its first layer and the one after its last
    ``ranks``   for each stage, its rank
    ==========  ======================================================================

    The first stage also has the embedding, and the last one the norm, the head and modules of multi-token
    prediction. These use the embedding, and a tied head is the embedding, so then both have that.

    >>> from fmoe.models.decoder import init, preset
    >>> params = init(preset("debug"), 0)
    >>> part = Stages(layers=((0, 3), (3, 4)), ranks=(0, 1)).of_rank(params, 1)
    >>> part.embedding, [bool(layer) for layer in part.layers], part.norm.shape
    ((), [False, False, False, True], torch.Size([128]))
    """

    layers: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]

    def of_rank(self, tree: ModelParams, rank: int) -> ModelParams:
        """A model's tree where ``()`` stands for what a rank doesn't hold. So names stay as they are."""
        return self._part(tree, [stage for stage, holder in enumerate(self.ranks) if holder == rank])

    def of_stage(self, tree: ModelParams, stage: int) -> ModelParams:
        """The same of one stage."""
        return self._part(tree, [stage])

    def _part(self, tree: ModelParams, stages: Sequence[int]) -> ModelParams:
        first, last = 0 in stages, len(self.ranks) - 1 in stages
        here = {layer for stage in stages for layer in range(*self.layers[stage])}
        absent: Any = ()
        embeds = first or (last and (isinstance(tree.head, tuple) or tree.mtp != ()))
        return ModelParams(
            tree.embedding if embeds else absent,
            tuple(layer if i in here else absent for i, layer in enumerate(tree.layers)),
            tree.norm if last else absent,
            tree.head if last else absent,
            tree.mtp if last else (),
        )


def cut(
    config: DecoderConfig,
    ranks: Sequence[int],
    *,
    seq_len: int | None = None,
    costs: Sequence[float] | None = None,
) -> Stages:
    """Stages whose most expensive one costs as little as can be.

    ==========  =====================================================================
    ranks       for each stage, its rank along ``pp``, as ``Schedule.stage_to_rank``
    seq_len     of the tokens; ``None``: ``config.max_seq_len``, but at most 4096
    costs       of the embedding, of each layer, and of the norm, the head and multi-token prediction
                together; ``None``: their floating-point operations
    -> Stages   each of at least one layer
    ==========  =====================================================================

    Raises ``ValueError`` for more stages than layers, and for a wrong number of costs.

    >>> from fmoe.models.decoder import preset
    >>> cut(preset("debug"), (0, 1)).layers
    ((0, 2), (2, 4))
    >>> cut(preset("debug"), (0, 1), costs=[0, 1, 1, 1, 1, 3]).layers  # with an expensive head
    ((0, 3), (3, 4))
    """
    number, stages = config.num_layers, len(ranks)
    if not 1 <= stages <= number:
        got, expected = f"{stages} stages", f"1 to {number}, the number of layers"
        raise argument_error("cut", "ranks", got=got, expected=expected)
    each = flops_of_parts(config, seq_len or min(config.max_seq_len, 4096)) if costs is None else [*costs]
    if len(each) != number + 2 or not all(cost >= 0 for cost in each):
        expected = f"{number + 2} of at least 0: of the embedding, {number} layers, and the head"
        raise argument_error("cut", "costs", got=each, expected=expected)
    first, *layers, last = each
    layers[0], layers[-1] = layers[0] + first, layers[-1] + last
    return Stages(tuple(itertools.pairwise(_ends(layers, stages))), tuple(ranks))


def _ends(costs: Sequence[float], parts: int) -> list[int]:
    """Where to cut a list so that the most expensive part costs least."""
    sums = [0.0, *itertools.accumulate(costs)]
    best = [(sums[end], [0, end]) for end in range(len(sums))]  # of one part that ends there
    for part in range(2, parts + 1):
        best = [(0.0, [])] * part + [
            min(
                (max(best[start][0], sums[end] - sums[start]), [*best[start][1], end])
                for start in range(part - 1, end)
            )
            for end in range(part, len(sums))
        ]
    return best[-1][1]


def counted_once(tree: ModelParams) -> ModelParams:
    """What a rank holds, without its copy of an embedding if the rank of the first stage has one.

    >>> from fmoe.models.decoder import init, preset
    >>> tied = init(dataclasses.replace(preset("debug"), tied_head=True), 0)
    >>> two = Stages(((0, 2), (2, 4)), (0, 1))
    >>> [counted_once(two.of_rank(tied, rank)).embedding != () for rank in (0, 1)]
    [True, False]
    """
    return tree if tree.layers and tree.layers[0] else tree._replace(embedding=())  # type: ignore[arg-type]


def check_stages(function: str, stages: Stages | None, config: DecoderConfig, mesh: DeviceMesh) -> Stages:
    """Stages that fit the model and the mesh; ``None``: one for each rank.

    Raises ``ValueError`` unless they have every layer once, in order, and every rank has one.
    """
    pp = axis_sizes(mesh).get("pp", 1)
    if stages is None:
        if pp > config.num_layers:
            expected = f"at most {config.num_layers} ranks along pp, one for each layer"
            raise argument_error(function, "mesh", got=describe(mesh), expected=expected)
        return cut(config, range(pp))
    ends = [0, *(end for _, end in stages.layers)]
    in_order = all(a < b for a, b in stages.layers) and stages.layers == tuple(itertools.pairwise(ends))
    if not in_order or ends[-1] != config.num_layers or len(stages.ranks) != len(stages.layers):
        expected = f"each of {config.num_layers} layers once, in order, and a rank for each stage"
        remedy = "Make them with fmoe.models.stages.cut."
        raise argument_error(function, "stages", got=stages, expected=expected, remedy=remedy)
    if {*stages.ranks} != {*range(pp)}:
        expected = f"stages on each of {pp} ranks along pp, as {describe(mesh)} has"
        raise argument_error(function, "stages.ranks", got=stages.ranks, expected=expected)
    return stages


def held_on(
    function: str, config: DecoderConfig, mesh: DeviceMesh, stages: Stages | None = None
) -> tuple[ModelParams, DeviceMesh]:
    """The specs of what this device's rank along ``pp`` holds, and the mesh that they are placed on.

    Raises ``ValueError`` as :func:`check_stages` does.
    """
    tree = specs(config)
    if stages is not None or is_pipeline(mesh):
        rank = mesh.get_local_rank("pp") if is_pipeline(mesh) else 0
        tree = check_stages(function, stages, config, mesh).of_rank(tree, rank)
    return tree, stage_mesh(function, mesh)
