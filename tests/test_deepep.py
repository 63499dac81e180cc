"""The DeepEP backend, on a stand-in for DeepEP: the laws, its errors, what ``auto`` chooses."""

import deep_ep_double
import pytest
import torch
import transport_laws
from transport_laws import LAWS, law_no_leak

GENERATIONS = {"deepep": 1, "deepep elastic": 2}


def obey(law, axes, backend, dtype, peers=8, **more):
    deep_ep_double.install(GENERATIONS[backend], payloads=(torch.bfloat16, torch.float32), peers=peers)
    live = deep_ep_double.Settings.live
    getattr(transport_laws, law)("cpu", axes, backend, dtype, **more)
    assert deep_ep_double.Settings.live == live, "a buffer wasn't freed"


@pytest.mark.parametrize("axes", ["ep=2", "ep=4"])
@pytest.mark.parametrize("backend", GENERATIONS)
@pytest.mark.parametrize("law", [law.__name__ for law in LAWS if law is not law_no_leak])
def test_law(pool, law, axes, backend):
    """In float32, which the double permits, and on two ranks in bfloat16 too."""
    size = int(axes[-1])
    for dtype in [torch.float32, torch.bfloat16][: 3 - size // 2]:
        pool.run(size, obey, law, axes, backend, dtype)


@pytest.mark.parametrize("backend", GENERATIONS)
def test_a_thousand_forwards_leave_nothing_behind(pool, backend):
    pool.run(2, obey, "law_no_leak", "ep=2", backend, torch.bfloat16)


@pytest.mark.parametrize("law", ["law_oracle", "law_second_derivatives", "law_adjoint", "law_plans"])
def test_law_across_nodes(pool, law):
    """Of two devices each, by Buffer's kernels for that."""
    pool.run(4, obey, law, "ep=4", "deepep", torch.float32, 2)


@pytest.mark.parametrize("law", ["law_oracle", "law_adjoint", "law_remat"])
def test_law_beside_data_parallelism(pool, law):
    pool.run(4, obey, law, "dp=2,ep=2", "deepep", torch.float32)


@pytest.mark.parametrize("law", [law.__name__ for law in LAWS if law is not law_no_leak])
def test_law_on_one_device(pool, law):
    """Where nothing moves, and DeepEP isn't asked."""
    pool.run(1, obey, law, "ep=1", "deepep", torch.float32)


@pytest.mark.parametrize("law", ["law_oracle", "law_adjoint", "law_plans", "law_remat"])
def test_law_of_the_other_backend(pool, law):
    """The laws aren't about DeepEP, and what combine begins is there at once."""
    pool.run(2, getattr(transport_laws, law), "cpu", "ep=2", "all_to_all", torch.float32)
