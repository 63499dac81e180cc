"""Weights of published models: directories of safetensors in and out.

Nothing is unpickled. Tensors go one by one, so there is no second copy of the model.
"""

import functools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from math import prod
from pathlib import Path
from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error, some
from ..ops.core.dtensors import is_dtensor, local
from ..ops.core.memory import alone
from ..parallel.placement import held_pieces
from ..parallel.spec import as_dtensor, size_problems, spec_of
from ..parallel.together import this_rank, together
from ..params import is_spec
from ..tree import check_tensors, dotted_names
from .config import DecoderConfig
from .params import ModelParams, specs
from .published import export_config, import_config
from .published_checks import check_copy, check_files
from .published_tensors import EMBEDDING, HEAD, Leaf, Part, Piece, gathered, published_leaves, read_leaf
from .stages import Stages, held_on

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True

INDEX = "model.safetensors.index.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of parameters


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    mesh: DeviceMesh | None = None,
    stages: Callable[[DecoderConfig], Stages] | None = None,
    mtp: bool = False,
) -> tuple[DecoderConfig, ModelParams]:
    """A model from a directory as published: ``config.json`` and safetensors.

    ==========  ===============================================================================
    path        of a model of one of ``fmoe.models.families``; weights in one file or in shards,
                experts apart (as published) or fused
    dtype       of the parameters but the selection biases; ``None``: that of the embedding
    device      ``None``: the mesh's, or PyTorch's default device
    mesh        place them on it by :func:`fmoe.models.decoder.specs`, as DTensors
    stages      with ``pp``: makes what :func:`fmoe.models.decoder.init` takes
    mtp         also load the layers that predict further tokens (``num_nextn_predict_layers``), as
                ``params.mtp``; without it they are skipped
    -> config   the model that ``config.json`` describes
    -> params   for :func:`fmoe.models.decoder.forward`
    ==========  ===============================================================================

    Weights in float8 are multiplied by their ``weight_scale_inv``, block by block. Scales are floating-point
    numbers or powers of two: float8_e8m0fnu, or bytes where ``scale_fmt`` is ``"ue8m0"``. Stored rotary
    frequencies, and shared experts of size zero, are skipped. The head of a tied model may be stored, if it
    equals the embedding, and so may what layers that predict further tokens share. Files are mapped, and each
    tensor is copied from there into its parameter.

    On a mesh every rank reads only what it holds, and no weight is sent. If it holds a part of every row, the
    system may read more, since it reads whole pages.

    Raises ``ValueError`` for missing, unreadable or pickled files, and for a configuration that fmoe can't
    honour. It raises for tensors that are missing, unexpected, or of a wrong shape or dtype, and lists them
    all. It also raises for a ``dtype`` that isn't 16 to 64 bits of floating point, and for parameters that
    the mesh doesn't divide.

    >>> import tempfile
    >>> from fmoe.models import decoder
    >>> config = decoder.preset("debug")
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, config, decoder.init(config, 0))
    ...     loaded, params = load(path)
    >>> loaded == config
    True
    """
    _check_installed("load")
    path = Path(path)
    with ExitStack() as stack:
        files = _open(path, stack)
        raw = _json(path / "config.json")
        config = import_config(raw, mtp=mtp)
        tree = specs(config)
        fused = any(name.endswith("gate_up_proj") for name in files)
        leaves = published_leaves(config, fused=fused, model_type=raw["model_type"])
        block = (raw.get("quantization_config") or {}).get("weight_block_size", [128, 128])
        check_files(path, files, leaves, raw, block)
        dtype = _dtype(dtype or files[EMBEDDING].get_slice(EMBEDDING)[:0].dtype)
        copied = any(copy.name in files for leaf in leaves for copy in leaf.copies)
        device = mesh.device_type if device is None and mesh is not None else device
        read = functools.partial(read_leaf, files, dtype=dtype, device=device, block=block)
        if mesh is None:
            pieces: list[Piece] = [()] * len(leaves)
            values = [read(leaf) for leaf in leaves]
        else:
            tree, inner = held_on("huggingface.load", config, mesh, stages and stages(config))
            here = {*dotted_names(tree, is_leaf=is_spec)}
            leaves = [leaf for leaf in leaves if leaf.name in here]
            placed, pieces = held_pieces("huggingface.load", tree, inner)
            held = zip(leaves, placed, pieces)
            values = [as_dtensor(read(leaf, piece=piece), inner, spec) for leaf, spec, piece in held]
        if copied:
            with nullcontext() if mesh is None else together():
                for leaf, piece, value in zip(leaves, pieces, values):
                    for copy in (copy for copy in leaf.copies if copy.name in files):
                        found = read(leaf._replace(parts=[copy]), piece=piece)
                        check_copy(path, leaf, copy, found, local(value))
    return config, optree.tree_unflatten(optree.tree_structure(tree, is_leaf=is_spec), values)


def save(
    path: str | Path,
    config: DecoderConfig,
    params: ModelParams,
    *,
    max_shard_bytes: int = 5 * 10**9,
    model_type: str | None = None,
) -> None:
    """Write a model in the published form: ``config.json``, safetensors with experts apart, and an index.

    ================  =========================================================================
    path              a directory without safetensors; made if it doesn't exist
    config, params    of one dtype but for the selection biases
    max_shard_bytes   how large a file may grow, unless one tensor is larger
    model_type        the family to write; ``None``: the first that can express ``config``
    ================  =========================================================================

    transformers and :func:`load` read it. Tokenizer and generation settings are not part of a model here, so
    copy their files beside it. If params are DTensors, every rank calls this. One published tensor after
    another is gathered, and the first rank writes the same files that one process would. An error on one rank
    is then raised on all.

    Parameters that are one tensor are written as two.

    Raises ``ValueError`` listing all parameters that don't belong to ``config``, for configurations that
    transformers can't express, and for a part of a model.

    >>> import tempfile
    >>> from fmoe.models import decoder
    >>> config = decoder.preset("debug")
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, config, decoder.init(config, 0), max_shard_bytes=4 * 2**20)
    ...     sorted(file.name for file in Path(path).glob("*.safetensors"))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    _check_installed("save")
    path = Path(path)
    if any(part == () for part in (params.embedding, *params.layers, params.norm)):
        got, expected = "a part of a model, as a rank along pp holds", "a whole one"
        remedy = "Load a checkpoint of it on a mesh without pp, or on one device."
        raise argument_error("huggingface.save", "params", got=got, expected=expected, remedy=remedy)
    shared = any(is_dtensor(leaf) for leaf in optree.tree_leaves(params))
    step: Callable[[], AbstractContextManager[None]] = together if shared else nullcontext
    writes = not shared or this_rank() == 0
    with step():
        raw = export_config(config, model_type)
        leaves = published_leaves(config, model_type=raw["model_type"])
        tensors = _checked(leaves, params)
        if writes:
            _make(path)
    copied = {id(value) for value, unshared in zip(tensors, alone(tensors)) if not unshared}
    again = [[copy for copy in leaf.copies if copy.name != HEAD] for leaf in leaves]
    copied |= {id(value) for copies, value in zip(again, tensors) if copies}
    leaves = [leaf._replace(parts=leaf.parts + copies) for leaf, copies in zip(leaves, again)]
    shards = _shards(leaves, tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        host: dict[str, torch.Tensor] = {}
        for value, part in shard:
            tensor = gathered(value, part.at)
            if writes:  # copies, one shard at a time, only what isn't contiguous in host memory or is shared
                own = tensor.to("cpu", copy=id(value) in copied, memory_format=torch.contiguous_format)
                host[part.name] = own.contiguous()
            weight_map[part.name] = file
        with step():
            if writes:
                save_file(host, path / file, metadata={"format": "pt"})
    total = sum(_nbytes(*held) for shard in shards for held in shard)
    raw["torch_dtype"] = str(params.embedding.dtype).removeprefix("torch.")
    with step():
        if writes:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _check_installed(function: str) -> None:
    if not INSTALLED:
        remedy = "Install it with: pip install safetensors numpy."
        raise ImportError(f"huggingface.{function}: needs safetensors. {remedy}")


def _make(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        got, expected = f"{path}, which holds safetensors", "a directory without"
        remedy = "Choose another directory, or clear this one."
        raise argument_error("huggingface.save", "path", got=got, expected=expected, remedy=remedy)
    path.mkdir(parents=True, exist_ok=True)


def _shards(
    leaves: list[Leaf], tensors: list[torch.Tensor], max_bytes: int
) -> list[list[tuple[torch.Tensor, Part]]]:
    """The published tensors of each file: for each its parameter, and its part of the parameter."""
    shards: list[list[tuple[torch.Tensor, Part]]] = [[]]
    size = 0
    for value, part in ((value, part) for leaf, value in zip(leaves, tensors) for part in leaf.parts):
        size += _nbytes(value, part)
        if shards[-1] and size > max_bytes:
            shards.append([])
            size = _nbytes(value, part)
        shards[-1].append((value, part))
    return shards


def _nbytes(value: torch.Tensor, part: Part) -> int:
    return prod(part.shape) * value.element_size()


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file that holds each tensor of a directory."""
    indexed = _indexed(path / INDEX) if (path / INDEX).exists() else {}
    files = sorted(set(indexed.values())) or ["model.safetensors"]
    if missing := [name for name in ["config.json", *files] if not (path / name).exists()]:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        got, remedy = f"{path} without {', '.join(missing)}", "Complete the download."
        if not path.is_dir():
            got = f"{path}, which is no directory here"
            remedy = "Download it first, as with hf download OWNER/NAME --local-dir DIR."
        if pickled:
            got += f", but with {', '.join(pickled)}"
            remedy = "Pickled weights are not read; transformers' save_pretrained writes them as safetensors."
        expected = f"config.json, and model.safetensors or what {INDEX} names"
        raise argument_error("huggingface.load", "path", got=got, expected=expected, remedy=remedy)
    found: dict[str, Any] = {}
    for name in files:
        try:
            file = stack.enter_context(safe_open(path / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path / name, str(error)) from error
        held = file.keys()
        found |= {tensor: file for tensor in held if tensor not in found or indexed.get(tensor) == name}
    return found


def _indexed(path: Path) -> dict[str, str]:
    """The file name for each tensor in this index. The files lie beside the index."""
    files = _json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise _unreadable(path, "no weight_map")
    if odd := [repr(name) for name in files.values() if not isinstance(name, str) or Path(name).name != name]:
        raise _unreadable(path, f"a weight_map to {', '.join(sorted(set(odd)))}, not to files beside it")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"{type(content).__name__}, not an object")
    return content


def _unreadable(path: Path, problem: str) -> ValueError:
    expected, remedy = "a file as published", "Download it again."
    return argument_error("huggingface.load", str(path), got=problem, expected=expected, remedy=remedy)


def _dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        expected = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        remedy = "Without dtype= it is that of the published embedding."
        raise argument_error("huggingface.load", "dtype", got=dtype, expected=expected, remedy=remedy)
    return dtype


def _checked(leaves: list[Leaf], params: ModelParams) -> list[torch.Tensor]:
    """The leaves of params, after a check that they are as described, of one dtype, and expressible."""
    found = dict(zip(dotted_names(params), check_tensors("huggingface.save", "params", params)))
    dtype = params.embedding.dtype
    known = {leaf.name for leaf in leaves}
    wrong = [] if dtype in DTYPES else [f"parameters of {dtype}"]
    wrong += [f"{name} unexpected" for name in found if name not in known]
    for name, spec, parts, _ in leaves:
        value, wanted = found.get(name), (spec.shape, spec.dtype or dtype)
        if value is None:
            wrong.append(f"{name} missing")
        elif (tuple(value.shape), value.dtype) != wanted:
            wrong.append(f"{name} {tuple(value.shape)} {value.dtype}, not {wanted[0]} {wanted[1]}")
        elif is_dtensor(value) and (odd := size_problems(spec_of(value), value, value.device_mesh)):
            wrong += [f"{name}, whose {problem}" for problem in odd]
        elif not parts and (value.to_local() if is_dtensor(value) else value).any():
            wrong.append(f"{name} not zero, which has no place in its family")
    if wrong:
        got, expected = some(wrong, "; "), "the parameters of config"
        remedy = "Pass the configuration the parameters were made for."
        raise argument_error("huggingface.save", "params", got=got, expected=expected, remedy=remedy)
    return [found[leaf.name].detach() for leaf in leaves]
