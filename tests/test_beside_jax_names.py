"""Names, policies and residuals beside JAX's, where jax is installed: the rows of ``docs/coming-from.md``."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch

import fmoe
from fmoe.introspect import saved_residuals

jax = pytest.importorskip("jax")
checkpoint_name = pytest.importorskip("jax.ad_checkpoint").checkpoint_name
policies = jax.checkpoint_policies


def ours(up, down, x):
    hidden = fmoe.checkpoint_name(x @ up, "hidden")
    return fmoe.checkpoint_name(hidden.sin(), "active") @ down


def theirs(up, down, x):
    hidden = checkpoint_name(x @ up, "hidden")
    return checkpoint_name(jax.numpy.sin(hidden), "active") @ down


# JAX's policy, and ours.
PAIRS = {
    "nothing": (policies.nothing_saveable, fmoe.save_nothing),
    "everything": (policies.everything_saveable, fmoe.save_everything),
    "names": (policies.save_only_these_names("hidden"), fmoe.save("hidden")),
    "two names": (policies.save_only_these_names("hidden", "active"), fmoe.save("hidden", "active")),
    "both policies": (
        policies.save_from_both_policies(
            policies.save_only_these_names("hidden"), policies.save_only_these_names("active")
        ),
        fmoe.save("hidden") | fmoe.save("active"),
    ),
    "offloaded": (
        policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["hidden"], names_which_can_be_offloaded=["active"],
            offload_src="device", offload_dst="pinned_host",
        ),
        fmoe.save("hidden") | fmoe.offload("active"),
    ),
}  # fmt: skip


def arguments():
    return [torch.randn(*shape) for shape in ((4, 16), (16, 4), (3, 4))]


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_jax(name):
    policy, mine = PAIRS[name]
    args = arguments()
    loss = lambda fn: lambda *args: (fn(*args) ** 2).sum()  # noqa: E731
    fn = jax.checkpoint(theirs, policy=policy)
    expected = jax.jit(jax.value_and_grad(loss(fn), (0, 1, 2)))(*map(np.asarray, args))
    value, grads = torch.func.grad_and_value(loss(fmoe.remat(ours, mine)), (0, 1, 2))(*args)
    for found, wanted in zip((grads, *value), (expected[0], *expected[1])):
        np.testing.assert_allclose(found.numpy(), np.asarray(wanted), rtol=2e-5, atol=1e-5)


KEPT = ("kept", "offloaded")


@pytest.mark.parametrize("name", ["nothing", "names", "two names", "offloaded"])
def test_the_same_named_values_are_kept(name):
    policy, mine = PAIRS[name]
    args, shown = arguments(), io.StringIO()
    with contextlib.redirect_stdout(shown):
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(theirs, policy=policy), *map(np.asarray, args))
    named = set(re.findall(r"named '(\w+)'", shown.getvalue()))
    kept = {row.name for row in saved_residuals(fmoe.remat(ours, mine), *args) if row.how in KEPT}
    assert kept == {"names": {"hidden"}, "nothing": set()}.get(name, {"hidden", "active"})
    assert named == kept - ({"active"} if name == "offloaded" else set()), shown.getvalue()
