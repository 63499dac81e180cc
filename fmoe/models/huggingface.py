"""Weights of published DeepSeek models: directories of safetensors in and out.

Nothing is unpickled, and no second copy of the model is made: tensors go one by one.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optree
import torch

from ..errors import argument_error
from ..tree import check_tensors, dotted_names, is_spec
from .config import DeepSeekV3Config
from .deepseek_v3 import ModelParams, specs
from .published import Leaf, export_config, import_config, published_leaves

try:
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError("fmoe.models.huggingface needs safetensors: pip install 'fmoe[huggingface]'") from error

INDEX = "model.safetensors.index.json"


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[DeepSeekV3Config, ModelParams]:
    """A model from a directory as published: ``config.json`` and safetensors.

    ==========  ===============================================================================
    path        of a ``DeepseekV3ForCausalLM`` or ``DeepseekV2ForCausalLM``, its weights in one
                file or in shards, its experts apart (as published) or fused
    dtype       of the parameters but the selection biases; ``None``: that of the embedding
    device      ``None``: PyTorch's default device
    -> config   what ``config.json`` describes
    -> params   for :func:`fmoe.models.deepseek_v3.forward`
    ==========  ===============================================================================

    Weights in float8 with ``weight_scale_inv`` are multiplied out, block by block. The layers that predict
    further tokens (``num_nextn_predict_layers``) and stored rotary frequencies are passed over. Files are
    mapped, and each tensor is copied from there into the parameter it is a part of.

    Raises ``ValueError`` for a directory without its files or with pickled ones only, for a configuration
    fmoe can't honour, and for tensors that are missing, unexpected or of a wrong shape, all of them by name.

    >>> import tempfile
    >>> from fmoe.models import deepseek_v3
    >>> config = deepseek_v3.preset("debug")
    >>> with tempfile.TemporaryDirectory() as path:
    ...     save(path, config, deepseek_v3.init(config, 0))
    ...     loaded, params = load(path)
    >>> loaded == config
    True
    """
    path = Path(path)
    with ExitStack() as stack:
        files = _open(path, stack)
        raw = json.loads((path / "config.json").read_text())
        config = import_config(raw)
        leaves = published_leaves(config, fused=any(name.endswith("gate_up_proj") for name in files))
        block = (raw.get("quantization_config") or {}).get("weight_block_size", [128, 128])
        _check(path, files, leaves, raw, block)
        dtype = dtype or files["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight").dtype
        values = [read_leaf(files, leaf, dtype=dtype, device=device, block=block) for leaf in leaves]
    return config, optree.tree_unflatten(optree.tree_structure(specs(config), is_leaf=is_spec), values)


def read_leaf(
    files: dict[str, Any],
    leaf: Leaf,
    *,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    block: Sequence[int] = (128, 128),
) -> torch.Tensor:
    """One parameter, from open files by tensor name; ``block`` is what shares a scale in float8."""
    make = torch.empty if leaf.parts else torch.zeros
    value = make(leaf.spec.shape, dtype=leaf.spec.dtype or dtype, device=device)
    for part in leaf.parts:
        tensor = files[part.name].get_tensor(part.name)
        scale_name = part.name + "_scale_inv"
        if scale_name in files:
            scale = files[scale_name].get_tensor(scale_name)
            for dim, size in enumerate(block):
                scale = scale.repeat_interleave(size, dim).narrow(dim, 0, tensor.shape[dim])
            tensor = tensor.float() * scale
        value[part.at].view(part.shape).copy_(tensor)
    return value


def save(
    path: str | Path, config: DeepSeekV3Config, params: ModelParams, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a model as published ones are: ``config.json``, safetensors of experts apart, and their index.

    ================  =========================================================================
    path              a directory without safetensors; made if it doesn't exist
    config, params    of one dtype but for the selection biases
    max_shard_bytes   how large a file may grow, unless one tensor is larger
    ================  =========================================================================

    transformers and :func:`load` read it. The tokenizer and generation settings are not part of a model here:
    copy their files beside it.

    Raises ``ValueError`` for parameters that don't belong to ``config``, all of them by name, and for
    configurations that transformers can't express.
    """
    path = Path(path)
    raw = export_config(config)
    leaves = published_leaves(config)
    tensors = _checked(leaves, params)
    if any(path.glob("*.safetensors")):
        raise argument_error(
            "huggingface.save",
            "path",
            got=f"{path}, which holds safetensors",
            expected="a directory without",
            remedy="Choose another directory, or clear this one.",
        )
    shards = _shards(leaves, tensors, max_shard_bytes)
    path.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Copies only what isn't in the host's memory in one piece, and a shard of it at a time.
        host = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        save_file(host, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    raw["torch_dtype"] = str(params.embedding.dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _shards(leaves: list[Leaf], tensors: list[torch.Tensor], max_bytes: int) -> list[dict[str, torch.Tensor]]:
    """Views of the published tensors, file by file."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for leaf, value in zip(leaves, tensors):
        for part in leaf.parts:
            tensor = value[part.at]
            if shards[-1] and size + tensor.nbytes > max_bytes:
                shards.append({})
                size = 0
            shards[-1][part.name] = tensor
            size += tensor.nbytes
    return shards


def _open(path: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of every tensor in a directory."""
    files = ["model.safetensors"]
    if (path / INDEX).exists():
        files = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
    if missing := [name for name in ["config.json", *files] if not (path / name).exists()]:
        pickled = sorted(file.name for file in path.glob("*.bin"))
        raise argument_error(
            "huggingface.load",
            "path",
            got=f"{path} without {', '.join(missing)}"
            + (f", but with {', '.join(pickled)}" if pickled else ""),
            expected=f"config.json, and model.safetensors or what {INDEX} names",
            remedy="Pickled weights are not read; transformers' save_pretrained writes them as safetensors."
            if pickled
            else "Complete the download.",
        )
    opened = [stack.enter_context(safe_open(path / name, framework="pt")) for name in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118  (not a dict)


def _check(
    path: Path, files: dict[str, Any], leaves: list[Leaf], raw: dict[str, Any], block: Sequence[int]
) -> None:
    """Raise ``ValueError`` unless the files hold the leaves' tensors and nothing else of the model."""
    expected = {part.name: part.shape for leaf in leaves for part in leaf.parts}
    found = {name: file.get_slice(name) for name, file in files.items()}
    for name, shape in list(expected.items()):
        if name + "_scale_inv" in found or (name in found and found[name].get_dtype().startswith("F8")):
            expected[name + "_scale_inv"] = tuple(-(-size // n) for size, n in zip(shape, block))
    first = raw["num_hidden_layers"]
    further = range(first, first + (raw.get("num_nextn_predict_layers") or 0))
    passed_over = tuple(f"model.layers.{layer}." for layer in further)
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [
            name
            for name in found
            if name not in expected and not name.startswith(passed_over) and not name.endswith(".inv_freq")
        ],
        "of a wrong shape": [
            f"{name} {tuple(found[name].get_shape())}, not {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].get_shape()) != shape
        ],
    }
    if any(problems.values()):
        raise argument_error(
            "huggingface.load",
            "path",
            got=f"{path} with tensors "
            + "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names),
            expected="the tensors its config.json implies",
            remedy="Correct the configuration or the files.",
        )


def _checked(leaves: list[Leaf], params: ModelParams) -> list[torch.Tensor]:
    """The leaves of params, which must be those described, of one dtype, and expressible."""
    found = dict(zip(dotted_names(params), check_tensors("huggingface.save", "params", params)))
    dtype = params.embedding.dtype
    known = {leaf.name for leaf in leaves}
    wrong = [f"{name} unexpected" for name in found if name not in known]
    for name, spec, parts in leaves:
        value, wanted = found.get(name), (spec.shape, spec.dtype or dtype)
        if value is None:
            wrong.append(f"{name} missing")
        elif (tuple(value.shape), value.dtype) != wanted:
            wrong.append(f"{name} {tuple(value.shape)} {value.dtype}, not {wanted[0]} {wanted[1]}")
        elif not parts and value.any():
            wrong.append(f"{name} not zero, which DeepSeek-V2 can't express")
    if wrong:
        raise argument_error(
            "huggingface.save",
            "params",
            got="; ".join(wrong),
            expected="the parameters of config",
            remedy="Pass the configuration the parameters were made for.",
        )
    return [found[leaf.name].detach() for leaf in leaves]
