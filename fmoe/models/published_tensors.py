"""Published tensors: which ones make up a parameter, and how its pieces read and write them.

A device of a mesh holds a piece of each parameter: a slice of every dimension. It reads only that much of the
files. To write them, it gives that much to the first rank.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
import torch.distributed as dist

from ..ops.core.axes import axis_names
from ..ops.core.dtensors import is_dtensor
from ..parallel.spec import local_piece, named_axes, spec_of
from ..params import ParamSpec, is_spec
from ..tree import dotted_names
from .config import DecoderConfig
from .families import FAMILIES
from .families.family import FUSED, NEXTN_SHARED
from .params import specs
from .published import export_config

Piece = tuple[slice, ...]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Part(NamedTuple):
    """A published tensor: its place ``leaf[at]``, viewed as ``shape``."""

    name: str
    at: tuple[int, ...]
    shape: tuple[int, ...]


class Leaf(NamedTuple):
    """One parameter: its dotted name, its spec, and the published tensors that make it up.

    DeepSeek-V2 has no selection biases: they have no published tensor and are zero. ``copies`` may hold the
    whole parameter again: the head of a tied model, and what modules of multi-token prediction share.
    """

    name: str
    spec: ParamSpec
    parts: list[Part]
    copies: list[Part]


def published_leaves(
    config: DecoderConfig, *, fused: bool = False, model_type: str | None = None
) -> list[Leaf]:
    """Every parameter in flattening order. With ``fused``, a layer's experts are two tensors instead of 3 E.

    Names are those of the family ``model_type``, by default of the first that can express ``config``.

    >>> from fmoe.models.decoder import preset
    >>> leaf = published_leaves(preset("671B"))[21]
    >>> leaf.name, leaf.parts[0].name, leaf.parts[0].at
    ('layers.1.mlp.w_in', 'model.layers.1.mlp.gate_proj.weight', (0,))
    """
    family = FAMILIES[model_type or export_config(config)["model_type"]]
    table = {**family.names, **(FUSED | {**family.fused} if fused else {})}
    tree = specs(config)
    leaves = []
    for name, spec in zip(dotted_names(tree, is_leaf=is_spec), optree.tree_leaves(tree, is_leaf=is_spec)):
        kind, number, key = re.fullmatch(r"(?:(layers|mtp)\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
        prefix = _layer(config, kind, number) if kind else ""
        if kind == "mtp":
            key = key.removeprefix("layer.") if key.startswith("layer.") else f"mtp.{key}"
        leaves.append(Leaf(name, spec, _parts(prefix, table[key], spec.shape), _copies(config, name, spec)))
    return leaves


def _layer(config: DecoderConfig, kind: str, number: int | str) -> str:
    """The prefix of a layer's tensors. Modules of multi-token prediction come after the last layer."""
    return f"model.layers.{int(number) + (config.num_layers if kind == 'mtp' else 0)}."


def _copies(config: DecoderConfig, name: str, spec: ParamSpec) -> list[Part]:
    tied = config.tied_head and name == "embedding"
    shared = [tensor for ours, tensor in NEXTN_SHARED.items() if tied or ours == name]
    layers = [_layer(config, "mtp", i) for i in range(config.mtp_layers)]
    names = [HEAD] * tied + [layer + tensor for layer in layers for tensor in shared]
    return [Part(theirs, (), spec.shape) for theirs in names]


def _parts(prefix: str, templates: tuple[str, ...], shape: tuple[int, ...]) -> list[Part]:
    per_expert = "{}" in "".join(templates)
    parts = []
    for expert, which in itertools.product(range(shape[0] if per_expert else 1), range(len(templates))):
        at = (expert,) * per_expert + (which,) * (len(templates) > 1)
        rest = shape[len(at) :]
        if len(rest) == 4:  # gate and up are one dimension of a fused tensor
            rest = (rest[0], rest[1] * rest[2], rest[3])
        parts.append(Part(prefix + templates[which].format(expert), at, rest))
    return parts


def read_leaf(
    files: Mapping[str, Any],
    leaf: Leaf,
    *,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    block: Sequence[int] = (128, 128),
    piece: Piece = (),
) -> torch.Tensor:
    """One parameter, or a piece of it, from open files by tensor name.

    In float8, each ``block`` shares a scale. Dimensions that ``piece`` doesn't name are whole.
    """
    piece = _whole(piece, leaf.spec.shape)
    make = torch.empty if leaf.parts else torch.zeros
    value = make([part.stop - part.start for part in piece], dtype=leaf.spec.dtype or dtype, device=device)
    for name, inside, at in reads(leaf, piece):
        value[at].copy_(_read(files, name, inside, block))
    return value


def reads(leaf: Leaf, piece: Piece) -> Iterator[tuple[str, Piece, tuple[Any, ...]]]:
    """The reads that fill a piece of a parameter: a tensor, a part of it, and its place in the piece."""
    for part in leaf.parts:
        at, rest = _within(piece, part.at), piece[len(part.at) :]
        if at is None:
            continue
        if len(rest) == len(part.shape):
            yield part.name, rest, at
            continue
        # Gate and up are one dimension of a fused tensor.
        experts, halves, rows, columns = rest
        size = leaf.spec.shape[-2]
        for half in range(halves.start, halves.stop):
            inside = experts, slice(half * size + rows.start, half * size + rows.stop), columns
            yield part.name, inside, (*at, slice(None), half - halves.start)


def scale_name(name: str) -> str:
    return name + "_scale_inv"


def blocks_of(rank: int, block: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a float8 tensor's block: given for the last dimensions, and one for those before."""
    return ((1,) * rank + tuple(block))[-rank:]


def _read(files: Mapping[str, Any], name: str, inside: Piece, block: Sequence[int]) -> torch.Tensor:
    """Part of a published tensor. Float8 is multiplied by the scales of the blocks that the part touches."""
    tensor: torch.Tensor = files[name].get_slice(name)[inside]
    if (scales := scale_name(name)) not in files:
        return tensor
    sizes = blocks_of(len(inside), block)
    touched = tuple(slice(part.start // size, -(-part.stop // size)) for part, size in zip(inside, sizes))
    scale = _decoded(files[scales].get_slice(scales)[touched])
    for dim, (part, size) in enumerate(zip(inside, sizes)):
        scale = scale.repeat_interleave(size, dim).narrow(dim, part.start % size, part.stop - part.start)
    return tensor.float() * scale


def _decoded(scale: torch.Tensor) -> torch.Tensor:
    """A scale as numbers. A byte ``b`` stands for ``2 ** (b - 127)``, and 255 for NaN (OCP MX, E8M0)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float() if scale.dtype == torch.float8_e8m0fnu else scale


def gathered(value: torch.Tensor, at: tuple[int, ...]) -> torch.Tensor:
    """``value[at]`` on the first rank.

    Every rank calls this for a DTensor. The results of the others are meaningless.
    """
    if not is_dtensor(value):
        return value[at]
    spec, mesh = spec_of(value), value.device_mesh
    piece = _whole(local_piece(spec, value.shape, mesh), value.shape)
    whole = torch.zeros(value.shape[len(at) :], dtype=value.dtype, device=value.device)
    place = dict(zip(axis_names(mesh), mesh.get_coordinate() or ()))
    first = not any(index for axis, index in place.items() if axis not in named_axes(spec))
    if first and (here := _within(piece, at)) is not None:
        whole[piece[len(at) :]] = value.to_local()[here]
    # One rank holds each element and the others have zero bits there, so the sum changes no bit.
    dist.reduce(whole.view(torch.uint8), dst=0)
    return whole


def _within(piece: Piece, at: tuple[int, ...]) -> tuple[int, ...] | None:
    """The place within a piece of an index of the first dimensions, if it is inside."""
    held = all(part.start <= i < part.stop for part, i in zip(piece, at))
    return tuple(i - part.start for part, i in zip(piece, at)) if held else None


def _whole(piece: Piece, shape: Sequence[int]) -> Piece:
    return (*piece, *(slice(0, size) for size in shape[len(piece) :]))
