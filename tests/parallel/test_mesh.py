"""make_mesh: axes and sizes, one process without a launcher, several with one."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from helpers import quick

import fmoe
from fmoe import P
from fmoe.ops.core.axes import group_of
from fmoe.parallel import distribute, placements, spec_of
from fmoe.parallel.mesh import check_device, take_gpu

# ---- in one process ---------------------------------------------------------------------------------


def test_the_axes_are_always_there_in_one_order():
    for mesh in (fmoe.make_mesh(device_type="cpu"), fmoe.make_mesh("tp=1, dp=1", ep=1, device_type="cpu")):
        assert mesh.mesh_dim_names == ("pp", "dp", "ep", "tp") and mesh.shape == (1, 1, 1, 1)
        assert mesh.device_type == "cpu"


@pytest.mark.parametrize(
    ("args", "sizes", "text"),
    [
        (
            "dp=2,ep=4",
            {},
            "got pp=1, dp=2, ep=4, tp=1, expected a product of 1, the number of processes. Start",
        ),
        ("dp=2,ep=4", {}, "as with torchrun --nproc-per-node 8."),
        ("dp:2", {}, "got 'dp:2', expected axes and sizes like \"dp=2,ep=4\"."),
        (
            "dp=1,data=2,ep=0",
            {},
            "got data=2, ep=0, expected each of ('pp', 'dp', 'ep', 'tp') at most once, of",
        ),
        ("x=1,y=1", {}, "at most once, of size at least 1. For axes of your own pass names=('x', 'y')."),
        ("dp=1", {"dp": 1}, "got dp=1, dp=1, expected each of"),
        ("", {"ep": 1.5}, "got ep=1.5, expected each of"),
    ],
)
def test_bad_axes_are_named(args, sizes, text):
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        fmoe.make_mesh(args, **sizes)
    assert str(caught.value).startswith("make_mesh: axes: got")


@pytest.mark.parametrize(
    ("device", "found", "text"),
    [
        ("gpu", 0, "--device: got 'gpu', expected cpu, cuda or, say, cuda:1."),
        ("meta", 0, "--device: got 'meta', expected cpu, cuda or, say, cuda:1."),
        ("cuda", 0, "of CUDA it finds 0 here. Use the CPU, or see python -m fmoe doctor."),
        (
            "cuda:2",
            2,
            "got 'cuda:2', expected a device that PyTorch finds; of CUDA it finds 2 here. Count",
        ),
    ],
)
def test_devices_that_arent_here_are_named(monkeypatch, device, found, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ValueError, match=re.escape(text)):
        check_device(device)
    for fine in ("cpu", *["cuda", "cuda:1"][:found]):
        check_device(fine)


def run_script(command, script):
    done = subprocess.run(
        [*command, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_launcher_a_fresh_process_is_a_world_of_one():
    script = """
        import torch, fmoe
        f = fmoe.shard_map(torch.sin, fmoe.make_mesh(), in_specs=fmoe.P("ep"), out_specs=fmoe.P("ep"))
        print(f(torch.zeros(3)).tolist(), torch.distributed.get_world_size())
    """
    assert run_script([sys.executable, "-W", "error"], script) == "[0.0, 0.0, 0.0] 1\n"


# Two processes and one GPU share it. On the CPU, test_train_many.py launches the example.
@pytest.mark.parametrize("device", quick(["cuda"], ["cpu"] + ["cuda"] * torch.cuda.is_available()))
def test_under_a_launcher_the_processes_find_each_other(tmp_path, device):
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent(f"""
            import os, torch, fmoe
            from fmoe.parallel import psum
            mesh = fmoe.make_mesh("ep=2", device_type="{device}")
            total = fmoe.shard_map(lambda x: psum(x, "ep"), mesh, in_specs=fmoe.P("ep"), out_specs=fmoe.P())
            assert total(torch.tensor([1 + mesh.get_rank()], device="{device}")).tolist() == [3]
            torch.distributed.destroy_process_group()
            print("done", flush=True)
            os._exit(0)  # at a normal exit gloo's threads of several groups sometimes abort (torch 2.13)
        """)
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


@pytest.mark.parametrize(
    ("rank", "number", "gpu", "shared"), [(3, 4, 3, False), (3, 5, 3, True), (6, 8, 2, True)]
)
def test_processes_share_gpus_where_those_are_fewer(monkeypatch, rank, number, gpu, shared):
    chosen, environment = [], {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(os, "environ", environment)
    assert take_gpu(rank, number) is shared
    assert chosen == [gpu] and ("NCCL_HOSTID" in environment) is shared


# ---- on four ranks ----------------------------------------------------------------------------------


def groups():
    mesh = fmoe.make_mesh("dp=2,ep=2", device_type="cpu")
    flat = set(mesh._get_root_mesh()._flatten_mapping)
    found = [
        group_of(mesh, axes)[1:] for axes in (("pp",), ("dp",), ("ep",), ("dp", "ep"), ("pp", "ep", "tp"))
    ]
    assert group_of(mesh, ("dp", "ep")) is not None
    assert group_of(mesh, ("pp", "dp", "ep")).name == group_of(mesh, ("dp", "ep")).name
    return found, flat


def test_groups_of_one_and_of_many_axes(pool):
    for rank, (found, flat) in enumerate(pool.run(4, groups)):
        assert found == [(1, 0), (2, rank // 2), (2, rank % 2), (4, rank), (2, rank % 2)]
        assert flat == {"dp_ep"}


def specs_and_placements():
    mesh = fmoe.make_mesh("dp=2,ep=2", device_type="cpu")
    specs = [P(), P("ep"), P(None, "dp"), P(("dp", "ep")), P("ep", "dp"), P(None, ("dp", "ep"))]
    value = torch.arange(64).view(8, 8)
    for spec in specs:
        tensor = distribute(value, spec, mesh)
        assert tensor.placements == placements(spec, mesh)
        assert placements(spec_of(tensor), mesh) == placements(spec, mesh)
        assert torch.equal(tensor.full_tensor(), value)
    spread = distribute(
        {"a": [value, value + 1], "b": value}, {"a": P("ep", "nowhere"), "b": P(("dp", "x"))}, mesh
    )
    return [t.to_local()[0, 0].item() for t in (*spread["a"], spread["b"])]


def test_specs_are_placements_and_axes_the_mesh_lacks_are_left_out(pool):
    for rank, found in enumerate(pool.run(4, specs_and_placements)):
        assert found == [32 * (rank % 2), 32 * (rank % 2) + 1, 32 * (rank // 2)]


def wanting_another_mesh():
    with pytest.raises(ValueError, match=r"make_mesh: axes: got ") as caught:
        fmoe.make_mesh("ep=2" if dist.get_rank() == 0 else "dp=2", device_type="cpu")
    return str(caught.value)


def test_ranks_that_want_different_meshes_are_told(pool):
    for text in pool.run(2, wanting_another_mesh):
        assert "on rank 1, beside rank 0: axes.dp is 1, here 2; axes.ep is 2, here 1" in text
