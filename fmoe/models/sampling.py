"""Text from a trained model, one token at a time."""

from typing import Any

import optree
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..errors import argument_error
from ..ops.core.axes import describe
from ..ops.core.dtensors import is_dtensor
from ..ops.random import categorical, check_one_key, fold_in
from ..parallel.mesh import is_pipeline
from ..parallel.spec import distribute
from ..params import P
from .config import DecoderConfig, without_noise
from .decoder import ModelParams, forward


@torch.no_grad()
def sample(
    params: ModelParams,
    prompt: torch.Tensor,
    config: DecoderConfig,
    *,
    num_tokens: int,
    key: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    window: int | None = None,
    mesh: DeviceMesh | None = None,
) -> torch.Tensor:
    """The prompts, continued by the model.

    ===========  ===================  =============================================================
    prompt       (B, L)               int64, at least one token each
    num_tokens                        how many to add
    key          (2,)                 from :mod:`fmoe.ops.random`; the same key gives the same text
    temperature                       divides the logits; 0 takes the likeliest token
    top_k                             draw among this many of the likeliest; ``None``: all
    window                            the model sees this many of the last tokens; ``None``:
                                      ``config.max_seq_len``
    mesh                              where the params lie; all devices give and get the same
    -> tokens    (B, L + num_tokens)  int64, the prompts first
    ===========  ===================  =============================================================

    It keeps no keys and values. Each token costs a forward of the window, whose positions start at 0. The
    router has no noise.

    Raises ``ValueError`` for an empty prompt, for options out of range, for what is no key, and on a mesh
    with ``pp``.

    >>> from fmoe.models.decoder import init, preset
    >>> from fmoe import random
    >>> config = preset("debug")
    >>> prompt = torch.tensor([[100, 101, 102]])
    >>> sample(init(config, 0), prompt, config, num_tokens=5, key=random.key(0)).shape
    torch.Size([1, 8])
    """
    longest = config.max_seq_len
    for name, value, fits, expected in (
        ("prompt", f"shape {tuple(prompt.shape)}", prompt.dim() == 2 and prompt.numel() > 0, "(B, L), L > 0"),
        ("num_tokens", num_tokens, num_tokens >= 0, "at least 0"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "None or at least 1"),
        ("window", window, window is None or 1 <= window <= longest, f"None or 1 to max_seq_len={longest}"),
    ):
        if not fits:
            raise argument_error("sample", name, got=value, expected=expected)
    if mesh is not None and is_pipeline(mesh):
        remedy = "Load a checkpoint of it on a mesh without pp, or on one device."
        raise argument_error("sample", "mesh", got=describe(mesh), expected="pp=1", remedy=remedy)
    check_one_key("sample", key, prompt)
    config = without_noise(config)
    text, window = prompt, window or longest
    for number in range(num_tokens):
        seen = text[:, -window:]
        if mesh is not None:
            seen = distribute(seen, P(), mesh)
        logits, _ = forward(params, seen, config, mesh)
        last = (logits.full_tensor() if is_dtensor(logits) else logits)[:, -1].float()
        if top_k is not None and top_k < last.shape[-1]:
            least = last.topk(top_k).values[:, -1:]
            last = last.masked_fill(last < least, -torch.inf)
        if temperature == 0:
            chosen = last.argmax(-1, keepdim=True)
        else:
            chosen = categorical(fold_in(key, number), last / temperature)[:, None]
        text = torch.cat([text, chosen], 1)
    return text


def sample_text(params: ModelParams, text: str, config: DecoderConfig, tokenizer: Any, **options: Any) -> str:
    """A text, continued by the model: :func:`sample` of one prompt, with its ``options``.

    ``tokenizer`` is a :class:`fmoe.training.tokenizer.Tokenizer`.

    >>> from fmoe.models.decoder import init, preset
    >>> from fmoe import random
    >>> from fmoe.training.tokenizer import BYTES
    >>> config = preset("debug")
    >>> found = sample_text(init(config, 0), "def ", config, BYTES, num_tokens=3, key=random.key(0))
    >>> found.startswith("def ")
    True
    """
    device = optree.tree_leaves(params)[0].device
    prompt = torch.tensor([[*tokenizer.encode(text.encode())]], device=device)
    return tokenizer.decode(sample(params, prompt, config, **options)[0].tolist())
