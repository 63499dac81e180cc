"""What dispatch and combine send, counted where it is sent, is what the routing implies."""

import pytest
import torch

import fmoe
from fmoe.introspect import wire_bytes
from fmoe.parallel.backends.all_to_all import rows_sent

EXPERTS, TOP_K = 16, 5


def some_routing(tokens: int, used: int = EXPERTS) -> fmoe.Routing:
    """Random experts, unevenly spread, about a quarter of the pairs and all beyond ``used`` dropped."""
    skew = torch.linspace(1, 0, EXPERTS)
    ids = (torch.rand(tokens, EXPERTS) + skew).argsort(1, descending=True)[:, :TOP_K]
    ids = torch.where((torch.rand(ids.shape) < 0.25) | (ids >= used), -1, ids)
    counts = torch.bincount(ids[ids >= 0], minlength=EXPERTS)
    weights = torch.rand(ids.shape, requires_grad=True)
    return fmoe.Routing(ids, weights, counts, torch.rand(tokens, EXPERTS))


def one_layer(most_tokens, dim, dtype, used):
    """A forward and backward with experts that only weigh; every token's row is its rank and place."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(torch.initial_seed() + rank)
    tokens = int(torch.randint(most_tokens, ()))
    routing = some_routing(tokens, used)
    x = (torch.arange(tokens)[:, None] + most_tokens * rank).expand(tokens, dim).to(dtype).requires_grad_()
    axis = fmoe.make_mesh(ep=size)["ep"]
    with wire_bytes() as everything:
        with wire_bytes() as dispatched:
            x_SD, plan = fmoe.dispatch(x, routing, axis=axis)
        with wire_bytes() as combined:
            y = fmoe.combine((x_SD * plan.weights_SK.sum(1, keepdim=True)).to(dtype), plan)
        with wire_bytes() as backward:
            y.backward(torch.randn(y.shape).to(dtype))
    with wire_bytes() as outside:
        pass
    assert not outside
    counts = [{k: tuple(v) for k, v in c.items()} for c in (dispatched, combined, backward, everything)]
    return routing.expert_ids_TK.tolist(), rows_sent(plan).tolist(), x_SD[:, 0].tolist(), counts


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("all_to_the_first", [False, True])
def test_measured_bytes_are_what_the_routing_implies(pool, size, dtype, all_to_the_first):
    most, dim, held = 12, int(torch.randint(1, 40, ())), EXPERTS // size
    found = pool.run(size, one_layer, most, dim, dtype, held if all_to_the_first else EXPERTS)

    # The tokens of each device that have an expert on another, written down one by one.
    going = [
        [{t for t, ids in enumerate(routes) for i in ids if i >= 0 and i // held == to} for to in range(size)]
        for routes, *_ in found
    ]
    row = dim * dtype.itemsize
    with_weights, with_ids = row + 4 * TOP_K, row + 4 * TOP_K + 8 * TOP_K
    for me, (_, sent_rows, came, (dispatched, combined, backward, everything)) in enumerate(found):
        assert sent_rows == [len(tokens) for tokens in going[me]]
        # A token once: no row comes twice, in the order of devices and tokens.
        assert came == [most * device + t for device in range(size) for t in sorted(going[device][me])]

        out = sum(len(going[me][to]) for to in range(size) if to != me)
        back = sum(len(going[device][me]) for device in range(size) if device != me)
        own = len(going[me][me])
        there = lambda width, out=out, back=back, own=own: (out * width, back * width, own * width)  # noqa: E731
        here = lambda width, out=out, back=back, own=own: (back * width, out * width, own * width)  # noqa: E731
        peers = 24 * (size - 1)
        assert dispatched == {"sizes": (peers, peers, 24), "exchange": there(with_ids)}
        assert combined == {"send_back": here(row)}
        assert backward == {"send": there(row), "send_both_back": here(with_weights)}
        assert everything == dispatched | combined | backward


def two_layers(most_tokens):
    """Twice the same layer counts twice; an inner count that is closed leaves an equal outer one open."""
    size = torch.distributed.get_world_size()
    axis = fmoe.make_mesh(ep=size)["ep"]
    routing, x = some_routing(most_tokens), torch.randn(most_tokens, 8)
    with wire_bytes() as once:
        fmoe.dispatch(x, routing, axis=axis)
    with wire_bytes() as twice:
        with wire_bytes():
            pass
        for _ in range(2):
            fmoe.dispatch(x, routing, axis=axis)
    return once, twice


def test_counts_add_up_and_nest(pool):
    for once, twice in pool.run(2, two_layers, 9):
        assert set(once) == set(twice) == {"sizes", "exchange"}
        assert {k: tuple(2 * b for b in v) for k, v in once.items()} == {
            k: tuple(v) for k, v in twice.items()
        }
