"""Random numbers as values: functions of a key, a small integer tensor, and of nothing else.

A number depends on its key and on its place in the tensor, by the counter-based generator Threefry. So the
numbers are the same on any device, however they are computed: under ``torch.func`` transforms, when
``fmoe.remat`` runs again, compiled, and piece by piece on a mesh. No generator has a state that could differ.

Draw once with a key. For more, make keys of it: :func:`split`, or :func:`fold_in` of a step, the number of a
layer, the position of a token. The numbers are those of ``jax.random`` with its default keys.

>>> from fmoe import random
>>> of_step = random.fold_in(random.key(0), 100)
>>> random.uniform(of_step, (2,))
tensor([0.9635, 0.3647])
"""

import math
from collections.abc import Sequence

import torch

from ..errors import argument_error
from ..params import P
from .core.axes import Group, names_of, resolve
from .core.dtensors import is_dtensor

WORD = 0xFFFFFFFF  # 32 bits, in int64: PyTorch has few operators for unsigned integers
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
PARITY = 0x1BD11BDA
WHOLE = P()  # every device draws the whole tensor


def key(seed: int, *, device: str | torch.device | None = None) -> torch.Tensor:
    """A key: int64 (2,), two words of 32 bits.

    Raises ``ValueError`` unless the seed is an integer from 0 to ``2**64 - 1``.

    Source: ``jax.random.key``.

    >>> key(7)
    tensor([0, 7])
    """
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise argument_error("key", "seed", got=repr(seed), expected="an integer from 0 to 2**64 - 1")
    return torch.tensor([seed >> 32, seed & WORD], dtype=torch.int64, device=device)


def split(key: torch.Tensor, num: int = 2) -> torch.Tensor:
    """``num`` keys (num, 2), of which the i-th is ``fold_in(key, i)``. Draw with them instead of ``key``.

    Raises ``ValueError`` for what is no key, and for ``num`` below 1.

    Source: ``jax.random.split``.

    >>> of_dropout, of_noise = split(key(0))
    >>> normal(of_dropout, (2,)), normal(of_noise, (2,))
    (tensor([ 1.0040, -0.9063]), tensor([-2.4425, -2.0357]))
    """
    check_key("split", key)
    if num < 1:
        raise argument_error("split", "num", got=num, expected="at least 1")
    return fold_in(key[..., None, :], torch.arange(num, device=key.device))


def fold_in(key: torch.Tensor, data: int | torch.Tensor) -> torch.Tensor:
    """A key for each number in ``data``: a step, the number of a layer, the positions of tokens.

    =======  ====================  ===================================================================
    key      (..., 2)
    data     an integer, or (...)  integers from 0 to ``2**63 - 1``; its shape is broadcast with the key's
    -> key   (..., 2)
    =======  ====================  ===================================================================

    Raises ``ValueError`` for what is no key, for ``data`` that isn't of integers, and for an integer out of
    range. A tensor's numbers aren't looked at.

    Source: ``jax.random.fold_in``, whose data are below ``2**32``.

    >>> of_step = fold_in(key(0), 100)
    >>> fold_in(of_step, torch.arange(5)).shape  # a key for each of five tokens
    torch.Size([5, 2])
    """
    check_key("fold_in", key)
    integers = type(data) is int
    if isinstance(data, torch.Tensor):
        integers = not (data.is_floating_point() or data.is_complex() or data.dtype == torch.bool)
    if not integers:
        got = data.dtype if isinstance(data, torch.Tensor) else repr(data)
        raise argument_error("fold_in", "data", got=got, expected="an integer, or a tensor of integers")
    if isinstance(data, int) and not 0 <= data < 2**63:
        raise argument_error("fold_in", "data", got=data, expected="an integer from 0 to 2**63 - 1")
    data = data.long() if isinstance(data, torch.Tensor) else data
    return torch.stack(threefry2x32(key, (data >> 32) & WORD, data & WORD), -1)


def bits(key: torch.Tensor, shape: Sequence[int], *, spec: P = WHOLE) -> torch.Tensor:
    """32 random bits for each element: int64, from 0 to ``2**32 - 1``. The rest is as for :func:`uniform`.

    Source: ``jax.random.bits``.

    >>> bits(key(0), (3,))
    tensor([4070199207, 4202968722, 1427181096])
    """
    high, low = _words("bits", key, shape, spec)
    return high ^ low


def uniform(
    key: torch.Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    spec: P = WHOLE,
) -> torch.Tensor:
    """Numbers from 0 to 1, without 1, on the key's device. They are equal bit for bit everywhere.

    =========  =================  ====================================================================
    key        (..., 2)           several keys draw a tensor each
    shape
    dtype                         ``torch.float32`` (multiples of ``2**-23``) or ``torch.float64``
    spec                          inside :func:`fmoe.shard_map`: where the tensor lies. ``shape`` is then that
                                  of this device's piece, and the numbers are this piece of the whole
    -> tensor  ``(..., *shape)``
    =========  =================  ====================================================================

    Raises ``ValueError`` for what is no key, for other dtypes, for axes that aren't bound, and for more axes
    than dimensions.

    Source: ``jax.random.uniform``; Threefry: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".

    >>> import fmoe
    >>> uniform(key(0), (3,))
    tensor([0.9477, 0.9786, 0.3323])
    >>> drawn = fmoe.shard_map(  # each device draws its own rows
    ...     lambda key: uniform(key, (3,), spec=fmoe.P("dp")),
    ...     fmoe.make_mesh("dp=1"), in_specs=fmoe.P(), out_specs=fmoe.P("dp"),
    ... )
    >>> drawn(key(0))
    tensor([0.9477, 0.9786, 0.3323])
    """
    number, width = _mantissas("uniform", key, shape, dtype, spec)
    return number.to(dtype) * 2.0**-width


def normal(
    key: torch.Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    spec: P = WHOLE,
) -> torch.Tensor:
    """Normal numbers of mean 0 and deviation 1. The rest is as for :func:`uniform`.

    Their last bits are those of the device's inverse error function, which differs between kinds of devices.

    Source: ``jax.random.normal``.

    >>> normal(key(0), (3,))
    tensor([ 1.6226,  2.0253, -0.4336])
    """
    number, width = _mantissas("normal", key, shape, dtype, spec)
    # From -1 to 1, without both. Exact, since it has one bit more than is drawn.
    symmetric = (4 * number + 1 - 2 ** (width + 1)).to(dtype) * 2.0 ** -(width + 1)
    return math.sqrt(2) * torch.erfinv(symmetric)


def gumbel(
    key: torch.Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    spec: P = WHOLE,
) -> torch.Tensor:
    """Gumbel numbers, ``-log(-log(uniform))``. The rest is as for :func:`normal`.

    Source: ``jax.random.gumbel``.

    >>> gumbel(key(0), (3,))
    tensor([ 2.9234,  3.8326, -0.0969])
    """
    number, width = _mantissas("gumbel", key, shape, dtype, spec)
    some = (number.to(dtype) * 2.0**-width).clamp_min(torch.finfo(dtype).tiny)
    return -torch.log(-torch.log(some))


def bernoulli(
    key: torch.Tensor,
    p: float | torch.Tensor,
    shape: Sequence[int],
    *,
    spec: P = WHOLE,
) -> torch.Tensor:
    """Bools that are true with probability ``p``, a number or a tensor broadcast to the result.

    Raises ``ValueError`` for a ``p`` that isn't. The rest is as for :func:`uniform`.

    Source: ``jax.random.bernoulli``.

    >>> bernoulli(key(0), 0.5, (3,))
    tensor([False, False,  True])
    """
    number, width = _mantissas("bernoulli", key, shape, torch.float32, spec)
    if isinstance(p, torch.Tensor) and torch.broadcast_shapes(number.shape, p.shape) != number.shape:
        expected = f"one that broadcasts to the result's, {tuple(number.shape)}"
        raise argument_error("bernoulli", "p", got=f"shape {tuple(p.shape)}", expected=expected)
    return number.float() * 2.0**-width < p


def categorical(key: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """An index along the last dimension for each row of logits (..., N), with their softmax's probability.

    ``key`` (2,) is one for all rows; or the keys (..., 2) are one for each row.

    Raises ``ValueError`` for what is no key, for keys of other rows, and for logits on another device.

    Source: ``jax.random.categorical``.

    >>> categorical(key(0), torch.tensor([[0.0, 1.0], [2.0, -torch.inf]]))
    tensor([1, 0])
    """
    check_key("categorical", key, logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if key.dim() > 1 and key.shape[:-1] != logits.shape[:-1]:
        got, expected = f"shape {tuple(key.shape)}", f"(2,) or {(*logits.shape[:-1], 2)}, a key for each row"
        raise argument_error("categorical", "key", got=got, expected=expected)
    return (logits + gumbel(key, logits.shape[key.dim() - 1 :], dtype=dtype)).argmax(-1)


def dropout(
    x: torch.Tensor,
    key: torch.Tensor,
    rate: float,
    *,
    spec: P = WHOLE,
) -> torch.Tensor:
    """``x`` with elements set to zero with probability ``rate``, and the others divided by ``1 - rate``.

    ====  =================================================================================
    x     any floating tensor, but no DTensor
    key   of this use alone: ``fold_in`` the step and the layer
    rate  from 0 to 1; at 0 it is ``x`` itself
    spec  inside :func:`fmoe.shard_map`: where ``x`` lies, as for :func:`fmoe.ops.random.uniform`
    ====  =================================================================================

    Which elements depends on ``key`` and their place alone, so ``fmoe.remat`` drops the same when it runs
    again, and so does any mesh. Under ``vmap``, examples drop the same elements unless keys are mapped, too.

    Raises ``ValueError`` for a rate out of range, for a key on another device, for what is no key, and for
    ``x`` that isn't floating, or is a DTensor.

    >>> import fmoe
    >>> fmoe.dropout(torch.ones(6), key(1), 0.5)
    tensor([2., 0., 2., 2., 0., 0.])
    """
    check_one_key("dropout", key, x)
    if not 0 <= rate <= 1:
        raise argument_error("dropout", "rate", got=rate, expected="from 0 to 1")
    if not x.is_floating_point():
        raise argument_error("dropout", "x", got=x.dtype, expected="a floating dtype")
    if is_dtensor(x):
        got, remedy = "a DTensor", "Call it inside fmoe.shard_map, with spec=."
        raise argument_error("dropout", "x", got=got, expected="a plain tensor", remedy=remedy)
    if rate == 0:
        return x
    kept = bernoulli(key, 1 - rate, x.shape, spec=spec)
    return torch.where(kept, x / (1 - rate) if rate < 1 else x, 0)


def threefry2x32(
    key: torch.Tensor, x0: torch.Tensor | int, x1: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Threefry-2x32 of 20 rounds: two words of each counter, whose words are ``x0`` and ``x1``.

    Source: Salmon et al., doi 10.1145/2063384.2063405.

    >>> threefry2x32(torch.tensor([0, 0]), 0, 0)
    (tensor(1797259609), tensor(2579123966))
    """
    k0, k1 = key[..., 0], key[..., 1]
    keys = k0, k1, k0 ^ k1 ^ PARITY
    x0, x1 = x0 + k0, (x1 + k1) & WORD  # x0 may have higher bits, which reach nothing
    for turn in range(5):
        for rotation in ROTATIONS[turn % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation | x1 >> 32 - rotation) ^ x0) & WORD
        x0, x1 = x0 + keys[(turn + 1) % 3], (x1 + keys[(turn + 2) % 3] + (turn + 1)) & WORD
    return x0 & WORD, x1


def _mantissas(
    function: str, key: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, spec: P
) -> tuple[torch.Tensor, int]:
    """Integers of as many random bits as a float's mantissa has, and how many these are."""
    if dtype not in (torch.float32, torch.float64):
        expected, remedy = "torch.float32 or torch.float64", "Round what you draw, with .to()."
        raise argument_error(function, "dtype", got=dtype, expected=expected, remedy=remedy)
    high, low = _words(function, key, shape, spec)
    return ((high ^ low) >> 9, 23) if dtype == torch.float32 else (high << 20 | low >> 12, 52)


def _words(
    function: str, key: torch.Tensor, shape: Sequence[int], spec: P
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random words for each element, by its place in the whole tensor."""
    check_key(function, key)
    place = places(function, shape, spec, key.device)
    return threefry2x32(key.view(*key.shape[:-1], *[1] * len(shape), 2), place >> 32, place & WORD)


def places(function: str, shape: Sequence[int], spec: P, device: torch.device) -> torch.Tensor:
    """The place of each element of this device's piece in the whole tensor, counted row by row."""
    if len(spec) > len(shape):
        expected = f"at most {len(shape)} entries, as shape is {tuple(shape)}"
        raise argument_error(function, "spec", got=repr(spec), expected=expected)
    cuts = [resolve(function, () if axes is None else names_of(axes)) for axes in spec]
    if all(cut.size == 1 for cut in cuts):
        return torch.arange(math.prod(shape), device=device).view(tuple(shape))
    place = torch.zeros((), dtype=torch.int64, device=device)
    for n, cut in zip(shape, [*cuts, *[Group("", 1, 0)] * (len(shape) - len(cuts))]):
        first = cut.position * n
        place = place[..., None] * (n * cut.size) + torch.arange(first, first + n, device=device)
    return place


def check_key(function: str, key: torch.Tensor, beside: torch.Tensor | None = None) -> None:
    """Raise ``ValueError`` unless it is a key, or several, on the device of the tensor ``beside`` it."""
    if not isinstance(key, torch.Tensor) or key.dtype != torch.int64 or key.dim() < 1 or key.shape[-1] != 2:
        tensor = isinstance(key, torch.Tensor)
        got = f"{key.dtype} of shape {tuple(key.shape)}" if tensor else repr(key)
        remedy = "Make one with fmoe.random.key(seed)."
        raise argument_error(function, "key", got=got, expected="torch.int64 of shape (2,)", remedy=remedy)
    if beside is not None and key.device != beside.device:
        got, expected = f"one on {key.device}", f"one on {beside.device}, where the numbers are used"
        raise argument_error(function, "key", got=got, expected=expected, remedy="Move it with .to().")


def check_one_key(function: str, key: torch.Tensor, beside: torch.Tensor) -> None:
    """Raise ``ValueError`` unless it is one key, on the device of ``beside``."""
    check_key(function, key, beside)
    if key.dim() > 1:
        got, remedy = f"shape {tuple(key.shape)}", "Use torch.vmap for several."
        raise argument_error(function, "key", got=got, expected="one key, (2,)", remedy=remedy)
