"""Published weights: exact round trips, transformers' own directories, float8, memory, errors."""

import dataclasses
import json
import os
import re

import optree
import pytest
import torch
from helpers import allocated_at_once
from parity import MODELS, TINY, V2, init, small, their_model, their_tensors, tokens
from safetensors.torch import load_file, save_file

from fmoe.models import huggingface
from fmoe.models.huggingface import INDEX, load, save
from fmoe.models.published_tensors import published_leaves


def identical(a, b):
    assert optree.tree_structure(a) == optree.tree_structure(b)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*map(optree.tree_leaves, (a, b))))


def from_pretrained(config, path):
    return type(their_model(config)).from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_changes_no_bit_and_transformers_reads_it(name, tmp_path):
    config = small(name)
    params = init(config)
    save(tmp_path, config, params)
    loaded, found = load(tmp_path)
    assert loaded == config
    assert identical(found, params)
    batch = tokens(config)
    expected = their_model(config, params)(batch).logits
    assert torch.equal(from_pretrained(config, tmp_path)(batch).logits, expected)


def test_low_precision_stays_as_it_is_and_biases_stay_float32(tmp_path):
    params = init(TINY, dtype=torch.bfloat16)
    save(tmp_path, TINY, params)
    assert identical(load(tmp_path)[1], params)
    theirs, ours = from_pretrained(TINY, tmp_path).state_dict(), their_tensors(params, TINY)
    assert theirs.keys() == ours.keys()
    for name, t in ours.items():  # transformers since 5.24 keeps routers in float32
        assert torch.equal(theirs[name].to(t.dtype), t), name


@pytest.mark.parametrize("apart", [True, False], ids=["experts apart", "experts fused"])
@pytest.mark.parametrize("name", ["no groups", "tied head", "V2-Lite in small: softmax, no groups"])
def test_transformers_directories_are_read(name, apart, tmp_path):
    config = small(name)
    params = init(config)
    their_model(config, params).save_pretrained(tmp_path, max_shard_size="10KB", save_original_format=apart)
    loaded, found = load(tmp_path)
    assert dataclasses.replace(loaded, init_std=config.init_std) == config
    assert identical(found, params)


def test_parameters_that_share_memory_are_written_each_by_itself(tmp_path):
    params = init(TINY)
    rows = torch.randn(TINY.vocab_size + 1, TINY.dim)
    bias, expert = torch.randn(TINY.num_experts), torch.randn(1, TINY.dim, TINY.moe_hidden_dim)

    def shared(layer):
        router, experts = layer.mlp.router._replace(bias_E=bias), layer.mlp.experts
        experts = experts._replace(w_out=expert.expand_as(experts.w_out))
        return layer._replace(mlp=layer.mlp._replace(router=router, experts=experts), mlp_norm=params.norm)

    params = params._replace(layers=(params.layers[0], *map(shared, params.layers[1:])))
    for kind, head in (("one tensor", rows[:-1]), ("overlapping", rows[1:])):
        given = params._replace(embedding=rows[:-1], head=head)
        save(tmp_path / kind, TINY, given)
        assert identical(load(tmp_path / kind)[1], given)


def test_options_and_what_is_passed_over(tmp_path):
    params = init(TINY)
    save(tmp_path, TINY, params)
    extra = {
        "model.layers.3.eh_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    add(tmp_path, extra)
    edit(tmp_path / "config.json", num_nextn_predict_layers=1)
    found = load(tmp_path, dtype=torch.float16, device="cpu")[1]
    half = optree.tree_map(torch.Tensor.half, params)
    for layer, given in zip(found.layers[1:], params.layers[1:]):
        assert torch.equal(layer.mlp.router.bias_E, given.mlp.router.bias_E)
    assert torch.equal(found.layers[2].mlp.experts.w_in, half.layers[2].mlp.experts.w_in)
    assert {leaf.dtype for leaf in optree.tree_leaves(found)} == {torch.float16, torch.float32}


def test_shards_are_as_large_as_they_may_be(tmp_path):
    save(tmp_path / "new" / "folder", TINY, init(TINY), max_shard_bytes=5000)
    path = tmp_path / "new" / "folder"
    index = json.loads((path / INDEX).read_text())
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    held = [load_file(path / file) for file in files]
    assert {name: files[i] for i, shard in enumerate(held) for name in shard} == index["weight_map"]
    sizes = [sum(t.nbytes for t in shard.values()) for shard in held]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= 5000
    assert len(files) > 10
    for size, following in zip(sizes, held[1:]):
        assert size + next(iter(following.values())).nbytes > 5000 or size > 2500


def test_there_is_never_a_second_copy_of_the_model(tmp_path):
    params = init(TINY)
    leaves = optree.tree_leaves(params)
    model, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
    assert largest < model / 5
    assert allocated_at_once(lambda: save(tmp_path, TINY, params, max_shard_bytes=20000))[0] <= largest
    mapped = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    for dtype in (None, torch.float64):
        most, (_, kept) = allocated_at_once(lambda dtype=dtype: load(tmp_path, dtype=dtype))
        held = sum(leaf.nbytes for leaf in optree.tree_leaves(kept))
        assert held <= most <= mapped + held + largest


def quantise(weight, block, powers):
    """Float8 and its scales, block by block, and what they stand for."""
    rows, columns = (-(-size // n) for size, n in zip(weight.shape, block))
    low, scale, stands = torch.empty_like(weight), torch.empty(rows, columns), torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            at = tuple(slice(k * n, (k + 1) * n) for k, n in zip((i, j), block))
            scale[i, j] = weight[at].abs().max() / 448
            if powers:
                scale[i, j] = 2.0 ** scale[i, j].log2().ceil()
            low[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn).float()
            stands[at] = low[at] * scale[i, j]
    return low.to(torch.float8_e4m3fn), scale, stands


def exponents(scale):
    return (scale.log2() + 127).to(torch.uint8)


FORMS = {
    "numbers": ({}, lambda scale: scale),
    "numbers that are powers": ({"scale_fmt": "ue8m0"}, lambda scale: scale),
    "exponents": ({}, lambda scale: exponents(scale).view(torch.float8_e8m0fnu)),
    "bytes": ({"scale_fmt": "ue8m0"}, exponents),
}


@pytest.mark.parametrize("form", FORMS)
def test_float8_is_multiplied_out(tmp_path, form):
    config = small("V3 in small: query bottleneck, groups, YaRN, one shared expert")
    save(tmp_path / "plain", config, init(config))
    tensors = load_file(next((tmp_path / "plain").glob("*.safetensors")))
    (options, encoded), low, stands = FORMS[form], {}, {}
    for name, tensor in tensors.items():
        if re.search(r"_proj(_with_mqa)?\.weight$", name):
            low[name], scale, stands[name] = quantise(tensor, (8, 5), powers=form != "numbers")
            low[name + "_scale_inv"] = encoded(scale)
        else:
            low[name] = stands[name] = tensor.bfloat16() if tensor.dim() == 2 else tensor
    assert len(low) > 1.5 * len(stands)
    for folder, content in (("low", low), ("stands", stands)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((tmp_path / "plain" / "config.json").read_text())
        (tmp_path / folder / "config.json").write_text(json.dumps(raw))
    edit(
        tmp_path / "low" / "config.json",
        quantization_config={"quant_method": "fp8", "weight_block_size": [8, 5], **options},
    )
    low, stands = tmp_path / "low", tmp_path / "stands"
    (_, found), (_, wanted) = load(low), load(stands)
    assert found.embedding.dtype == torch.bfloat16
    assert identical(found, wanted)
    assert identical(load(low, dtype=torch.float32)[1], load(stands, dtype=torch.float32)[1])


def test_a_tied_model_may_store_its_head_too(tmp_path):
    config = small("tied head")
    params = init(config)
    save(tmp_path, config, params)
    add(tmp_path, {"lm_head.weight": params.embedding})
    assert identical(load(tmp_path)[1], params)
    head = params.embedding.clone()
    head[-1, -1] += 0.5
    add(tmp_path, {"lm_head.weight": head})
    text = (
        f"huggingface.load: path: got {tmp_path}, whose lm_head.weight differs from its "
        "model.embed_tokens.weight, expected equal ones, as its config.json has tie_word_embeddings. Set"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        load(tmp_path)
    add(tmp_path, {"lm_head.weight": head[1:]})
    with pytest.raises(ValueError, match=r"of a wrong shape: lm_head.weight \(39, 24\), not \(40, 24\)"):
        load(tmp_path)


def test_a_tied_embedding_is_written_from_where_it_is(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(huggingface, "save_file", lambda tensors, *_, **__: written.update(tensors))
    params = init(config := small("tied head"))
    save(tmp_path, config, params)
    assert written["model.embed_tokens.weight"].data_ptr() == params.embedding.data_ptr()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers does
@pytest.mark.parametrize("apart", [True, False], ids=["experts apart", "experts fused"])
def test_absent_shared_experts_may_be_stored_as_empty_tensors(tmp_path, apart):
    theirs = their_model(TINY)
    theirs.config.n_shared_experts = 0
    theirs = type(theirs)(theirs.config)
    theirs.save_pretrained(tmp_path, save_original_format=apart)
    held = load_file(next(tmp_path.glob("*.safetensors")))
    assert held["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (0, 24)
    config, params = load(tmp_path)
    assert config.num_shared_experts == 0
    leaves = published_leaves(config, fused=not apart, model_type="deepseek_v3")
    for leaf, value in zip(leaves, optree.tree_leaves(params), strict=True):
        for part in leaf.parts:
            assert torch.equal(value[part.at].reshape(part.shape), held.pop(part.name))
    assert all(tensor.numel() == 0 for tensor in held.values())


# ---- errors --------------------------------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(path, tensors):
    """Put tensors, or take them out with ``None``, in a directory of one shard."""
    file = next(path.glob("*.safetensors"))
    content = {name: t for name, t in (load_file(file) | tensors).items() if t is not None}
    save_file(content, file, metadata={"format": "pt"})


def test_every_wrong_tensor_is_listed(tmp_path):
    save(tmp_path, TINY, init(TINY))
    expert = "model.layers.2.mlp.experts.7."
    add(
        tmp_path,
        {
            "lm_head.weight": None,
            expert + "up_proj.weight": None,
            expert + "down_proj.weight": torch.ones(24, 13),
            "model.norm.bias": torch.ones(24),
            "model.layers.3.input_layernorm.weight": torch.ones(24),
            "model.layers.0.mlp.up_proj.weight": torch.ones(20, 24).to(torch.float8_e4m3fn),
        },
    )
    with pytest.raises(ValueError, match=r"huggingface\.load") as raised:
        load(tmp_path)
    assert str(raised.value) == (
        f"huggingface.load: path: got {tmp_path} with tensors missing: {expert}up_proj.weight, "
        "lm_head.weight, model.layers.0.mlp.up_proj.weight_scale_inv; "
        "unexpected: model.layers.3.input_layernorm.weight, model.norm.bias; "
        f"of a wrong shape: {expert}down_proj.weight (24, 13), not (24, 12), "
        "expected the tensors its config.json implies."
    )


@pytest.mark.parametrize(
    ("weight", "scale", "options", "text"),
    [
        (torch.int8, None, {}, "{} I8, not floating-point numbers"),
        (torch.uint8, None, {}, "{} U8, not floating-point numbers"),
        (torch.int32, None, {}, "{} I32, not floating-point numbers"),
        (torch.bool, None, {}, "{} BOOL, not floating-point numbers"),
        (torch.float8_e8m0fnu, torch.float32, {}, "{} F8_E8M0, not floating-point numbers"),
        (torch.int8, torch.float32, {}, "{} I8, not floating-point numbers"),
        (torch.bfloat16, torch.float32, {}, "{} BF16, not float8, beside a {}_scale_inv"),
        (torch.float32, torch.uint8, {"scale_fmt": "ue8m0"}, "{} F32, not float8, beside a {}_scale_inv"),
        (torch.float8_e4m3fn, torch.uint8, {}, "{}_scale_inv U8 without a scale_fmt of 'ue8m0'"),
        (torch.float8_e4m3fn, torch.uint8, {"scale_fmt": "float"}, "{}_scale_inv U8 without a scale_fmt"),
        (
            torch.float8_e5m2,
            torch.int8,
            {"scale_fmt": "ue8m0"},
            "{}_scale_inv I8, not floating-point numbers",
        ),
        (torch.float8_e5m2, torch.float8_e4m3fn, {}, "{}_scale_inv F8_E4M3, not floating-point numbers or"),
    ],
)
def test_dtypes_without_a_meaning_are_refused(tmp_path, weight, scale, options, text):
    save(tmp_path, TINY, init(TINY))
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    scales = {} if scale is None else {name + "_scale_inv": torch.ones(1, 1).to(scale)}
    add(tmp_path, {name: torch.ones(12, 24).to(weight), **scales})
    edit(tmp_path / "config.json", quantization_config=options)
    with pytest.raises(ValueError, match="of a wrong dtype: " + re.escape(text.format(name, name))):
        load(tmp_path)


def test_parameters_are_floating_point_numbers(tmp_path):
    params = init(TINY)
    with pytest.raises(ValueError, match=r"huggingface.save: params: got parameters of torch.int8"):
        save(tmp_path, TINY, optree.tree_map(lambda leaf: leaf.to(torch.int8), params))
    save(tmp_path, TINY, params)
    with pytest.raises(ValueError, match=r"huggingface.load: dtype: got torch.int8, expected bfloat16, "):
        load(tmp_path, dtype=torch.int8)


def test_a_name_on_the_hub_is_no_directory():
    with pytest.raises(ValueError, match=r"got Qwen/Qwen3-30B-A3B, which is no directory .* hf download "):
        load("Qwen/Qwen3-30B-A3B")


def test_pickled_and_incomplete_directories_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"without config.json, model.safetensors, expected .* Complete the download"
    ):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"never read")
    with pytest.raises(
        ValueError,
        match=r"without model.safetensors, but with pytorch_model-00001-of-00001.bin, .* are not read",
    ):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save(tmp_path, TINY, init(TINY), max_shard_bytes=20000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"without {gone.name}, expected"):
        load(tmp_path)


def unreadable(damage, tmp_path, file):
    save(tmp_path, TINY, init(TINY), max_shard_bytes=20000)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=r"expected a file as published\. Download it again") as raised:
        load(tmp_path)
    prefix = f"huggingface.load: {tmp_path / file}: got "
    assert str(raised.value).startswith(prefix)
    return str(raised.value).removeprefix(prefix)


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard_is_named(tmp_path, left):
    shard = "model-00002-of-00006.safetensors"
    text = unreadable(lambda file: os.truncate(file, int(left * file.stat().st_size)), tmp_path, shard)
    assert "header" in text


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        (INDEX, "[]", "list, not an object"),
        (INDEX, "{", "Expecting property name"),
        (INDEX, "{}", "no weight_map"),
        (INDEX, '{"weight_map": [1]}', "no weight_map"),
        (INDEX, '{"weight_map": {"a": 1, "b": "../x"}}', "a weight_map to '../x', 1, not to files beside it"),
        ("config.json", "3", "int, not an object"),
        ("config.json", "", "Expecting value"),
    ],
)
def test_odd_json_is_named(tmp_path, file, content, text):
    assert unreadable(lambda path: path.write_text(content), tmp_path, file).startswith(text)


def test_the_index_decides_between_two_files(tmp_path):
    params = init(TINY)
    save(tmp_path, TINY, params, max_shard_bytes=20000)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for file in set(index.values()) - {index[name]}:
            save_file(load_file(tmp_path / file) | {name: torch.zeros(40, 24)}, tmp_path / file)
    assert identical(load(tmp_path)[1], params)


def test_parameters_that_do_not_belong_are_listed(tmp_path):
    params = init(TINY)
    layer = params.layers[0]._replace(mlp_norm=torch.ones(23), attention_norm=torch.ones(24).half())
    wrong = params._replace(head=(), layers=(layer, *params.layers[1:]))
    text = (
        "huggingface.save: params: got layers.0.attention_norm (24,) torch.float16, not (24,) torch.float32; "
        "layers.0.mlp_norm (23,) torch.float32, not (24,) torch.float32; head missing, expected"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        save(tmp_path, TINY, wrong)
    with pytest.raises(ValueError, match="got head unexpected"):
        save(tmp_path, dataclasses.replace(TINY, tied_head=True), params)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.router.bias_E not zero, which has no place in its family"
    ):
        save(tmp_path, dataclasses.replace(TINY, router=V2), params)
    assert not list(tmp_path.iterdir())


def test_weights_are_not_written_over(tmp_path):
    save(tmp_path, TINY, init(TINY))
    with pytest.raises(ValueError, match="which holds safetensors, expected a directory without"):
        save(tmp_path, TINY, init(TINY))


def test_without_safetensors_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("fmoe.models.huggingface.INSTALLED", False)
    for call in (lambda: load("nowhere"), lambda: save("nowhere", TINY, init(TINY))):
        with pytest.raises(ImportError, match=re.escape("pip install safetensors numpy")):
            call()
