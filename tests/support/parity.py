"""transformers' models of fmoe's configurations, and fmoe's parameters by their names."""

import dataclasses

import optree
import torch
from helpers import change

import fmoe
from fmoe.models import deepseek_v3
from fmoe.models.published import export_config
from fmoe.models.published_tensors import published_leaves
from fmoe.models.rotary import Yarn

TINY = change(
    deepseek_v3.preset("debug"),
    vocab_size=40,
    dim=24,
    num_layers=3,
    hidden_dim=20,
    num_heads=2,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    moe_hidden_dim=12,
    num_experts=8,
    num_shared_experts=2,
    router=fmoe.RouterConfig(top_k=2, num_groups=4, top_groups=2, scale=2.5),
    max_seq_len=32,
    init_std=0.2,
)
NO_GROUPS = fmoe.RouterConfig(top_k=3)
V2 = fmoe.RouterConfig(
    top_k=2, score_func="softmax", num_groups=4, top_groups=2, group_best=1, normalize=False, scale=4.0
)
YARN = Yarn(factor=8, original_max_seq_len=32)

# What a model can be told to do, and does: changes of TINY.
MODELS = {
    "V3 in small: query bottleneck, groups, YaRN, one shared expert": dict(
        q_lora_rank=7, yarn=YARN, num_shared_experts=1, max_seq_len=256
    ),
    "query matrix, two shared experts": dict(),
    "another epsilon": dict(norm_eps=1e-2, q_lora_rank=7),
    "no groups": dict(router=NO_GROUPS, q_lora_rank=7),
    "YaRN of unequal mscales": dict(yarn=dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=1.3)),
    "YaRN of other bounds": dict(
        yarn=Yarn(40.0, 4096, beta_fast=60.0, beta_slow=0.05), qk_rope_head_dim=16, max_seq_len=163840
    ),
    "plain YaRN": dict(yarn=dataclasses.replace(YARN, mscale_all_dim=0.0)),
    "another base of rotary positions": dict(rope_theta=50.0),
    "dense layers only": dict(num_dense_layers=3),
    "no dense layer": dict(num_dense_layers=0),
    "tied head": dict(tied_head=True, q_lora_rank=7),
    "weights as they come, scaled": dict(
        router=dataclasses.replace(TINY.router, normalize=False, scale=1.7, top_groups=4)
    ),
    "odd sizes": dict(
        vocab_size=37,
        dim=23,
        hidden_dim=19,
        num_heads=3,
        q_lora_rank=5,
        kv_lora_rank=9,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=11,
        moe_hidden_dim=7,
        num_experts=9,
        num_shared_experts=1,
        router=fmoe.RouterConfig(top_k=4, num_groups=3, top_groups=2),
    ),
    "V2 in small: softmax, groups by their best, YaRN": dict(
        router=V2, q_lora_rank=7, yarn=dataclasses.replace(YARN, mscale=0.707, mscale_all_dim=0.707)
    ),
    "V2-Lite in small: softmax, no groups": dict(
        router=dataclasses.replace(V2, num_groups=1, top_groups=1, top_k=3, scale=1.0)
    ),
}


def small(name):
    return change(TINY, **MODELS[name])


def init(config, seed=0, **options):
    """Random parameters with small selection biases, where there are any, and norms that aren't one."""

    def move(name, leaf):
        if name.endswith("bias_E"):
            return 0.3 * torch.randn_like(leaf) if config.router.score_func == "sigmoid" else leaf
        return leaf + 0.3 * torch.randn_like(leaf) if leaf.dim() == 1 else leaf

    params = deepseek_v3.init(config, seed, **options)
    names = optree.tree_unflatten(optree.tree_structure(params), fmoe.tree.dotted_names(params))
    return optree.tree_map(move, names, params)


def tokens(config=TINY, batch=2, length=11):
    return torch.randint(config.vocab_size, (batch, length))


def their_config(config):
    import transformers  # takes seconds, and ranks that only need a configuration don't

    raw = export_config(config)
    return transformers.AutoConfig.for_model(**raw), getattr(transformers, raw["architectures"][0])


def their_tensors(params, config):
    """Parameters, or gradients, by the names transformers gives them, in the shapes it holds."""
    return {
        part.name: value[part.at].reshape(part.shape)
        for leaf, value in zip(published_leaves(config, fused=True), optree.tree_leaves(params))
        for part in leaf.parts
    }


def their_model(config, params=None):
    hf_config, make = their_config(config)
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = make(hf_config)
    if params is not None:
        result = model.load_state_dict(their_tensors(params, config), strict=False)
        assert not result.unexpected_keys
        assert result.missing_keys == (["lm_head.weight"] if config.tied_head else [])
    return model


def apart(scores, config, gap=1e-5):
    """Whether no two choices the router makes among these scores are within ``gap`` of each other."""
    groups = scores.unflatten(-1, (config.router.num_groups, -1))
    best = groups.topk(min(config.router.group_best, groups.shape[-1])).values.sum(-1)
    return all(x.shape[-1] == 1 or x.sort(-1).values.diff().min() > gap for x in (scores, best))


def clear_tokens(model, params, config):
    """Tokens whose experts are no close call, so that rounding can't decide a comparison."""
    biases = [layer.mlp.router.bias_E for layer in params.layers if isinstance(layer.mlp, fmoe.MoEParams)]
    while True:
        batch = tokens(config)
        with torch.no_grad():
            logits = model(batch, output_router_logits=True).router_logits or ()
        assert len(logits) == len(biases)
        sigmoid = config.router.score_func == "sigmoid"
        scores = [(x.sigmoid() if sigmoid else x.softmax(-1)) + b for x, b in zip(logits, biases)]
        if all(apart(x, config) for x in scores):
            return batch
