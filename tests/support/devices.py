"""The same program on real devices and on simulated ones, whose values are stacked in one tensor.

A program's values are ``(..., N, D)``. On a simulated mesh they have its axes in front, so everything but
the collectives is the same code, and derivatives are PyTorch's own.
"""

import math
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fmoe
from fmoe.parallel import all_gather, all_to_all, axis_index, ppermute, psum, reduce_scatter

MESHES = {"dp=2": 2, "dp=2,ep=2": 4, "ep=4": 4}  # and how many ranks they have


def sizes_of(axes: str) -> dict[str, int]:
    return {name: int(size) for name, size in (item.split("=") for item in axes.split(","))}


def bare_mesh(axes: str, device: str = "cpu") -> DeviceMesh:
    """A mesh of these axes alone. DTensor takes a second for each new operation on one of four axes."""
    sizes = sizes_of(axes)
    return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class Real:
    """This device, inside ``shard_map``."""

    psum = staticmethod(psum)
    index = staticmethod(axis_index)

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes

    def gather(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        return all_gather(v, axis, dim=-2)

    def scatter(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        return reduce_scatter(v, axis, dim=-2)

    def exchange(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        return all_to_all(v, axis, split_dim=-2, concat_dim=-2)

    def shift(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        return ppermute(v, axis, [(i, i + 1) for i in range(self.sizes[axis] - 1)])


class Simulated:
    """All devices at once; ``sizes`` says which dimension of every value is which axis."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.dim = {axis: i for i, axis in enumerate(sizes)}

    def index(self, axis: str) -> torch.Tensor:
        shape = [1] * (len(self.sizes) + 2)
        shape[self.dim[axis]] = self.sizes[axis]
        return torch.arange(self.sizes[axis]).view(shape)

    def psum(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        return v.sum(self.dim[axis], keepdim=True).expand_as(v)

    def gather(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        d = self.dim[axis]
        whole = v.movedim(d, -3).flatten(-3, -2).unsqueeze(d)
        return whole.expand(*whole.shape[:d], self.sizes[axis], *whole.shape[d + 1 :])

    def scatter(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        d, n = self.dim[axis], self.sizes[axis]
        return v.sum(d).unflatten(-2, (n, v.shape[-2] // n)).movedim(-3, d)

    def exchange(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        n = self.sizes[axis]
        return v.unflatten(-2, (n, v.shape[-2] // n)).transpose(-3, self.dim[axis]).flatten(-3, -2)

    def shift(self, v: torch.Tensor, axis: str) -> torch.Tensor:
        return v.roll(1, self.dim[axis]) * (self.index(axis) > 0)


def run(steps: list[tuple[str, str, float]], net: Any, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A program: ``w`` (D, D) is the same on every device, ``x`` (..., N, D) is each device's own."""
    v, rows = torch.tanh(x @ w), x.shape[-2]
    for step, axis, c in steps:
        n = net.sizes[axis]
        if step == "psum":
            v = net.psum(v * c, axis)
        elif step == "gather":
            v = net.gather(v, axis)
            v = c * v[..., :rows, :] + v[..., -rows:, :].sin()
        elif step == "scatter":
            v = net.scatter(torch.cat([v * k for k in range(1, n + 1)], -2), axis)
        elif step == "gather, scatter":
            v = net.scatter(net.gather(v, axis).sin(), axis)
        elif step == "exchange":
            v = v + c * net.exchange(v.tanh(), axis)
        elif step == "shift":
            v = v * c + net.shift(v, axis)
        elif step == "index":
            v = v * (1 + net.index(axis))
        elif step == "mix":
            v = torch.tanh(v @ w) + c * x @ w
    return v


STEPS = ["psum", "gather", "scatter", "gather, scatter", "exchange", "shift", "index", "mix"]


class Example:
    """A random program with random specs: as a global function of one process, and as a ``shard_map``.

    It is ``(w, x) -> y``, with ``w`` (4, 4) and ``x`` (rows, 4). What ``y``'s spec doesn't name is summed.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.sizes = {a: n for a, n in zip(mesh.mesh_dim_names, mesh.shape) if n > 1}
        axes = list(self.sizes)
        pick = lambda few: tuple(a for a in axes if torch.rand(()) < few)  # noqa: E731
        self.w_axes, self.x_axes, self.y_axes = pick(0.4), pick(0.6), pick(0.6)
        self.specs = [fmoe.P(axes or None) for axes in (self.w_axes, self.x_axes, self.y_axes)]
        count = int(torch.randint(3, 7, ()))
        choose = lambda options: options[int(torch.randint(len(options), ()))]  # noqa: E731
        self.steps = [(choose(STEPS), choose(axes), torch.rand(()).item()) for _ in range(count)]
        rows = 4 * math.prod(self.sizes[a] for a in self.x_axes)
        self.w, self.x = torch.randn(4, 4, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64)
        specs = {"in_specs": tuple(self.specs[:2]), "out_specs": self.specs[2]}
        self.mapped = fmoe.shard_map(self.local, mesh, **specs)
        self.mapped_to_local = fmoe.shard_map(self.local, mesh, **specs, local_results=True)

    def __repr__(self) -> str:
        return f"specs {self.specs} steps {self.steps}"

    def local(self, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        w = all_gather(w, self.w_axes) if self.w_axes else w
        v = run(self.steps, Real(self.sizes), w, x)
        unnamed = tuple(a for a in self.sizes if a not in self.y_axes)
        return psum(v, unnamed) if unnamed else v

    def reference(self, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        split = [n if a in self.x_axes else 1 for a, n in self.sizes.items()]
        x = x.reshape(*split, 4, 4).expand(*self.sizes.values(), 4, 4)
        v = run(self.steps, Simulated(self.sizes), w, x)
        unnamed = [i for i, a in enumerate(self.sizes) if a not in self.y_axes]
        return (v.sum(unnamed) if unnamed else v).flatten(0, -2)

    def piece(self, value: torch.Tensor, spec: Any) -> torch.Tensor:
        """This device's own part of a global value."""
        return fmoe.parallel.distribute(value, spec, self.mesh).to_local()
