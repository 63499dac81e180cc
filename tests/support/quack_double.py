"""What ``fmoe.ops.kernels.gathered`` calls of quack-kernels, by plain products; rows of no group are NaN."""

import sys
import types
from itertools import pairwise

import torch

calls: list[str] = []
configs: list[dict] = []


def _in_turn(t):
    """Gates and ups in turn, along the dimension that isn't contiguous."""
    dim = -2 if t.stride(-1) == 1 else -1
    return t.unflatten(dim, (2, -1)).transpose(dim - 1, dim).flatten(dim - 1, dim)


def _noted(call, *shape):
    calls.append(call)
    names = "tile_m", "tile_n", "cluster_m", "cluster_n", "pingpong"
    configs.append(dict(zip(names, shape, strict=True)))


def _gemm(a, b, out, c, semaphore, *shape, cu_seqlens_m, cu_seqlens_k, A_idx, concat_layout):
    assert c is semaphore is None
    _noted("gemm" if cu_seqlens_k is None else "gemm summed", *shape)
    b = b.mT
    b = _in_turn(b) if concat_layout == ("B",) else b
    starts = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
    assert starts.dtype == torch.int32 and (A_idx is None or A_idx.dtype == torch.int32)
    made = torch.full_like(out, torch.nan)
    for group, (begin, end) in enumerate(pairwise(starts.tolist())):
        if cu_seqlens_k is None:
            rows = a[begin:end] if A_idx is None else a[A_idx[begin:end]]
            made[begin:end] = rows @ b[group]
        else:
            columns = a[:, begin:end] if A_idx is None else a[:, A_idx[begin:end]]
            made[group] = columns @ b[begin:end]
    if concat_layout == ("out",):
        made = made.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    out.copy_(made)


def _gated(a, b, pre, c, act, semaphore, activation, *shape, cu_seqlens_m, A_idx, concat_layout):
    assert activation == "swiglu"
    where = dict(cu_seqlens_m=cu_seqlens_m, cu_seqlens_k=None, A_idx=A_idx)
    _gemm(a, b, pre, c, semaphore, *shape, **where, concat_layout=concat_layout)
    calls[-1] = "gated"
    act.copy_(torch.nn.functional.silu(pre[:, 0::2]) * pre[:, 1::2])


def _dgated(
    a, b, g_pre, pre, act, semaphore, activation, *shape, colvec_scale, colvec_reduce, cu_seqlens_m, A_idx
):
    assert semaphore is None and activation == "swiglu"
    _noted("dgated", *shape)
    b, wide = b.mT, shape[1]
    for t in (g_pre, act, colvec_reduce):
        t.fill_(torch.nan)
    for group, (begin, end) in enumerate(pairwise(cu_seqlens_m.tolist())):
        here = slice(begin, end)
        g, gate, up = a[A_idx[here]] @ b[group], pre[here, 0::2], pre[here, 1::2]
        sigmoid = gate.sigmoid()
        silu, weight = gate * sigmoid, colvec_scale[here, None]
        sums = [tile.sum(1) for tile in (g * silu * up).split(wide, 1)]
        colvec_reduce[here] = torch.stack(sums, 1).to(colvec_reduce.dtype)
        g_pre[here, 0::2] = weight * g * up * (sigmoid + silu * (1 - sigmoid))
        g_pre[here, 1::2] = weight * g * silu
        act[here] = weight * silu * up


def install(monkeypatch):
    """Make it the module ``quack`` of this process, and let it take any tensor."""
    from fmoe.ops.kernels import gathered

    modules = {
        "quack.gemm": types.SimpleNamespace(gemm=_gemm),
        "quack.gemm_act": types.SimpleNamespace(gemm_gated=_gated),
        "quack.gemm_dact": types.SimpleNamespace(gemm_dgated=_dgated),
    }
    for name, module in ({"quack": types.SimpleNamespace()} | modules).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gathered, "serve", lambda t: True)
    monkeypatch.setattr(gathered, "LINE", 2)
    gathered._quack.cache_clear()
    calls.clear()
    configs.clear()
