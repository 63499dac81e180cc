"""``check_replicated``: which programs it finds, what it costs, and what it lets pass."""

import functools
import re

import pytest
import torch
from devices import bare_mesh
from helpers import error
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fmoe
from fmoe import P, random
from fmoe.ops.core.primitive import NAMESPACE
from fmoe.parallel import axis_index, axis_size, distribute, psum
from fmoe.parallel.replicated import fingerprint

CHECKED = functools.partial(fmoe.shard_map, check_replicated=True)

# ---- five bugs that others had -------------------------------------------------------------------------
#
# Each is a program for dp=2, tp=2 that runs, whose numbers look fine, and whose copies drift apart. It comes
# as it was, and as it should be.


def head_norms(mesh, fixed):
    """A norm's weight is whole on every device, but its gradient is of this device's heads only.

    NVIDIA-NeMo/RL issue 3716; Megatron-LM issue 1446.
    """

    @CHECKED(mesh=mesh, in_specs=(P(), P("dp", "tp")), out_specs=P())
    def step(weight, q):  # weight [D], q [N/dp, heads/tp, D]
        gradient = grad(lambda w: (torch.nn.functional.rms_norm(q, q.shape[-1:]) * w).sin().sum())(weight)
        return weight - 0.1 * psum(gradient, ("dp", "tp") if fixed else "dp")

    place = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
    return step(torch.ones(4), whole((4, 4, 4)).chunk(2)[place[0]].chunk(2, 1)[place[1]])


def clipping(mesh, fixed):
    """Each device clips by the norm of its own experts' gradients. NVIDIA-NeMo/Automodel issue 3816."""

    @CHECKED(mesh=mesh, in_specs=(P(), P(), P("tp")), out_specs=(P(), P("tp")))
    def clipped(dense, _, experts):
        squares = experts.square().sum()
        norm = (dense.square().sum() + (psum(squares, "tp") if fixed else squares)).sqrt()
        return dense / norm, experts / norm

    return clipped(whole((3,)), whole((2,)), whole((4, 2)).chunk(2)[mesh.get_local_rank("tp")])


def router_bias(mesh, fixed):
    """Tokens that each expert got are summed over some of the devices only. pytorch/torchtitan pull 4154."""

    @CHECKED(mesh=mesh, in_specs=(P(), P(("dp", "tp"))), out_specs=P())
    def update(bias, ids):
        counts = torch.bincount(ids, minlength=len(bias))
        counts = psum(counts, ("dp", "tp") if fixed else "dp").float()
        return bias + 0.001 * (counts.mean() - counts).sign()

    ids = torch.tensor([[0, 0, 1], [1, 1, 2], [2, 2, 2], [3, 3, 0]])[mesh.get_rank()]
    return update(torch.zeros(4), ids)


def batch_by_rank(mesh, fixed):
    """Devices along tp compute one result together, from batches that each chose by its own rank.

    huggingface/accelerate issue 3092.
    """

    @CHECKED(mesh=mesh, in_specs=(P("tp"), P("dp")), out_specs=P("dp"))
    def forward(w, x):
        return psum(x[:, : len(w)] @ w, "tp")

    number = mesh.get_local_rank("dp") if fixed else mesh.get_rank()
    return forward(torch.ones(2, 3), whole((8, 4)).chunk(4)[number])


def dropout_seeds(mesh, fixed):
    """Activations that are the same along tp drop different elements there. InternLM pull 405."""

    @CHECKED(mesh=mesh, in_specs=P("dp"), out_specs=P("dp"))
    def drop(x):
        key = random.key(3) if fixed else random.fold_in(random.key(3), axis_index("tp"))
        return fmoe.dropout(x, random.fold_in(key, axis_index("dp")), 0.5)

    return drop(torch.ones(2, 50))


BUGS = {
    head_norms: "fn(...): P() for shape (4,): devices have other values along ('tp',)",
    clipping: "fn(...).0: P() for shape (3,): devices have other values along ('tp',)",
    router_bias: "fn(...): P() for shape (4,): devices have other values along ('tp',)",
    batch_by_rank: "args.1: P('dp') for shape (2, 4): devices have other values along ('tp',)",
    dropout_seeds: "fn(...): P('dp') for shape (2, 50): devices have other values along ('tp',)",
}


def whole(shape):
    return random.normal(random.key(5), shape)


def found(axes, bug):
    mesh = bare_mesh(axes)
    bug(mesh, fixed=True)
    with pytest.raises(ValueError, match="shard_map") as caught:
        bug(mesh, fixed=False)
    return str(caught.value)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_bugs_that_others_had_are_found_on_every_device(pool, bug):
    for text in pool.run(4, found, "dp=2,tp=2", bug):
        assert "got 1 that don't fit, expected specs that fit the mesh (dp=2, tp=2)" in text
        assert text.endswith(BUGS[bug])


def a_wrong_sum():
    """What every device gets wrong alike has no differing copies: pytorch/torchtitan pull 4245."""
    mesh = bare_mesh("tp=2")

    @CHECKED(mesh=mesh, in_specs=(P("tp"), P()), out_specs=P())
    def output(w, bias):
        return psum(w.sum(0) + bias, "tp")  # the bias comes twice

    return output(torch.ones(2, 3), torch.ones(3)).tolist()


def test_what_all_devices_get_wrong_alike_is_not_found(pool):
    assert pool.run(2, a_wrong_sum) == [[6.0] * 3] * 2


# ---- costs and limits ----------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """The bytes that a device gives to each collective."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            self.bytes.append(args[0].numel() * args[0].element_size())
        return func(*args, **kwargs or {})


def costs():
    mesh = bare_mesh("dp=2,tp=2")
    params = {f"w{i}": torch.ones(100, 100) for i in range(5)}

    def body(params, x):
        return {name: w * 2 for name, w in params.items()}, psum(x.sum(), ("dp", "tp"))

    def run(**how):
        return fmoe.shard_map(body, mesh, in_specs=(P(), P(("dp", "tp"))), out_specs=P(), **how)

    plain, checked = run(), run(check_replicated=True)
    x = torch.ones(3)
    sent = []
    for f in (plain, checked):
        with Sent() as counted:
            f(params, x)
        sent.append(sorted(counted.bytes))
    assert error(checked(params, x)[0]["w3"], plain(params, x)[0]["w3"]) == 0
    slope = grad(lambda x: checked(params, x)[1])(x)
    assert torch.equal(slope, torch.ones(3))
    batch = vmap(checked, (None, 0))(params, torch.ones(2, 3))[1]
    assert batch.tolist() == [12.0, 12.0]
    return sent


def test_it_costs_two_small_collectives(pool):
    """One of the arguments and one of the results, of 16 bytes for each of six tensors."""
    for sent in pool.run(4, costs):
        assert sent == [[4], [4, 16 * 6, 16 * 6]]


def near_and_far():
    """Rounding passes; other shapes, NaN here and not there, and one element among many don't.

    Nor does it beside infinities, or where float16 can't hold the sum of all.
    """
    mesh, rank = bare_mesh("dp=2"), torch.distributed.get_rank()
    check = CHECKED(lambda x: x.clone(), mesh, in_specs=P(), out_specs=P())
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    texts = []
    assert error(check(x * (1 + 1e-7 * rank)), x) < 1e-6
    check(torch.where(torch.arange(1000) == 3, torch.nan, x))
    zeros = torch.zeros(3) * (-1.0 if rank else 1.0)
    assert check(zeros).tolist() == [0.0] * 3
    for other in (
        torch.where(torch.arange(1000) == 999, x + rank, x),
        torch.where((torch.arange(1000) == 3) & (rank == 1), torch.nan, x),
        x[: 1000 - rank],
        torch.arange(5) ** (1 + (torch.arange(5) == 4) * rank),
        x > rank * 100,
        torch.where(torch.arange(1000) == 3, -torch.inf, x + rank),
        (1000 * x + 200 * rank).half(),
    ):
        with pytest.raises(ValueError, match=r"got 1 that don't fit") as caught:
            check(other)
        texts.append(str(caught.value))
    return texts


def test_rounding_passes_and_other_differences_do_not(pool):
    for texts in pool.run(2, near_and_far):
        for text in texts:
            said = "other shapes" if "(999,)" in text or text is texts[2] else "other values"
            assert "args.0: P() for shape" in text and f"devices have {said} along ('dp',)" in text


def test_fingerprints_see_every_bit_place_and_shape(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool):
        x = torch.randint(0, 2, (3, 7)).to(dtype)
        mine = fingerprint(x)
        assert torch.equal(mine, fingerprint(x.mT.contiguous().mT))
        for place in range(21):
            other = x.clone().flatten()
            other[place] = 1 - other[place].int()
            assert fingerprint(other.view(3, 7))[0] != mine[0], (dtype, place)
        assert fingerprint(x.flatten())[1] != mine[1]
    z = torch.randn(3, 4, dtype=torch.complex64)
    assert torch.equal(fingerprint(z.conj()), fingerprint(z.conj().clone()))
    assert torch.equal(fingerprint(z.conj().imag), fingerprint(-z.imag))
    x = torch.eye(16)  # full of equal words
    seen = {int(fingerprint(x[torch.randperm(16)])[0]) for _ in range(200)}
    assert len(seen) > 190
    assert fingerprint(torch.ones(0))[0] == 0


# ---- decorators and axes of one's own ------------------------------------------------------------------


def own_axes():
    sizes = {"rows": 2, "stack": 1, "columns": 2}
    mesh = fmoe.make_mesh("rows=2,columns=2", names=[*sizes], device_type="cpu")
    assert dict(zip(mesh.mesh_dim_names, mesh.shape)) == sizes
    a, b = whole((4, 6)), whole((6, 8))
    where = mesh.get_local_rank("rows"), mesh.get_local_rank("columns")

    @functools.partial(
        fmoe.shard_map, mesh=mesh, in_specs=(P("rows", "columns"), P("columns")), out_specs=P("rows")
    )
    def by_partial(a, b):
        """A product of blocks."""
        return psum(a @ b, ("stack", "columns"))

    @fmoe.shard_map(mesh=mesh, in_specs=(P(("rows", "columns")), P()), out_specs=P(("rows", "columns")))
    def by_call(a, b):
        return a @ b * axis_size(("rows", "stack", "columns"))

    assert by_partial.__name__ == "by_partial" and by_partial.__doc__ == "A product of blocks."
    mine = a.chunk(2)[where[0]]
    product = by_partial(mine.chunk(2, 1)[where[1]], b.chunk(2)[where[1]])
    assert error(product, mine @ b) < 1e-5
    spread = distribute(a, P("rows", "columns"), mesh), distribute(b, P("columns"), mesh)
    assert error(by_partial(*spread).full_tensor(), a @ b) < 1e-5
    slope = grad(lambda a: by_partial(a, spread[1]).sum())
    assert error(slope(spread[0]).full_tensor(), torch.ones(4, 8) @ b.T) < 1e-5
    rows = distribute(a, P(("rows", "columns")), mesh)
    assert error(by_call(rows, distribute(b, P(), mesh)).full_tensor(), 4 * a @ b) < 1e-5


def test_axes_have_any_names_and_number(pool):
    pool.run(4, own_axes)


def test_errors():
    mesh = fmoe.make_mesh(device_type="cpu")
    specs = dict(in_specs=P(), out_specs=P())
    for call, text in [
        (lambda: fmoe.shard_map(torch.sin, **specs), "shard_map: mesh: got None, expected a mesh."),
        (
            lambda: fmoe.shard_map(mesh, **specs),
            "expected a function, or none beside mesh=, for a decorator.",
        ),
        (lambda: fmoe.shard_map(**specs)(torch.sin), "shard_map: mesh: got None, expected a mesh."),
        (
            lambda: fmoe.make_mesh("x=1", names=("x", "x")),
            "make_mesh: names: got ('x', 'x'), expected",
        ),
        (lambda: fmoe.make_mesh("y=1", names=("x",)), "make_mesh: axes: got y=1, expected each of ('x',) at"),
        (
            lambda: fmoe.make_mesh("x=2", names=("x",)),
            "make_mesh: axes: got x=2, expected a product of 1,",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
