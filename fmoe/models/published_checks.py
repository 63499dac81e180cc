"""Whether the files of a published model hold the tensors of its configuration, and no others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import argument_error
from .published_tensors import HEAD, Leaf, Part, blocks_of, scale_name

# In the words of safetensors.
NUMBERS = {"BF16", "F16", "F32", "F64"}
FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def check_files(
    path: Path, files: dict[str, Any], leaves: list[Leaf], raw: dict[str, Any], block: Sequence[int]
) -> None:
    """Raise ``ValueError`` unless the files hold the leaves' tensors and nothing else of the model.

    Copies may be stored, too.
    """
    expected = {part.name: part.shape for leaf in leaves for part in leaf.parts}
    found = {name: file.get_slice(name) for name, file in files.items()}
    dtypes = {name: tensor.get_dtype() for name, tensor in found.items()}
    expected |= {part.name: part.shape for leaf in leaves for part in leaf.copies if part.name in found}
    weights = list(expected)
    for name in weights:
        if scale_name(name) in found or dtypes.get(name) in FLOAT8:
            shape = expected[name]
            sizes = zip(shape, blocks_of(len(shape), block))
            expected[scale_name(name)] = tuple(-(-size // n) for size, n in sizes)
    first, further = raw["num_hidden_layers"], raw.get("num_nextn_predict_layers") or 0
    loaded = any(leaf.name.startswith("mtp.") for leaf in leaves)
    passed_over = tuple(f"model.layers.{first + i}." for i in range(0 if loaded else further))
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [
            name
            for name, tensor in found.items()
            if name not in expected
            and not name.startswith(passed_over)
            and not name.endswith(".inv_freq")
            and not (".shared_expert" in name and 0 in tensor.get_shape())  # transformers writes absent ones
        ],
        "of a wrong shape": [
            f"{name} {tuple(found[name].get_shape())}, not {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].get_shape()) != shape
        ],
        "of a wrong dtype": _wrong_dtypes(weights, dtypes, raw.get("quantization_config") or {}),
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        got, implied = f"{path} with tensors {listed}", "the tensors its config.json implies"
        raise argument_error("huggingface.load", "path", got=got, expected=implied)


def _wrong_dtypes(weights: list[str], dtypes: dict[str, str], quantization: dict[str, Any]) -> list[str]:
    """Weights that aren't floating-point numbers, and scales that aren't numbers or scale no float8."""
    exponents = quantization.get("scale_fmt") == "ue8m0"
    wrong = []
    for name in weights:
        weight, scale = dtypes.get(name), dtypes.get(scale_name(name))
        if weight is not None and weight not in NUMBERS | FLOAT8:
            wrong.append(f"{name} {weight}, not floating-point numbers")
        elif scale is not None and weight is not None and weight not in FLOAT8:
            wrong.append(f"{name} {weight}, not float8, beside a {scale_name(name)}")
        elif scale == "U8" and not exponents:
            wrong.append(f"{scale_name(name)} U8 without a scale_fmt of 'ue8m0'")
        elif scale is not None and scale not in NUMBERS | {"F8_E8M0", "U8"}:
            wrong.append(f"{scale_name(name)} {scale}, not floating-point numbers or exponents")
    return wrong


def check_copy(path: Path, leaf: Leaf, copy: Part, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ``ValueError`` unless a copy has the bits of its parameter."""
    if torch.equal(*(each.contiguous().view(torch.uint8) for each in (found, expected))):
        return
    got = f"{path}, whose {copy.name} differs from its {leaf.parts[0].name}"
    wanted = "equal ones, as modules of multi-token prediction share it"
    remedy = "Remove the copy, or load without mtp=True."
    if copy.name == HEAD:
        wanted = "equal ones, as its config.json has tie_word_embeddings"
        remedy = "Set that to false if the model has a head of its own, or remove the head."
    raise argument_error("huggingface.load", "path", got=got, expected=wanted, remedy=remedy)
