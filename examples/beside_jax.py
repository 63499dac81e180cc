"""The calls of docs/coming-from.md beside JAX's, on the same numbers and on four devices each.

    pip install jax && python examples/beside_jax.py

Each row runs in both, and shows the largest difference. The program fails if one is more than rounding.
"""

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import fmoe
from fmoe.introspect import saved_residuals
from fmoe.ops.bases import grouped_mm
from fmoe.parallel import all_gather, all_to_all, axis_index, distribute, pmean, ppermute, psum, psum_scatter
from fmoe.parallel.layout import layouts_of

DEVICES = 4
SHAPE, EXACT, ROUNDING = (8, 4), 0.0, 1e-5
X = fmoe.random.normal(fmoe.random.key(0), SHAPE)
W = fmoe.random.normal(fmoe.random.key(1), (4, 4))


class Row(NamedTuple):
    """What JAX calls it, what it is called here, a function of no arguments that runs each, and how near."""

    jax: str
    here: str
    run_jax: Callable[[], Any]
    run_here: Callable[[], Any]
    near: float


def main() -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
        import jax.ad_checkpoint
    except ImportError:
        sys.exit("beside_jax: needs jax: pip install jax")
    table, wrong = Table("JAX", "fmoe, or PyTorch", "largest difference", title=f"jax {jax.__version__}"), []
    with fmoe.parallel.Processes(DEVICES) as devices:
        for row in [*random_rows(jax), *transform_rows(jax), *name_rows(jax), *device_rows(jax, devices)]:
            difference = max(map(distance, jax.tree.leaves(row.run_jax()), jax.tree.leaves(row.run_here())))
            table.add_row(row.jax, row.here, f"{difference:.1e}" if difference else "0")
            wrong += [row.here] if not difference <= row.near else []
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if wrong:
        sys.exit(f"beside_jax: these differ by more than rounding: {', '.join(wrong)}")


def distance(theirs: Any, mine: Any) -> float:
    theirs, mine = (torch.tensor(v.tolist() if hasattr(v, "tolist") else v).double() for v in (theirs, mine))
    if theirs.shape != mine.shape:
        return float("inf")
    return (theirs - mine).abs().max().item() if theirs.numel() else 0.0


def random_rows(jax: Any) -> list[Row]:
    theirs, mine, draw, here = jax.random.PRNGKey(7), fmoe.random.key(7), jax.random, fmoe.random
    logits = jax.numpy.asarray(X.tolist())

    def dropout_jax(rate: float = 0.4) -> Any:
        kept = draw.bernoulli(theirs, 1 - rate, SHAPE)
        return jax.numpy.where(kept, logits / (1 - rate), 0)

    def row(call: str, near: float, *args: Any, **how: Any) -> Row:
        run = getattr(draw, call), getattr(here, call)
        return Row(
            f"jax.random.{call}", f"fmoe.random.{call}",
            lambda: run[0](theirs, *args), lambda: run[1](mine, *args), near,
        )  # fmt: skip

    return [
        Row("jax.random.key", "fmoe.random.key", lambda: draw.key_data(draw.key(7)), lambda: mine, EXACT),
        row("split", EXACT, 5),
        row("fold_in", EXACT, 123),
        row("bits", EXACT, SHAPE),
        row("uniform", EXACT, SHAPE),
        row("bernoulli", EXACT, 0.3, SHAPE),
        row("normal", ROUNDING, SHAPE),
        row("gumbel", ROUNDING, SHAPE),
        Row(
            "jax.random.categorical", "fmoe.random.categorical",
            lambda: draw.categorical(theirs, logits), lambda: here.categorical(mine, X), EXACT,
        ),
        Row("flax's Dropout", "fmoe.dropout", dropout_jax, lambda: fmoe.dropout(X, mine, 0.4), ROUNDING),
    ]  # fmt: skip


def transform_rows(jax: Any) -> list[Row]:
    jnp, func = jax.numpy, torch.func
    x, w = jnp.asarray(X.tolist()), jnp.asarray(W.tolist())

    def theirs(w: Any, x: Any) -> Any:
        return (jnp.tanh(x @ w) ** 2).sum()

    def mine(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ w) ** 2).sum()

    nothing = jax.checkpoint_policies.nothing_saveable
    ends, sizes = torch.tensor([3, 3, 8], dtype=torch.int32), jnp.asarray([3, 0, 5])
    groups = torch.stack([W, 2 * W, 3 * W])

    def aux(fn: Any) -> Any:
        return lambda w, x: (fn(w, x), w.sum())

    return [
        Row(
            "jax.grad", "torch.func.grad",
            lambda: jax.grad(theirs)(w, x), lambda: func.grad(mine)(W, X), ROUNDING,
        ),
        Row(
            "jax.vjp", "torch.func.vjp",
            lambda: jax.vjp(theirs, w, x)[1](2.0), lambda: func.vjp(mine, W, X)[1](torch.tensor(2.0)),
            ROUNDING,
        ),
        Row(
            "jax.jvp", "torch.func.jvp",
            lambda: jax.jvp(theirs, (w, x), (w, x)), lambda: func.jvp(mine, (W, X), (W, X)), ROUNDING,
        ),
        Row(
            "jax.vmap", "torch.func.vmap",
            lambda: jax.vmap(theirs, (None, 0))(w, x), lambda: func.vmap(mine, (None, 0))(W, X), ROUNDING,
        ),
        Row(
            "jax.hessian", "torch.func.hessian",
            lambda: jax.hessian(theirs)(w, x), lambda: func.hessian(mine)(W, X), 10 * ROUNDING,
        ),
        Row(
            "jax.value_and_grad(has_aux=True)", "fmoe.value_and_grad(has_aux=True)",
            lambda: jax.value_and_grad(aux(theirs), has_aux=True)(w, x),
            lambda: fmoe.value_and_grad(aux(mine), has_aux=True)(W, X), ROUNDING,
        ),
        Row(
            "jax.checkpoint(policy=nothing_saveable)", "fmoe.remat(f, fmoe.save_nothing)",
            lambda: jax.grad(jax.checkpoint(theirs, policy=nothing))(w, x),
            lambda: func.grad(fmoe.remat(mine, fmoe.save_nothing))(W, X), ROUNDING,
        ),
        Row(
            "jax.lax.ragged_dot", "fmoe.ops.bases.grouped_mm",
            lambda: jax.lax.ragged_dot(x, jnp.asarray(groups.tolist()), sizes),
            lambda: grouped_mm(X, groups, ends), ROUNDING,
        ),
    ]  # fmt: skip


def name_rows(jax: Any) -> list[Row]:
    jnp, named, policies = jax.numpy, jax.ad_checkpoint.checkpoint_name, jax.checkpoint_policies
    x, w = jnp.asarray(X.tolist()), jnp.asarray(W.tolist())

    def theirs(w: Any, x: Any) -> Any:
        hidden = named(x @ w, "hidden")
        return (named(jnp.sin(hidden), "active") @ w).sum()

    def mine(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        hidden = fmoe.checkpoint_name(x @ w, "hidden")
        return (fmoe.checkpoint_name(hidden.sin(), "active") @ w).sum()

    def row(call: str, here: str, policy: Any, own: Any) -> Row:
        run = jax.jit(jax.grad(jax.checkpoint(theirs, policy=policy)))
        return Row(
            call, here, lambda: run(w, x), lambda: torch.func.grad(fmoe.remat(mine, own))(W, X), ROUNDING
        )

    def kept_jax() -> list[int]:
        """The sizes of what JAX says that it keeps by name."""
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(theirs, policy=one), w, x)
        return [int(a) * int(b) for a, b in re.findall(r"\[(\d+),(\d+)\] named", shown.getvalue())]

    def kept_here() -> list[int]:
        found = saved_residuals(fmoe.remat(mine, fmoe.save("hidden")), W, X)
        return [row.bytes // 4 for row in found if row.how == "kept"]

    one, other = policies.save_only_these_names("hidden"), policies.save_only_these_names("active")
    away = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["hidden"], names_which_can_be_offloaded=["active"],
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip
    save, offload = fmoe.save, fmoe.offload
    return [
        row("checkpoint_name, save_only_these_names", "fmoe.checkpoint_name, fmoe.save", one, save("hidden")),
        row("save_from_both_policies", "p | q", policies.save_from_both_policies(one, other),
            save("hidden") | save("active")),
        row("save_and_offload_only_these_names", "fmoe.save | fmoe.offload", away,
            save("hidden") | offload("active")),
        Row("print_saved_residuals", "fmoe.introspect.saved_residuals", kept_jax, kept_here, EXACT),
    ]  # fmt: skip


# ---- many devices --------------------------------------------------------------------------------------
#
# A program is written once, with the names of its collectives as arguments; JAX's and ours are alike.


def summed(lax: Any, x: Any) -> Any:
    return lax.psum(x * (1 + lax.axis_index("columns")), "columns")


def averaged(lax: Any, x: Any) -> Any:
    return lax.pmean(x**2, ("rows", "columns"))


def gathered(lax: Any, x: Any) -> Any:
    return lax.all_gather(x**2, "rows", 0)


def scattered(lax: Any, x: Any) -> Any:
    return lax.psum_scatter(x**2, "columns", 0)


def exchanged(lax: Any, x: Any) -> Any:
    return lax.all_to_all(x**2, "rows", 0, 1)


def shifted(lax: Any, x: Any) -> Any:
    return lax.ppermute(x**2, "columns", [(0, 1)])


# The program, and where its argument and its result lie.
PROGRAMS = {
    "psum": (summed, ("rows", "columns"), ("rows",)),
    "pmean": (averaged, ("rows", "columns"), ()),
    "all_gather": (gathered, ("rows", "columns"), (None, "columns")),
    "psum_scatter": (scattered, ("rows",), (("rows", "columns"),)),
    "all_to_all": (exchanged, (None, "columns"), ("rows", "columns")),
    "ppermute": (shifted, ("rows", "columns"), ("rows", "columns")),
}
LIES = ("rows", "columns")


class Ours:
    psum, pmean, ppermute, axis_index = map(staticmethod, (psum, pmean, ppermute, axis_index))

    @staticmethod
    def all_gather(x: Any, axis: str, dim: int) -> Any:
        return all_gather(x, axis, dim=dim)

    @staticmethod
    def psum_scatter(x: Any, axis: str, dim: int) -> Any:
        return psum_scatter(x, axis, dim=dim)

    @staticmethod
    def all_to_all(x: Any, axis: str, split: int, concat: int) -> Any:
        return all_to_all(x, axis, split_dim=split, concat_dim=concat)


def own_mesh() -> Any:
    return fmoe.make_mesh("rows=2,columns=2", names=LIES, device_type="cpu")


def here(name: str) -> Any:
    """A program's value, and the gradient of a loss of it, by devices of ours."""
    program, lies, gives = PROGRAMS[name]
    mesh = own_mesh()

    specs = dict(in_specs=fmoe.P(*lies), out_specs=fmoe.P(*gives))

    @functools.partial(fmoe.shard_map, mesh=mesh, check_replicated=True, **specs)
    def mapped(x: torch.Tensor) -> Any:
        return program(Ours, x)

    def loss(x: Any) -> Any:
        return mapped(x).sin().sum()

    x = distribute(X, fmoe.P(*lies), mesh)
    return [v.full_tensor() for v in (mapped(x), torch.func.grad(loss)(x))]


def unsummed() -> bool:
    """Whether a value that differs along an axis that its spec doesn't name is an error here."""
    mesh = own_mesh()
    specs = dict(in_specs=fmoe.P(*LIES), out_specs=fmoe.P("rows"))
    mapped = fmoe.shard_map(lambda x: x * 2, mesh, check_replicated=True, **specs)
    try:
        mapped(distribute(X, fmoe.P(*LIES), mesh))
    except ValueError as error:
        return "devices have other values along ('columns',)" in str(error)
    return False


def device_rows(jax: Any, devices: fmoe.parallel.Processes) -> list[Row]:
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((2, 2), LIES, axis_types=(AxisType.Auto, AxisType.Auto))
    x = jax.numpy.asarray(X.tolist())

    class Theirs:
        psum, pmean, ppermute, axis_index = jax.lax.psum, jax.lax.pmean, jax.lax.ppermute, jax.lax.axis_index

        @staticmethod
        def all_gather(x: Any, axis: str, dim: int) -> Any:
            return jax.lax.all_gather(x, axis, axis=dim, tiled=True)

        @staticmethod
        def psum_scatter(x: Any, axis: str, dim: int) -> Any:
            return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)

        @staticmethod
        def all_to_all(x: Any, axis: str, split: int, concat: int) -> Any:
            return jax.lax.all_to_all(x, axis, split, concat, tiled=True)

    def there(name: str) -> Any:
        program, lies, gives = PROGRAMS[name]
        specs = dict(in_specs=PartitionSpec(*lies), out_specs=PartitionSpec(*gives))

        @functools.partial(jax.shard_map, mesh=mesh, check_vma=False, **specs)
        def mapped(x: Any) -> Any:
            return program(Theirs, x)

        return [mapped(x), jax.grad(lambda x: jax.numpy.sin(mapped(x)).sum())(x)]

    def unsummed_jax() -> bool:
        specs = dict(in_specs=PartitionSpec(*LIES), out_specs=PartitionSpec("rows"))
        try:
            jax.shard_map(lambda x: x * 2, mesh=mesh, **specs)(x)
        except ValueError:
            return True
        return False

    def pieces_jax() -> Any:
        where = NamedSharding(mesh, PartitionSpec(*LIES)).devices_indices_map(SHAPE)
        return [[d.id, *(s.indices(n)[0] for s, n in zip(at, SHAPE))] for d, at in where.items()]

    def pieces_here() -> Any:
        # Sizes are enough to say where things lie.
        (layout,) = layouts_of("beside_jax", X, "dp=2,tp=2", fmoe.P("dp", "tp"))
        starts = {at: [i * n for i, n in zip(at, layout.held)] for at in layout.devices}
        return [[rank, *starts[at]] for at, ranks in layout.devices.items() for rank in ranks]

    rows = [
        Row(
            f"jax.shard_map with jax.lax.{name}", f"fmoe.shard_map with fmoe.parallel.{name}",
            functools.partial(there, name), functools.partial(lambda name: devices.run(here, name)[0], name),
            10 * ROUNDING,
        )
        for name in PROGRAMS
    ]  # fmt: skip
    return [
        *rows,
        Row(
            "jax.shard_map(check_vma=True) raises", "check_replicated=True raises",
            unsummed_jax, lambda: devices.run(unsummed)[0], EXACT,
        ),
        Row(
            "jax.debug.visualize_array_sharding", "fmoe.introspect.show_placement",
            pieces_jax, pieces_here, EXACT,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
