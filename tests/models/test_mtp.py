"""Multi-token prediction: equal to a reference, published and read back, and the same on every mesh."""

import dataclasses
import functools
import json
import re

import optree
import parity
import pytest
import torch
import torch.nn.functional as F
from devices import bare_mesh
from helpers import dot, error, fresh_seed, quick
from laws import MODELS, own, ranks_of, whole
from parity import TINY, small, their_model, their_tensors
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

import fmoe
from fmoe import random
from fmoe.models import decoder
from fmoe.models.gqa import GQA
from fmoe.models.huggingface import load, save
from fmoe.models.rotary import Rotary
from fmoe.models.stages import cut
from fmoe.ops.core.axes import group_of
from fmoe.ops.segments import segments_of, shortened
from fmoe.parallel.placement import token_axes
from fmoe.plan import plan
from fmoe.training import gradients, optim
from fmoe.transforms import per_layer
from fmoe.tree import dotted_names

PUBLISHED = dataclasses.replace(small("no groups"), mtp_layers=1, norm_eps=1e-5)
TWO = dataclasses.replace(PUBLISHED, mtp_layers=2)
GLM = dataclasses.replace(
    PUBLISHED,
    attention=GQA(num_heads=4, num_kv_heads=2, head_dim=8, bias="qkv", rope=Rotary(4)),
    num_shared_experts=1,
)
FAMILIES = {
    "DeepSeek-V3": PUBLISHED,
    "a tied head": dataclasses.replace(PUBLISHED, tied_head=True),
    "GLM-4.5": GLM,
}
CONFIG = dataclasses.replace(MODELS["MLA"], mtp_layers=2)
LOSS = functools.partial(decoder.loss, mtp_weight=0.7)


# ---- the reference ---------------------------------------------------------------------------------


OWN = {
    "enorm": "embedding_norm",
    "hnorm": "hidden_norm",
    "eh_proj": "proj",
    "shared_head.norm": "norm",
}


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def reference(config, params, tokens, targets, weight):
    """The loss and all gradients by published names: transformers' layers, the rest from the paper's text."""
    inner = [module.layer for module in params.mtp]
    deep = dataclasses.replace(config, num_layers=config.num_layers + len(inner), mtp_layers=0)
    model = their_model(deep, params._replace(layers=params.layers + tuple(inner), mtp=()))
    layers, eps = model.model.layers, config.norm_eps
    model.model.layers = layers[: config.num_layers]
    x = model.model(tokens).last_hidden_state
    logits = x @ model.lm_head.weight.T
    value = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    named = {}
    for k, module in enumerate(params.mtp, 1):
        place = f"model.layers.{config.num_layers + k - 1}."
        own = {name: getattr(module, ours).clone().requires_grad_() for name, ours in OWN.items()}
        named |= {f"{place}{name}.weight": tensor for name, tensor in own.items()}
        length = tokens.shape[1] - k
        e = F.embedding(tokens[:, k:], model.model.embed_tokens.weight)
        both = torch.cat([norm(e, own["enorm"], eps), norm(x[:, :length], own["hnorm"], eps)], -1)
        y, position = both @ own["eh_proj"].T, torch.arange(length)[None]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        angles = model.model.rotary_emb(y, position)
        y = layers[config.num_layers + k - 1](
            y, attention_mask=mask, position_ids=position, position_embeddings=angles
        )
        x = norm(y[0] if isinstance(y, tuple) else y, own["shared_head.norm"], eps)
        summed = F.cross_entropy(
            (x @ model.lm_head.weight.T).flatten(0, 1), targets[:, k:].flatten(), reduction="sum"
        )
        value = value + weight / len(params.mtp) * summed / (targets != -100).sum()
    model.model.layers = layers
    value.backward()
    named |= dict(model.named_parameters())
    return value.detach(), {name: tensor.grad for name, tensor in named.items()}


def clear(config, params):
    """Selection biases so far apart that no rounding can change a choice."""

    def move(name, leaf):
        return 3 * 2.0 ** torch.randperm(len(leaf)) if name.endswith("bias_E") else leaf

    names = optree.tree_unflatten(optree.tree_structure(params), dotted_names(params))
    return optree.tree_map(move, names, params)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("modules", [1, 2])
def test_the_loss_and_gradients_are_the_references(modules, family):
    config = dataclasses.replace(FAMILIES[family], mtp_layers=modules)
    params = clear(config, parity.init(config, fresh_seed()))
    tokens, targets = torch.randint(config.vocab_size, (2, 3, 11))
    targets[0, 4:6], targets[2, 3:] = -100, -100
    expected, wanted = reference(config, params, tokens, targets, 0.7)
    (value, stats), grads = fmoe.value_and_grad(LOSS, has_aux=True)(params, tokens, targets, config)
    assert abs(value - expected) < 1e-5
    assert stats.mtp > 0
    plain, without = decoder.loss(params, tokens, targets, config)
    assert error(value - stats.mtp, plain) < 1e-6
    assert without.mtp == 0
    assert without.mtp_layers == ()
    found = their_tensors(grads, config)
    biases = {name for name in found if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2 + modules
    assert set(found) - biases == set(wanted)
    for name, g in wanted.items():
        assert g.norm() > 0
        assert (found[name] - g).norm() <= 1e-3 * g.norm(), name


def test_without_its_loss_nothing_changes():
    seed = fresh_seed()
    params, plain = (decoder.init(config, seed) for config in (TWO, dataclasses.replace(TWO, mtp_layers=0)))
    assert identical(params._replace(mtp=()), plain)
    batch = torch.randint(TWO.vocab_size, (2, 2, 9))
    step = fmoe.value_and_grad(decoder.loss, has_aux=True)
    (value, _), grads = step(params, *batch, TWO)
    (expected, _), wanted = step(plain, *batch, dataclasses.replace(TWO, mtp_layers=0))
    assert torch.equal(value, expected)
    assert all(map(torch.equal, optree.tree_leaves(grads._replace(mtp=())), optree.tree_leaves(wanted)))
    assert not any(leaf.any() for leaf in optree.tree_leaves(grads.mtp))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_rows_have_fewer_further_tokens(length):
    params = decoder.init(TWO, fresh_seed())
    batch = torch.randint(TWO.vocab_size, (2, 2, length))
    (value, stats), grads = fmoe.value_and_grad(LOSS, has_aux=True)(params, *batch, TWO)
    assert value.isfinite()
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(grads))
    loads = [layer.tokens_per_expert.sum() for layer in stats.mtp_layers]
    assert loads == [2 * max(length - k, 0) * TWO.router.top_k for k in (1, 2)]


def test_segments_are_as_they_are_alone():
    params = decoder.init(CONFIG, fresh_seed(), dtype=torch.float64)
    ids = torch.tensor([[4] * 5 + [7] * 4 + [4] * 1 + [0] * 2, [1] * 2 + [2] * 10])
    tokens, targets = torch.randint(CONFIG.vocab_size, (2, 2, 12))
    (value, stats), grads = fmoe.value_and_grad(LOSS, has_aux=True)(
        params, tokens, targets, CONFIG, segment_ids=ids
    )
    cuts = [(0, 0, 5), (0, 5, 9), (0, 9, 10), (1, 0, 2), (1, 2, 12)]

    def apart(params):
        rows = [(tokens[r, None, a:b], targets[r, None, a:b]) for r, a, b in cuts]
        return sum(LOSS(params, *row, CONFIG)[0] * row[0].numel() for row in rows) / 22

    expected, wanted = fmoe.value_and_grad(apart)(params)
    assert error((value, grads), (expected, wanted)) < 1e-12
    loads = [layer.tokens_per_expert.sum() for layer in stats.mtp_layers]
    assert loads == [3 * n for n in (4 + 3 + 1 + 9, 3 + 2 + 8)]


def test_shortened_segments_are_those_of_shortened_rows():
    ids = torch.randint(3, (4, 9)).sort(1).values
    for by in (1, 3, 12):
        first, offsets, valid = shortened(segments_of(ids), by)
        short = max(9 - by, 0)
        runs = torch.tensor([[f + i * short for f in row] for i, row in enumerate(first.tolist())])
        assert {*runs.flatten().tolist(), 4 * short} == {*offsets.tolist()}
        assert torch.equal(valid, (ids[:, :short] > 0) & (ids[:, :short] == ids[:, 9 - short :]))


def test_biases_of_the_modules_move_only_with_their_loss():
    params = decoder.init(TWO, 0)
    batch = torch.randint(TWO.vocab_size, (2, 2, 16))
    _, stats = LOSS(params, *batch, TWO)
    moved = decoder.update_biases(params, stats, 0.01)
    for module, counted in zip(moved.mtp, stats.mtp_layers, strict=True):
        load = counted.tokens_per_expert.float()
        assert torch.equal(module.layer.mlp.router.bias_E, 0.01 * (load.mean() - load).sign())
    for i, counted in enumerate(stats.layers, 1):
        load = counted.tokens_per_expert.float()
        assert torch.equal(moved.layers[i].mlp.router.bias_E, 0.01 * (load.mean() - load).sign())
    still = decoder.update_biases(params, decoder.loss(params, *batch, TWO)[1], 0.01)
    assert not any(module.layer.mlp.router.bias_E.any() for module in still.mtp)


def test_remat_noise_micro_batches_and_a_balance_loss():
    config = dataclasses.replace(
        CONFIG, balance_loss=0.3, router=dataclasses.replace(CONFIG.router, noise=0.2)
    )
    params, key = decoder.init(config, fresh_seed(), dtype=torch.float64), random.key(fresh_seed())
    batch = torch.randint(config.vocab_size, (2, 6, 9))
    batch[1, 0, 2:] = -100
    whole_batch = gradients.of_model(config, mtp_weight=0.7)(params, *batch, key=key)
    for how in (
        dict(micro_batches=3),
        dict(per_layer=per_layer("full")),
        dict(per_layer=per_layer("default")),
    ):
        found = gradients.of_model(config, mtp_weight=0.7, **how)(params, *batch, key=key)
        assert error((found[0][0], found[1]), (whole_batch[0][0], whole_batch[1])) < 1e-12
    quiet = LOSS(params, *batch, dataclasses.replace(config, router=CONFIG.router))[0]
    assert error(quiet, whole_batch[0][0]) > 1e-6


def test_derivatives_are_those_of_every_transform():
    params = decoder.init(CONFIG, fresh_seed(), dtype=torch.float64)
    batch = torch.randint(CONFIG.vocab_size, (2, 3, 1, 9))
    loss = lambda p, *batch: LOSS(p, *batch, CONFIG)[0]  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, *batch)
    wanted = fmoe.value_and_grad(loss)(params, *batch.flatten(1, 2))[1]
    assert error(optree.tree_map(lambda g: g.mean(0), each), wanted) < 1e-12
    tangents = optree.tree_map(torch.randn_like, params)
    along = lambda p: loss(p, *batch.flatten(1, 2))  # noqa: E731
    assert error(torch.func.jvp(along, (params,), (tangents,))[1], dot(wanted, tangents)) < 1e-12


@pytest.mark.slow
def test_compiled_layers_serve_the_modules_too():
    params = decoder.init(CONFIG, fresh_seed(), dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = lambda layer: torch.compile(fmoe.remat(layer), fullgraph=True, backend=counter)  # noqa: E731
    step = fmoe.value_and_grad(LOSS, has_aux=True)
    for _ in range(2):
        batch = torch.randint(CONFIG.vocab_size, (2, 4, 9))
        found = step(params, *batch, CONFIG, per_layer=compiled)
        assert error(found[1], step(params, *batch, CONFIG)[1]) < 1e-12
    assert counter.frame_count == 3, "a dense layer, one with experts, and one for any shorter rows"


def test_sizes_and_costs():
    with_module, plain = (decoder.preset("671B", mtp_layers=n) for n in (1, 0))
    unique = (decoder.num_params(with_module)[0] - decoder.num_params(plain)[0]) / 1e9
    assert abs(unique - 11.5) < 0.15, "as published"
    more = decoder.flops_per_token(with_module, 4096) - decoder.flops_per_token(plain, 4096)
    layer = decoder.flops_per_token(plain, 4096) - decoder.flops_per_token(
        dataclasses.replace(plain, num_layers=60), 4096
    )
    assert more == pytest.approx(layer + 6 * 7168 * (2 * 7168 + plain.vocab_size))
    assert cut(with_module, range(8)).layers[-1][0] > cut(plain, range(8)).layers[-1][0]
    small_ones = (decoder.preset("debug", mtp_layers=n) for n in (1, 0))
    one, none = (plan(c, batch_size=2, seq_len=32, device_type="cpu").ranks[0] for c in small_ones)
    assert sum(one.activations.values()) > sum(none.activations.values())
    sizes = [4 * decoder.num_params(decoder.preset("debug", mtp_layers=n))[0] for n in (1, 0)]
    assert [one.parameters, none.parameters] == sizes
    staged = plan(decoder.preset("debug", mtp_layers=1), "pp=2", batch_size=2, seq_len=32, device_type="cpu")
    embedding = 4 * 256 * 128  # on both ranks
    assert sum(rank.parameters for rank in staged.ranks) == sizes[0] + embedding


@pytest.mark.parametrize(
    ("weight", "config", "message"),
    [
        (
            0.3,
            TINY,
            "got 0.3 for a model of mtp_layers=0, expected 0. Give the config mtp_layers",
        ),
        (-0.1, TWO, "got -0.1, expected a finite number of at least 0"),
        (float("nan"), TWO, "got nan, expected a finite number"),
    ],
)
def test_weights_that_are_refused(weight, config, message):
    params, batch = decoder.init(config, 0), torch.randint(config.vocab_size, (2, 2, 5))
    with pytest.raises(ValueError, match=re.escape(f"loss: mtp_weight: {message}")):
        decoder.loss(params, *batch, config, mtp_weight=weight)
    expected = "DecoderConfig: mtp_layers: got -1, expected an integer of at least 0"
    with pytest.raises(ValueError, match=expected):
        dataclasses.replace(TWO, mtp_layers=-1)


# ---- published weights -----------------------------------------------------------------------------

# The tensors of DeepSeek-V3's layer 61, but for those of its decoder layer.
NAMES = ["embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"]


def tensors_in(path):
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def edit(path, **fields):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | fields))


def published_by_hand(path, config, params):
    """A directory as published: the main model saved, and the further layer's tensors written by name."""
    save(path, dataclasses.replace(config, mtp_layers=0), params._replace(mtp=()))
    (module,), layer = params.mtp, config.num_layers
    as_last = {
        name.replace(f"layers.{layer - 1}.", f"layers.{layer}."): tensor
        for name, tensor in last_layer(path, config, params, module.layer).items()
    }
    own = [params.embedding, module.embedding_norm, module.hidden_norm, module.proj, module.norm]
    own.append(params.embedding if config.tied_head else params.head)
    further = {f"model.layers.{layer}.{name}.weight": tensor.clone() for name, tensor in zip(NAMES, own)}
    save_file(tensors_in(path) | as_last | further, path / "model.safetensors")
    for file in [*path.glob("model-*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    edit(path, num_nextn_predict_layers=1)


def last_layer(path, config, params, layer):
    config = dataclasses.replace(config, mtp_layers=0)
    save(path / "beside", config, params._replace(layers=(*params.layers[:-1], layer), mtp=()))
    mark = f"model.layers.{config.num_layers - 1}."
    return {name: tensor for name, tensor in tensors_in(path / "beside").items() if name.startswith(mark)}


def identical(a, b):
    same = [x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*map(optree.tree_leaves, (a, b)))]
    return optree.tree_structure(a) == optree.tree_structure(b) and all(same)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_tensors_are_loaded_and_saved(family, tmp_path):
    config = FAMILIES[family]
    params = parity.init(config, fresh_seed(), dtype=torch.bfloat16)
    published_by_hand(tmp_path / "theirs", config, params)
    found, loaded = load(tmp_path / "theirs", mtp=True)
    assert found == config
    assert identical(loaded, params)
    without, plain = load(tmp_path / "theirs")
    assert without == dataclasses.replace(config, mtp_layers=0)
    assert identical(plain, params._replace(mtp=()))
    save(tmp_path / "ours", config, params, max_shard_bytes=20000)
    theirs, ours = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_copies_may_be_absent_but_not_different(tmp_path):
    params = parity.init(PUBLISHED, fresh_seed())
    save(tmp_path, PUBLISHED, params)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    for name, of in {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}.items():
        copy = f"model.layers.{PUBLISHED.num_layers}.{name}.weight"
        save_file(tensors | {copy: tensors[copy] + 1}, file)
        expected = (
            f"whose {copy} differs from its {of}.weight, expected equal ones, as modules of multi-token"
        )
        with pytest.raises(ValueError, match=re.escape(expected)):
            load(tmp_path, mtp=True)
        load(tmp_path)
        tensors.pop(copy)
        save_file(tensors, file)
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
        file = file.rename(tmp_path / "model.safetensors")
        assert identical(load(tmp_path, mtp=True)[1], params)
    tensors.pop(gone := f"model.layers.{PUBLISHED.num_layers}.eh_proj.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=re.escape(f"missing: {gone}")):
        load(tmp_path, mtp=True)


def test_models_without_such_layers_are_refused(tmp_path):
    save(tmp_path / "V3", TINY, decoder.init(TINY, 0))
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0, not at least 1 for mtp=True"):
        load(tmp_path / "V3", mtp=True)
    qwen = decoder.preset("30B-A3B", layers=2, mtp_layers=1)
    with pytest.raises(ValueError, match="mtp_layers=1, not 0"):
        save(tmp_path / "Qwen", qwen, decoder.init(qwen, 0, device="meta"), model_type="qwen3_moe")


# ---- on meshes -------------------------------------------------------------------------------------


def spread(axes, tied, seed):
    mesh, found = bare_mesh(axes), {}
    config = dataclasses.replace(CONFIG, tied_head=tied, balance_loss=0.2)
    rows = 4 * group_of(mesh, token_axes(mesh)).size
    drawn = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(32, (2, rows, 9), generator=drawn)
    targets[0, 2:] = -100
    ids = torch.tensor([[1] * 9, [1] * 4 + [2] * 5, [7] * 6 + [0] * 3, [2] * 9]).repeat(rows // 4, 1)
    alone = gradients.of_model(config, mtp_weight=0.7)
    params = decoder.init(config, seed, dtype=torch.float64)
    there = decoder.init(config, seed, dtype=torch.float64, mesh=mesh)
    for kind, given in {"plain": {}, "segments": {"segment_ids": ids}}.items():
        (value, stats), want = alone(params, tokens, targets, **given)
        for zero, parts in ((3, 1), (1, 2), (2, 2)):
            step = gradients.of_model(config, mesh, zero=zero, micro_batches=parts, mtp_weight=0.7)
            mine = [own(t, mesh) for t in (tokens, targets)]
            (got, counted), grads = step(there, *mine, **{name: own(t, mesh) for name, t in given.items()})
            loads = [[layer.tokens_per_expert for layer in s.mtp_layers] for s in (counted, stats)]
            assert all(map(torch.equal, *loads))
            found[f"{kind}, zero {zero}"] = error((got, counted.mtp, whole(grads)), (value, stats.mtp, want))
    return found


@pytest.mark.parametrize(
    ("axes", "tied"),
    quick(
        [("ep=2", False), ("tp=2", True)],
        [
            (axes, tied)
            for axes in ("dp=2", "ep=2", "tp=2", "dp=2,ep=2", "tp=2,ep=2")
            for tied in (False, True)
        ],
    ),
)
def test_it_is_the_same_on_every_mesh(pool, axes, tied):
    for found in pool.run(ranks_of(axes), spread, axes, tied, fresh_seed()):
        assert max(found.values()) < 1e-9, found


def gathered(tree, mesh):
    found = [None] * mesh["pp"].size()
    tree = dict(zip(dotted_names(tree), optree.tree_leaves(whole(tree))))
    torch.distributed.all_gather_object(found, tree, group=mesh.get_group("pp"))
    merged = {}
    for name, tensor in (item for of_rank in found for item in of_rank.items()):
        assert name not in merged or torch.equal(merged[name], tensor), name
        merged[name] = tensor
    return merged


def in_stages(axes, schedule, zero, seed):
    mesh = bare_mesh(axes if "," in axes else f"{axes},dp=1")
    config = dataclasses.replace(CONFIG, num_layers=5, balance_loss=0.2)
    rows = 4 * group_of(mesh, token_axes(mesh)).size
    tokens, targets = torch.randint(32, (2, rows, 9), generator=torch.Generator().manual_seed(seed))
    targets[0, 2:] = -100
    part = group_of(mesh, token_axes(mesh))
    mine = [t.chunk(part.size)[part.position] for t in (tokens, targets)]
    how = dict(micro_batches=3, schedule=schedule, mtp_weight=0.7)
    made = fmoe.pipeline.make_schedule(schedule, pp=mesh["pp"].size(), micro_batches=3)
    stages = cut(config, made.stage_to_rank)
    params = decoder.init(config, seed, dtype=torch.float64, mesh=mesh, stages=stages)
    (value, stats), grads = gradients.of_model(config, mesh, zero=zero, stages=stages, **how)(params, *mine)
    alone = decoder.init(config, seed, dtype=torch.float64)
    (expected, wanted_stats), wanted = fmoe.value_and_grad(LOSS, has_aux=True)(alone, tokens, targets, config)
    named = dict(zip(dotted_names(wanted), optree.tree_leaves(wanted)))
    found = gathered(grads, mesh)
    assert found.keys() == named.keys()
    for ours, theirs in ((stats.layers, wanted_stats.layers), (stats.mtp_layers, wanted_stats.mtp_layers)):
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a.tokens_per_expert, b.tokens_per_expert) for a, b in zip(ours, theirs))
    norm = error(optim.global_norm(grads, mesh), optim.global_norm(wanted))
    assert norm < 1e-6  # float32
    evaluated, _ = gradients.loss_of_model(config, mesh, stages=stages, **how)(params, *mine)
    moved = decoder.update_biases(params, stats, 0.01)
    assert len(moved.mtp) == len(params.mtp)
    parts = {name: error(found[name], named[name]) for name in named}
    return (
        parts
        | {"loss": error(value, expected), "mtp": error(stats.mtp, wanted_stats.mtp)}
        | {"evaluated": error(evaluated, expected)}
    )


@pytest.mark.parametrize(
    ("axes", "schedule", "zero"),
    quick(
        [("pp=2", "1f1b", 3), ("pp=2", "zbv", 2)],
        [
            (axes, schedule, zero)
            for axes in ("pp=2", "pp=2,dp=2", "pp=2,ep=2", "pp=2,tp=2")
            for schedule in ("1f1b", "interleaved", "zero_bubble", "zbv")
            for zero in (1, 2, 3)
        ],
    ),
)
def test_pipelines_have_the_same_gradients(pool, axes, schedule, zero):
    for found in pool.run(ranks_of(axes), in_stages, axes, schedule, zero, fresh_seed()):
        assert max(found.values()) < 1e-9, {name: e for name, e in found.items() if e > 1e-9}


def loaded_on(axes, path, seed):
    mesh = bare_mesh(f"{axes},dp=1" if "pp" in axes else axes)
    config, params = load(path, mesh=mesh, mtp=True)
    alone = load(path, mtp=True)[1]
    mine, theirs = (dict(zip(dotted_names(t), optree.tree_leaves(whole(t)))) for t in (params, alone))
    if "pp" in axes:
        assert ("mtp.0.proj" in mine) == (mesh.get_local_rank("pp") == 1)
        return all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    save(path + "-again", config, params)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("axes", ["dp=2", "pp=2"])
def test_meshes_load_and_save_it(pool, axes, tmp_path):
    config = dataclasses.replace(CONFIG, mtp_layers=1)
    params = decoder.init(config, fresh_seed())
    save(tmp_path / "one", config, params)
    assert all(pool.run(2, loaded_on, axes, str(tmp_path / "one"), 0))
    if "pp" not in axes:
        assert identical(load(tmp_path / "one-again", mtp=True)[1], params)
