"""Offloading: what goes to the host's memory, when it comes back, and that it changes no bit."""

import re

import optree
import pytest
import torch
from helpers import (
    CONFIGS,
    ORACLE_TRANSFORMS,
    TRANSFORMS,
    Example,
    error,
    lossless,
    quick,
    random_layer,
    squared,
)
from torch.func import grad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fmoe
from fmoe.errors import TransformError
from fmoe.introspect import kept_bytes, saved_bytes, saved_residuals
from fmoe.ops.core.host import _stream, on_host

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROUTER = CONFIGS["sigmoid, groups"]
POLICY = fmoe.save("topk") | fmoe.offload("hidden", "dispatch", "experts_grouped_mm")
COMPRESSED = fmoe.compress("hidden", "dispatch", "experts_grouped_mm")


def layer(params, x):
    x = fmoe.checkpoint_name(x.sin(), "hidden")
    return x + fmoe.moe_forward(params, x, router=ROUTER)


SOME_TRANSFORMS = quick(
    {"grad", "grad(grad)", "vmap(grad) both", "jvp(grad)", "autograd twice, saving on the CPU"},
    [name for name in TRANSFORMS if name != "compile"],
)


class Elsewhere:
    """Stands for the host's memory on a CPU: what is there is negative, and must be brought back."""

    def __init__(self, log=None):
        self.log = [] if log is None else log
        self.left = []

    def take(self, tensor):
        self.log.append("take")
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self.left.append(StorageWeakRef(tensor.untyped_storage()))
        return -tensor

    def give(self, tensor):
        self.log.append("give")
        return -tensor


@pytest.mark.parametrize("transform", SOME_TRANSFORMS)
def test_what_is_elsewhere_comes_back_under_every_transform(transform):
    example, host = Example(random_layer(), torch.randn(7, 6, dtype=torch.float64)), Elsewhere()
    expected = ORACLE_TRANSFORMS[transform](squared(layer), example)
    for fn in (fmoe.remat(layer, POLICY), fmoe.remat(fmoe.remat(layer, POLICY), fmoe.offload("hidden"))):
        with on_host(host):
            found = TRANSFORMS[transform](squared(fn), example)
        assert error(found, expected) < 1e-10
    assert "take" in host.log


@pytest.mark.parametrize("transform", SOME_TRANSFORMS)
def test_what_is_compressed_comes_back_under_every_transform(transform):
    example, host = Example(random_layer(), torch.randn(7, 6, dtype=torch.float64)), Elsewhere()
    expected = ORACLE_TRANSFORMS[transform](squared(layer), example)
    for fn in (
        fmoe.remat(layer, COMPRESSED),
        fmoe.remat(fmoe.remat(layer, COMPRESSED), fmoe.compress("dispatch")),
        fmoe.remat(fmoe.remat(layer, COMPRESSED), POLICY),
        fmoe.remat(fmoe.remat(layer, POLICY), COMPRESSED),
    ):
        with on_host(host), lossless():
            found = TRANSFORMS[transform](squared(fn), example)
        assert error(found, expected) < 1e-10
    assert "take" in host.log


@pytest.mark.parametrize("differentiate", [fmoe.value_and_grad, torch.func.grad_and_value])
def test_values_come_back_while_the_layer_after_theirs_runs_backward(differentiate):
    log = []

    def numbered(i):
        def fn(w, x):
            log.append(f"run {i}")
            return fmoe.checkpoint_name(x @ w, "up").sin()

        return fmoe.remat(fn, fmoe.offload("up"))

    def loss(weights, x):
        for i, w in enumerate(weights):
            x = 0.5 * numbered(i)(w, x) + 1
        return x.sum()

    weights, x = torch.randn(3, 4, 4).unbind(), torch.randn(2, 4)
    with on_host(Elsewhere(log)):
        differentiate(loss)(weights, x)
    there = [f"{what} {i}" if what == "run" else what for i in range(3) for what in ("run", "take")]
    assert log == [*there, "give", "give", "run 2", "give", "run 1", "run 0"]


def test_a_value_that_left_is_freed():
    """Its storage goes with the region's forward."""
    w, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4)
    fn = fmoe.remat(lambda w, x: fmoe.checkpoint_name(x @ w, "up").sin().cos(), fmoe.offload("up"))
    with on_host(host := Elsewhere()):
        y = fn(w, x)
        assert len(host.left) == 1 and host.left[0].expired()
        assert torch.autograd.grad(y.sum(), w)[0].isfinite().all()


class MadeZeros(TorchDispatchMode):
    """The shapes of zeros that are made inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zeros" in str(func):
            self.shapes.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("differentiate", [fmoe.value_and_grad, torch.func.grad_and_value])
@pytest.mark.parametrize("policy", [fmoe.save, fmoe.offload, fmoe.compress])
def test_a_backward_makes_no_zeros_as_large_as_what_was_kept(policy, differentiate):
    """Those of what was offloaded would be in the host's memory: the device waits while it is filled."""

    def fn(w, x):
        return fmoe.checkpoint_name(x @ w, "up").sin().sum(), x.sum()

    w, x = torch.randn(4, 5), torch.randn(3, 4)
    expected = (x.mT @ (x @ w).cos(), (x @ w).cos() @ w.mT)
    with on_host(Elsewhere()), lossless(), MadeZeros() as zeros:
        found = differentiate(lambda w, x: fmoe.remat(fn, policy("up"))(w, x)[0], (0, 1))(w, x)
    grads = found[1] if differentiate is fmoe.value_and_grad else found[0]
    assert error(grads, expected) < 1e-5
    assert (3, 5) not in zeros.shapes


class NoCotangent(torch.autograd.Function):
    """A copy whose backward gives ``None``."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("policy", [fmoe.save, fmoe.offload, fmoe.compress])
@pytest.mark.parametrize("used", [(0,), (2,), (0, 2), ()])
def test_outputs_without_a_cotangent_count_as_zero(policy, used):
    """Unused outputs, one used by a function whose backward gives ``None``, and an integer one; twice."""

    def fn(w, x):
        h = fmoe.checkpoint_name(x @ w, "up")
        return h.sin(), h.argmax(-1), h.exp().sum(0)

    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 5), (3, 4))]

    def slopes(fn):
        out, how = fn(*leaves), dict(create_graph=True, materialize_grads=True)
        loss = sum(out[i].pow(2).sum() for i in used) + NoCotangent.apply(out[0]).sum()
        first = torch.autograd.grad(loss, leaves, **how)
        if not used:
            return first
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, **how)

    with on_host(Elsewhere()), lossless():
        assert error(slopes(fmoe.remat(fn, policy("up"))), slopes(fn)) < 1e-10


def test_a_second_backward_brings_them_back_again():
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    with on_host(host := Elsewhere()):
        y = fmoe.remat(layer, POLICY)(params, x).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert host.log.count("give") == 2 * host.log.count("take")


def test_on_a_cpu_it_is_the_identity():
    params, x = random_layer(), torch.randn(7, 6, dtype=torch.float64)
    params = optree.tree_map(lambda t: t.requires_grad_(), params)
    saved = fmoe.save("topk", "hidden", "dispatch", "experts_grouped_mm")
    kept, given = [], []
    for policy in (saved, POLICY):
        assert kept_bytes(fmoe.remat(layer, policy), params, x) == sum(
            saved_bytes(layer, params, x, policy=policy).values()
        )
        kept.append(kept_bytes(fmoe.remat(layer, policy), params, x))
        given.append(fmoe.value_and_grad(lambda p, x, f=policy: fmoe.remat(layer, f)(p, x).sum(), (0, 1)))
    assert kept[0] == kept[1]
    assert all(map(torch.equal, *(optree.tree_leaves(f(params, x)) for f in given)))
    residuals = saved_residuals(fmoe.remat(layer, POLICY), params, x)
    assert {row.name for row in residuals if row.how == "offloaded"} == {
        "hidden",
        "dispatch",
        "experts_grouped_mm",
    }


def test_policies_are_joined_and_the_first_that_keeps_decides():
    both, other = fmoe.save("a") | fmoe.offload("a", "b"), fmoe.offload("a", "b") | fmoe.save("a")
    assert [both("a"), both("b"), both("c")] == [True, "offload", False]
    assert other("a") == "offload"
    third = fmoe.save("a") | fmoe.compress("a", "b") | fmoe.offload("b", "c")
    answers = [third(name) for name in ("a", "b", "c", "topk", "d")]
    assert answers == [True, "compress", "offload", True, False]
    assert (fmoe.transforms.save_declared | fmoe.offload("attention"))("topk")
    assert (fmoe.offload("attention") | fmoe.save_everything)("gather") is True


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fmoe.offload("top_k"), "offload: names: got 'top_k', expected names of ['all_gather',"),
        (lambda: fmoe.compress("top_k"), "compress: names: got 'top_k', expected names of ['all_gather',"),
        (
            lambda: fmoe.remat(layer, fmoe.offload),
            "remat: policy: got offload itself, expected a function",
        ),
        (
            lambda: fmoe.remat(layer, fmoe.save("topk") | fmoe.compress),
            "remat: policy: got compress itself, expected a function",
        ),
        (
            lambda: fmoe.transforms.per_layer("offload"),
            "per_layer: remat_policy: got 'offload', expected none, full, default, save:",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


# ---- on a GPU ------------------------------------------------------------------------------------------


WIDTH, ROWS, DEPTH = 1024, 4096, 4


def block(w, x):
    up = fmoe.checkpoint_name(x @ w["up"], "up")
    return x + torch.nn.functional.silu(up) @ w["down"]


def deep(wrap):
    def loss(weights, x):
        for w in weights:
            x = wrap(block)(w, x)
        return x.float().pow(2).mean()

    return loss


def blocks():
    def draw(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5

    weights = [{"up": draw(WIDTH, 4 * WIDTH), "down": draw(4 * WIDTH, WIDTH)} for _ in range(DEPTH)]
    return weights, draw(ROWS, WIDTH)


OFFLOADED = ROWS * 4 * WIDTH * 2  # bytes a block


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("differentiate", [fmoe.value_and_grad, torch.func.grad_and_value])
def test_offloading_changes_no_bit_on_a_gpu(differentiate):
    args = blocks()
    expected = differentiate(deep(lambda fn: fn), (0, 1))(*args)
    for policy in (fmoe.offload("up"), fmoe.save("topk") | fmoe.offload("up")):
        for _ in range(3):  # memory is used again, on both streams
            found = differentiate(deep(lambda fn, p=policy: fmoe.remat(fn, p)), (0, 1))(*args)
            assert all(map(torch.equal, *map(optree.tree_leaves, (found, expected))))
    moe = random_layer(dim=64, hidden=32, dtype=torch.bfloat16)
    params, x = optree.tree_map(torch.Tensor.cuda, (moe, torch.randn(512, 64, dtype=torch.bfloat16)))
    step = lambda fn: differentiate(lambda p, x: fn(p, x).float().sum(), (0, 1))(params, x)  # noqa: E731
    assert all(map(torch.equal, *map(optree.tree_leaves, (step(fmoe.remat(layer, POLICY)), step(layer)))))


def held_and_peak(policy):
    """Bytes on the device between forward and backward, and at the peak of both."""
    weights, x = blocks()
    x.requires_grad_()
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = deep(lambda fn: fmoe.remat(fn, policy))(weights, x)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        torch.autograd.grad(loss, x)
        peak = torch.cuda.max_memory_allocated() - before
        del loss
    return held, peak


@pytest.mark.gpu
@ON_CUDA
def test_the_gpus_memory_falls_by_what_is_offloaded():
    kept, most = held_and_peak(fmoe.save("up"))
    offloaded, most_offloaded = held_and_peak(fmoe.offload("up"))
    assert kept - offloaded == DEPTH * OFFLOADED
    # While a block runs backward, its own values are there, and those of the block before it may have come.
    assert 0.95 * (DEPTH - 2) <= (most - most_offloaded) / OFFLOADED <= 1.05 * (DEPTH - 1)


def reached(stream):
    """The event that a stream has come this far."""
    return stream.record_event(torch.cuda.Event(enable_timing=True))


def held(stream):
    """Keep a stream busy for about a second, some thousand times as long as a block takes."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2 * 10**9)  # cycles
    return reached(stream)


@pytest.mark.gpu
@ON_CUDA
def test_copies_run_on_a_stream_of_their_own_between_pinned_memory_and_the_gpu():
    """While it is held, a whole forward is computed, and the backward of a block whose own values came."""
    weights, x = blocks()
    x.requires_grad_()
    computing, copying = torch.cuda.current_stream(), _stream(x.device)
    fn = fmoe.remat(block, fmoe.offload("up"))

    def step():
        """By how many milliseconds computing was done before copies went on, forward and backward."""
        go_on, done, outputs = [held(copying)], [], [x]
        for w in weights:
            outputs.append(fn(w, outputs[-1]))
        done.append(reached(computing))
        # Before the last block but one, whose own copies began before this, and after it.
        outputs[-2].register_hook(lambda _: go_on.append(held(copying)))
        outputs[-3].register_hook(lambda _: done.append(reached(computing)))
        torch.autograd.grad(outputs[-1].sum(), x)
        torch.cuda.synchronize()
        return [early.elapsed_time(late) for early, late in zip(done, go_on, strict=True)]

    step()  # which allocates
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as run:
        ahead = step()
    assert len(ahead) == 2 and min(ahead) > 0
    on_cuda = torch.autograd.DeviceType.CUDA
    events = [e for e in run.profiler.kineto_results.events() if e.device_type() == on_cuda]
    there, back, holds = (
        [e for e in events if words in e.name()]
        for words in ("DtoH (Device -> Pinned)", "HtoD (Pinned ->", "spin_kernel")
    )
    kernels = [e for e in events if not (e.name().startswith("Mem") or "spin_kernel" in e.name())]
    assert len(there) == len(back) == DEPTH and len(holds) == 2 and kernels
    streams = [{e.device_resource_id() for e in some} for some in (there, back, holds, kernels)]
    assert streams[0] == streams[1] == streams[2] and not streams[0] & streams[3]


@pytest.mark.gpu
@ON_CUDA
def test_what_cannot_be_offloaded_on_a_gpu_raises():
    (w, *_), x = blocks()
    fn = fmoe.remat(block, fmoe.offload("up"))
    with pytest.raises(Exception, match="got one that offloads, on CUDA, expected none under"):
        fmoe.value_and_grad(lambda w, x: torch.compile(fn, backend="aot_eager")(w, x).float().sum())(w, x)
    graph = fmoe.graphed(lambda w, x: grad(lambda w: fn(w, x).float().sum())(w))
    with pytest.raises((TransformError, RuntimeError), match="a stream that a CUDA graph captures"):
        graph(w, x)
