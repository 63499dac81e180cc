"""Texts of errors, raised: those that no other test asserts at length have a case here."""

import ast
import dataclasses
import importlib
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import optree
import pytest
import torch
from error_sites import HOLE, sites

import fmoe
from fmoe import ExpertParams, P, RouterConfig, Routing
from fmoe.bench import measure, model
from fmoe.bench.layers import Shape
from fmoe.models import checks, deepseek_v3, huggingface, published, vocabulary
from fmoe.models.config import Yarn
from fmoe.models.sampling import sample
from fmoe.ops import transport
from fmoe.ops.attention import causal_attention
from fmoe.ops.core import tape
from fmoe.ops.core.axes import Group
from fmoe.ops.core.primitive import declare
from fmoe.ops.kernels import grouped
from fmoe.parallel import backends, boundary, placement
from fmoe.parallel.backends.deepep import adapter as deepep
from fmoe.parallel.backends.deepep import buffers as deepep_buffers
from fmoe.parallel.together import check_alike, together
from fmoe.testing import check_backend
from fmoe.training import checkpoint, data, documents, gradients, metrics, optim, plot, schedules, tokenizer

LONG_ENOUGH = 24  # characters in a row, by which a test of a text tells it from others

CONFIG = deepseek_v3.preset("debug")
ANY = RouterConfig(top_k=1, num_groups=1, top_groups=1)
SIZES = dict(max_tokens_per_rank=4, dim=256, top_k=2, num_experts=4)


def layer(**changes):
    return fmoe.moe_init(0, dim=4, hidden_dim=8, num_experts=4, num_shared_experts=1, **changes)


def dispatched(tokens=3):
    params, x = layer(), torch.randn(tokens, 4)
    return params, *fmoe.dispatch(x, fmoe.route(params.router, x, ANY))


def routing(ids, weights, num_experts=4):
    counts = torch.zeros(num_experts, dtype=torch.int64)
    return Routing(ids, weights, counts, torch.rand(len(ids), num_experts))


def initialised(**changes):
    fmoe.moe_init(0, **(dict(dim=4, hidden_dim=8, num_experts=4) | changes))


def capturing():
    outside = torch.ones(2, requires_grad=True)
    fmoe.value_and_grad(fmoe.remat(lambda x: (x * outside).sum()))(torch.ones(2))


def experts(w_in=None, w_out=None, dtype=torch.float32):
    params, x_SD, plan = dispatched()
    mine = params.experts
    w_in = mine.w_in.to(dtype) if w_in is None else w_in
    w_out = mine.w_out.to(dtype) if w_out is None else w_out
    fmoe.experts_grouped_mm(ExpertParams(w_in, w_out), x_SD, plan)


def model_on_mesh(change):
    mesh = fmoe.make_mesh()
    params = change(deepseek_v3.init(CONFIG, 0))
    deepseek_v3.forward(params, torch.zeros(1, 4, dtype=torch.int64), CONFIG, mesh)


def tokens(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


def prompt(value=None, **options):
    defaults = dict(num_tokens=1, seed_or_generator=0)
    value = tokens(1, 1) if value is None else value
    sample(deepseek_v3.init(CONFIG, 0), value, CONFIG, **(defaults | options))


def training_that_fails(monkeypatch):
    monkeypatch.setattr(model, "_times", lambda *_: ([1.0, 1.0], float("nan")))
    sizes = dict(batch_size=2, seq_len=16, device="cpu", dtype=torch.float32)
    model.bench_model(deepseek_v3.preset("debug", layers=2), **sizes)


def written(path, text):
    path.write_text(text)
    return path


def published_model(tmp, change):
    huggingface.save(tmp / "model", CONFIG, deepseek_v3.init(CONFIG, 0))
    change(tmp / "model")
    huggingface.load(tmp / "model")


def changed_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unreadable_checkpoint(tmp, monkeypatch):
    """Whole, by its sums, and no checkpoint of PyTorch's."""
    path = checkpoint.save(tmp, 1, {"w": torch.ones(2)})
    index = path / ".metadata"
    index.write_bytes(b"no pickle")
    description = json.loads((path / "checkpoint.json").read_text())
    description["files"][".metadata"] = checkpoint.folders.summed(index)
    (path / "checkpoint.json").write_text(json.dumps(description))
    checkpoint.load(path, {"w": torch.ones(2)})


def full_disk(tmp, monkeypatch):
    def fail(*_args, **_kwargs):
        raise checkpoint.dcp.api.CheckpointException("no space", {0: (OSError("no space"), [])})

    monkeypatch.setattr(checkpoint.dcp, "save", fail)
    checkpoint.save(tmp, 1, {"w": torch.ones(2)})


def update(change):
    params = {"w": torch.ones(2)}
    optimizer = optim.adamw()
    optimizer.update(params, change(params), optimizer.init(params), 0.1)


def nowhere(mesh):
    """A parameter that lies along an axis where the layer wants it along another dimension."""
    spec = P(None, None, "ep")
    placement.moves("moe_forward", "params", [torch.ones(2, 2, 2)], [spec], [P("ep")], mesh)


OTHER_GPU = SimpleNamespace(shape=(1, 256), device=torch.device("cuda:1"), is_cuda=True)


def buffer(wanted, x=None, device=None):
    held = deepep_buffers.Held(SimpleNamespace(size=lambda: 2), "buffer")
    held.engine, held.sizes = deepep_buffers.Legacy, deepep.Sizes(4, 256, 2, 4)
    held.device = device
    held._check(torch.ones(1, 256) if x is None else x, wanted)


FAKE_TP2 = SimpleNamespace(mesh_dim_names=("ep", "tp"), size=lambda i=None: 2)

# text -> what raises it; it may take ``tmp_path`` and ``monkeypatch``, as ``tmp`` and ``monkeypatch``
CASES = {
    "moe_forward: x: got dtype …, expected a floating dtype": lambda: fmoe.moe_forward(
        layer(), tokens(2, 4), router=ANY
    ),
    "moe_forward: params.…: got …, expected …, as x": lambda: fmoe.moe_forward(
        layer(dtype=torch.bfloat16), torch.randn(2, 4), router=ANY
    ),
    "route: x_TD: got shape …, expected (T, …), as weight_ED is …": lambda: fmoe.route(
        layer().router, torch.randn(2, 5), ANY
    ),
    "dispatch: x_TD: got shape …, expected (…, D), a row for each row of routing.expert_ids_TK": lambda: (
        fmoe.dispatch(torch.randn(3, 4), routing(tokens(2, 1), torch.ones(2, 1)))
    ),
    "…: …: got shape …, expected (…, D), by its plan": lambda: fmoe.combine(
        torch.randn(4, 4), dispatched(3)[2]
    ),
    "experts_grouped_mm: expert_params.w_in: got shape …, expected … for x_SD … and a plan of … experts": (
        lambda: experts(w_in=torch.randn(3, 2, 8, 4))
    ),
    "experts_grouped_mm: expert_params.w_out: got shape …, expected … for x_SD … and a plan of … experts": (
        lambda: experts(w_out=torch.randn(3, 4, 8))
    ),
    "experts_grouped_mm: expert_params.w_in: got … on …, expected … on …, as x_SD": lambda: experts(
        dtype=torch.bfloat16
    ),
    "experts_grouped_mm: expert_params.w_out: got … on …, expected … on …, as x_SD": lambda: experts(
        w_out=torch.randn(4, 4, 8, dtype=torch.float64)
    ),
    "causal_attention: q, k, v: got …, expected (B, L, H, N), (B, L, H, N) and (B, L, H, V) of one dtype on "
    "one device": lambda: causal_attention(*[torch.randn(1, 2, 1, 4)] * 2, torch.randn(1, 3, 1, 4), 1.0),
    "update_expert_bias: counts_E: got shape …, expected …, one count per expert": lambda: (
        fmoe.update_expert_bias(layer(), tokens(3), 0.1)
    ),
    "…: …: got no token, of shape …, expected at least one": lambda: checks.check_tokens(
        "forward", "tokens", tokens(0, 4), 8
    ),
    "…: …: got … … …, expected …, as tokens": lambda: deepseek_v3.loss(
        deepseek_v3.init(CONFIG, 0), tokens(1, 4), tokens(1, 3), CONFIG
    ),
    "…: ….…: got …, expected a tensor": lambda: optim.global_norm({"a": [1.0]}),
    "…: router.top_k: got …, expected an integer": lambda: RouterConfig(top_k=2.0).check(16, "route"),
    "…: router.num_groups: got …, expected an integer": lambda: RouterConfig(num_groups=2.0).check(
        16, "route"
    ),
    "…: router.top_groups: got …, expected an integer": lambda: RouterConfig(top_groups=2.0).check(
        16, "route"
    ),
    "…: router.group_best: got …, expected an integer": lambda: RouterConfig(group_best=2.0).check(
        16, "route"
    ),
    "moe_init: hidden_dim: got …, expected an integer of at least 1": lambda: initialised(hidden_dim=4.0),
    "moe_init: num_experts: got …, expected an integer of at least 1": lambda: initialised(num_experts=0),
    "moe_init: num_shared_experts: got …, expected an integer of at least 0": lambda: initialised(
        num_shared_experts=-1
    ),
    "dispatch: routing.counts_E: got … experts for … devices, expected a multiple of the devices along the "
    "axis": lambda: transport.check_experts_divide(4, 3),
    "cross_entropy_terms: index: got a target outside the vocabulary, expected 0 to vocab_size - 1, or -100 "
    "for none. Use the tokenizer that the model is for.": lambda: deepseek_v3.loss(
        deepseek_v3.init(CONFIG, 0), tokens(1, 3), tokens(1, 3) + CONFIG.vocab_size, CONFIG
    ),
    "embed: ids: got an id outside the vocabulary, expected 0 to …": lambda: deepseek_v3.forward(
        deepseek_v3.init(CONFIG, 0), tokens(1, 3) + CONFIG.vocab_size, CONFIG
    ),
    "vocabulary: ids: got one outside of it, along tp. Use the tokenizer that the model is for.": (
        lambda monkeypatch: (
            monkeypatch.setattr(vocabulary, "axis_size", lambda _: 2),
            monkeypatch.setattr(vocabulary, "axis_index", lambda _: 0),
            vocabulary.embed(tokens(1) + 8, torch.ones(4, 2)),
        )
    ),
    "preset: name: got …, expected one of …": lambda: deepseek_v3.preset("7B"),
    "preset: layers: got …, expected 1 to …, as … has": lambda: deepseek_v3.preset("16B", layers=28),
    "bench_layer: only: got …, expected names among …": lambda: measure.bench_layer(
        Shape(8, 16, 8, 4, 2), device="cpu", only=["fmoe", "fmoe aligned"]
    ),
    "DeepSeekV3Config: …: got …, expected an integer of at least …": lambda: dataclasses.replace(
        CONFIG, dim=8.0
    ),
    "Yarn: factor: got …, expected at least 1": lambda: Yarn(0.5, 10),
    "Yarn: original_max_seq_len: got …, expected at least 1": lambda: Yarn(2.0, 0),
    "Yarn: beta_slow: got …, expected above 0, to beta_fast=…": lambda: Yarn(2.0, 10, beta_slow=64.0),
    "Yarn: mscale: got …, expected above 0": lambda: Yarn(2.0, 10, mscale=-1.0),
    "sample: prompt: got shape …, expected (B, L), L > 0": lambda: prompt(tokens(1, 0)),
    "sample: num_tokens: got …, expected at least 0": lambda: prompt(num_tokens=-1),
    "sample: temperature: got …, expected at least 0": lambda: prompt(temperature=-1.0),
    "value_and_grad: args.…: got …, expected a floating dtype": lambda: fmoe.value_and_grad(torch.sum)(
        tokens(2)
    ),
    "remat: fn: got a function that uses a differentiable tensor from outside in …: shape …, …, expected "
    "every differentiable tensor as an argument": capturing,
    "remat: fn: got a function that, run again, calls … where … was called first, expected the same "
    "operators in the same order each time": lambda: raised(
        tape.replay_error("scatter where gather was called first")
    ),
    "shard_map: cannot run under torch.func.… over DTensors, which PyTorch lacks. Pass each device's plain "
    "local tensors instead, as x.to_local() gives them.": lambda: raised(boundary.dtensor_error("vmap")),
    "value_and_grad: fn: got …, expected …": lambda: fmoe.value_and_grad(lambda x: x)(torch.ones(2)),
    "save: names: got …, expected names of …": lambda: fmoe.save("no such operator"),
    "…: declared with neither a plain function nor a reference.": lambda: declare(
        "test_without_oracle(Tensor x) -> Tensor",
        impl=torch.clone,
        fake=torch.empty_like,
        checkpoint="gather",
        example=lambda: (torch.ones(1),),
    ),
    "…: …: got …, expected one of …, which can do …": (
        lambda monkeypatch: (
            monkeypatch.setenv("FMOE_GROUPED_MM", "abacus"),
            grouped.mm(torch.ones(2, 2), torch.ones(1, 2, 2), torch.tensor([2], dtype=torch.int32)),
        )
    ),
    "…: between ranks torch.distributed.checkpoint needs numpy. Install it with: pip install numpy.": (
        lambda monkeypatch: (
            monkeypatch.setattr(checkpoint, "num_ranks", lambda: 2),
            monkeypatch.setattr(checkpoint, "find_spec", lambda _: None),
            checkpoint.check_ranks("--save-every"),
        )
    ),
    "bench_model: config: got a step that needs … GiB, expected at most … GiB, the memory of this machine": (
        lambda monkeypatch: (
            monkeypatch.setattr(model.os, "sysconf", lambda _: 1),
            model.bench_model(deepseek_v3.preset("debug"), device="cpu", batch_size=1, seq_len=16),
        )
    ),
    "plot: metrics: got …: …, expected a file of bench layer --json, for --what layers": lambda tmp: (
        importlib.import_module("fmoe.__main__")._layers(written(tmp / "metrics.jsonl", "{}\n{}\n"))
    ),
    "…: mesh: got None, for params that are DTensors, expected the mesh they lie on": lambda: (
        deepseek_v3.forward(deepseek_v3.init(CONFIG, 0, mesh=fmoe.make_mesh()), tokens(1, 4), CONFIG)
    ),
    # ---- meshes
    "plot_loss: runs[…]: got no finite loss, expected at least one": lambda: plot.plot_loss(
        {"a run": [{"step": 0, "loss": float("nan")}]}
    ),
    "…: …: got a record whose … is …, expected a number": lambda: plot.plot_loss(
        {"a run": [{"step": 0, "loss": None}]}
    ),
    "bench model: the last loss is ….": lambda monkeypatch: training_that_fails(monkeypatch),
    "…: axes: got …, expected each of … at most once, of size at least 1": lambda: fmoe.make_mesh(
        "dp=1,dp=1"
    ),
    "make_mesh: axes: got pp=…, expected pp=1": lambda: fmoe.make_mesh("pp=2"),
    "make_mesh: axes: got …, expected a product of …, the number of processes": lambda: fmoe.make_mesh(
        "dp=3"
    ),
    "shard_map: backends: got …, expected an axis of the mesh …": lambda: fmoe.shard_map(
        lambda x: x, fmoe.make_mesh(), in_specs=P(), out_specs=P(), backends={"experts": None}
    ),
    "shard_params: specs: got None, for a …, expected specs, unless params are MoEParams": lambda: (
        fmoe.shard_params({"w": torch.ones(2)}, fmoe.make_mesh())
    ),
    "…: axis: got a mesh of … dimensions, named …, expected the name of a bound axis, or a mesh of one "
    "dimension that has a name": lambda: fmoe.dispatch(
        torch.randn(2, 4), routing(tokens(2, 1), torch.ones(2, 1)), axis=fmoe.make_mesh()
    ),
    "…: …: got a DTensor of shape … placed by …, expected whole tokens, cut along dp and ep": lambda: (
        checks.check_token_spec("forward", "tokens", torch.ones(2, 4), P("tp"))
    ),
    "…: …: got a DTensor placed by …, expected …, with dimensions further cut along other axes, or "
    "whole": lambda: nowhere(FAKE_TP2),
    "…: mesh: got tp=… for … heads, expected a tp that divides the heads": lambda: checks.check_heads(
        "forward", 3, FAKE_TP2
    ),
    "…: params: got …, expected … tensors of config, on …": lambda: model_on_mesh(
        lambda params: params._replace(norm=torch.ones(3))
    ),
    "…: …: got on rank …, beside rank 0: …, expected the same on every rank": None,  # of several, below
    "on rank …: …": None,
    # ---- backends
    "…: backend: got …, expected one of …": lambda: deepseek_v3.loss(
        deepseek_v3.init(CONFIG, 0), tokens(1, 3), tokens(1, 3), CONFIG, backend="carrier pigeon"
    ),
    "…: backend: got 'local' with ep=…, expected a backend that moves tokens": lambda monkeypatch: (
        monkeypatch.setattr(backends, "group_of", lambda *_: Group("", 2, 0)),
        backends.choose("loss", "local", fmoe.make_mesh()),
    ),
    "deepep: kind: got …, expected one of …, or None": lambda: open_buffer(kind="large"),
    "deepep: top_k: got …, expected at most …": lambda: open_buffer(top_k=33, num_experts=64),
    "deepep: num_experts: got … experts for … devices, expected a multiple of the devices, at most … each": (
        lambda: deepep_buffers.check(deepep.Sizes(4, 256, 2, 5), None, Group("", 2, 0), "cuda")
    ),
    "deepep: x_TD: got dim …, expected a multiple of …, for DeepEP's …": lambda: buffer(
        deepep.Sizes(4, 128, 2, 4)
    ),
    "deepep: …: got …, expected an integer of at least 1": lambda: open_buffer(dim=0),
    "deepep: line: got … devices on hosts …, expected every … in a row on one node, between which Buffer "
    "uses NVLink": lambda: deepep.check_kind("buffer", ["a", "b"]),
    "deepep: deep_ep: got …: …, expected a DeepEP (…) that loads": lambda: raised(
        deepep._not_loaded(OSError("libnccl.so"))
    ),
    "deepep: deep_ep: got different DeepEPs, expected one version on all hosts": lambda monkeypatch: (
        differing_deepeps(monkeypatch)
    ),
    "deepep: x_TD: got a tensor on …, expected one on cuda": lambda: deepep_buffers.check_rows(
        torch.ones(1, 256)
    ),
    "deepep: x_TD: got a tensor on …, expected one on …, where the buffer was made": lambda: buffer(
        deepep.Sizes(1, 256, 2, 4), OTHER_GPU, torch.device("cuda:0")
    ),
    "deepep: sizes: got …, expected at most what the buffer was sized for": lambda: buffer(
        deepep.Sizes(5, 256, 2, 4)
    ),
    # ---- laws
    "…: laws: got …, expected some of …": lambda: check_backend(None, fmoe.make_mesh(), laws=["murphy's"]),
    "check_backend: mesh: got … among … ranks, expected a mesh of all ranks with an axis ep": lambda: (
        check_backend(None, fmoe.make_mesh()["dp"])
    ),
    "check_backend: dtype: got …, expected one of …": lambda: check_backend(
        None, fmoe.make_mesh(), dtype=torch.int8
    ),
    # ---- text, training
    "batch_at: seq_len: got …, expected 1 to …, as there are … tokens": lambda: data.batches(
        torch.arange(4), batch_size=1, seq_len=4, seed=0
    ),
    "batch_at: batch_size: got … sequences for … devices, expected a multiple": lambda: data.batch_at(
        0, torch.arange(9), batch_size=3, seq_len=4, seed=0, part=(0, 2)
    ),
    "read_documents: paths: got … files and no text in …, expected at least one byte in a file, or in a "
    "folder's *… files": lambda tmp: documents.read_documents(tmp),
    "read_documents: paths: got …, expected readable files": lambda tmp: documents.read_documents(tmp / "no"),
    "read_metrics: path: got …, expected a readable JSONL file": lambda tmp: metrics.read_metrics(tmp / "no"),
    "read_metrics: …, line …: got …, expected one JSON object": lambda tmp: metrics.read_metrics(
        written(tmp / "m.jsonl", "[1]\n")
    ),
    "MetricsFile.write: the file is not open. Use it in a with statement.": lambda tmp: metrics.MetricsFile(
        tmp / "m.jsonl"
    ).write(metrics.Step(0, 1.0, 1.0, 1e-3, 1.0, [[1]])),
    "load_tokenizer: path: got …: …, expected a tokenizer.json": lambda tmp: tokenizer.load_tokenizer(
        written(tmp / "tokenizer.json", "{}")
    ),
    "adamw: betas: got …, expected two numbers in [0, 1)": lambda: optim.adamw(betas=(0.9, 1.0)),
    "adamw: moments_dtype: got …, expected bfloat16, float32, float64 or None": lambda: optim.adamw(
        moments_dtype=torch.int8
    ),
    "adamw.update: …: got …, expected …": lambda: update(lambda params: {"w": torch.ones(3)}),
    "adamw.update: …: got a tree with leaves missing: …, unexpected: …, expected the leaves and containers "
    "of params": lambda: update(lambda params: {"v": torch.ones(2)}),
    "accumulate: num_micro_batches: got …, expected at least 1": lambda: gradients.accumulate(len, 0),
    "warmup_cosine: warmup_steps: got …, expected 0 to total_steps=…": lambda: schedules.warmup_cosine(
        0, peak=1.0, warmup_steps=3, total_steps=2
    ),
    "bench layer: …: relative error … against float32.": lambda monkeypatch: wrong_layer(monkeypatch),
    # ---- files
    "save: keep: got …, expected at least 1": lambda tmp: checkpoint.save(
        tmp, 1, {"w": torch.ones(1)}, keep=0
    ),
    "save: could not write …: …": full_disk,
    "load: …: got …, expected readable tensors": unreadable_checkpoint,
    "huggingface.load: path: got … without …, expected config.json, and model.safetensors or what "
    "model.safetensors.index.json names": lambda tmp: huggingface.load(tmp),
    "huggingface.load: …: got …, expected a file as published": lambda tmp: published_model(
        tmp, lambda path: written(path / "config.json", "{")
    ),
    "huggingface.load: …: got no weight_map, expected a file as published": lambda tmp: published_model(
        tmp, lambda path: written(path / huggingface.INDEX, "{}")
    ),
    "huggingface.load: …: got a weight_map to …, not to files beside it, expected a file as published": (
        lambda tmp: published_model(
            tmp, lambda path: changed_json(path / huggingface.INDEX, weight_map={"w": "../x.safetensors"})
        )
    ),
    "huggingface.load: …: got …, not an object, expected a file as published": lambda tmp: published_model(
        tmp, lambda path: written(path / "config.json", "[]")
    ),
    "huggingface.load: config.json: got …, expected a DeepSeek-V2 or DeepSeek-V3 that fmoe computes "
    "exactly": (lambda: published.import_config({"model_type": "llama"})),
}


def raised(error):
    raise error


def open_buffer(**changes):
    with fmoe.parallel.deepep(fmoe.make_mesh()["ep"], **(SIZES | changes)):
        pass


def differing_deepeps(monkeypatch):
    everyone = [("host", "", "buffer"), ("host", "", "elastic")]
    monkeypatch.setattr(deepep_buffers.adapter, "load", lambda: None)
    monkeypatch.setattr(deepep_buffers.adapter, "choose_kind", lambda *_: "buffer")
    monkeypatch.setattr(deepep_buffers, "from_all", lambda *_: everyone)
    deepep_buffers._agreement(SimpleNamespace(size=lambda: 2), None)


def wrong_layer(monkeypatch):
    from fmoe.bench import measure

    def twice(params, x):
        return 2 * measure.plain_layer(params, x, 1, tokens(3, 1))

    x = torch.randn(3, 4, requires_grad=True)
    run = measure.Run(optree.tree_map(lambda leaf: leaf.requires_grad_(), layer()), x, torch.ones(3, 4))
    measure._entered("twice", twice, run, measure._reference(run, SimpleNamespace(top_k=1), ANY))


def pattern(text):
    """A template as a regular expression, of all that comes before the remedy."""
    return ".*?".join(map(re.escape, text.split(HOLE)))


@pytest.mark.parametrize("text", [text for text, case in CASES.items() if case])
def test_the_text_is_what_is_raised(text, tmp_path, monkeypatch):
    case = CASES[text]
    takes = case.__code__.co_varnames[: case.__code__.co_argcount]
    given = {"tmp": tmp_path, "monkeypatch": monkeypatch}
    with pytest.raises((ValueError, RuntimeError, TypeError, ImportError)) as raised:
        case(**{name: given[name] for name in takes})
    assert re.match(pattern(text), str(raised.value), re.DOTALL), str(raised.value)
    if ": got " in text:
        assert re.search(r"[.)] *$|:\n", str(raised.value)), "it ends with a remedy"


def apart():
    """What two ranks that differ are told, and what one is told of the other's error."""
    found = []
    rank = torch.distributed.get_rank()
    for what in (lambda: check_alike("train", {"options": {"steps": rank}}), lambda: fail_on(rank)):
        try:
            what()
        except ValueError as error:
            found.append(str(error))
    return found


def fail_on(rank):
    with together():
        if rank == 0:
            raise ValueError("save: keep: got 0")


def test_the_texts_of_several_ranks(pool):
    alike = (
        "train: options: got on rank 1, beside rank 0: options.steps is 0, here 1, expected the same on "
        "every rank. Start all ranks with the same options."
    )
    first, second = pool.run(2, apart)
    assert first == [alike, "save: keep: got 0"]
    assert second == [alike, "on rank 0: save: keep: got 0"]


def test_every_text_is_asserted_somewhere():
    """In the table above, or in a test: whole, or so many characters in a row that no other text has."""
    texts = {site.text for site in sites()}
    assert set(CASES) <= texts, "cases of texts that no error has"
    files = [p for p in Path(__file__).parent.rglob("test_*.py") if p.name != Path(__file__).name]
    strings = {
        node.value.replace("\\", "")
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    whole = "\0".join(sorted(strings))

    def windows(text):
        return {text[i : i + LONG_ENOUGH] for i in range(max(1, len(text) - LONG_ENOUGH + 1))}

    shared = Counter(window for text in texts for window in windows(text))

    def asserted(text):
        template = re.compile(pattern(text), re.DOTALL)
        return any(map(template.search, strings)) or any(
            window in whole and shared[window] == 1 for window in windows(text)
        )

    assert sorted(text for text in texts - set(CASES) if not asserted(text)) == []
