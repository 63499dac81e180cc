"""Inductor as a backend of ``torch.compile`` for layers: what it has to know of fmoe's operators."""

import functools
import operator
from typing import Any
from unittest import mock

import optree
import torch

from .primitive import operators


def inductor(graph: Any, inputs: Any) -> Any:
    """Inductor, which leaves exchanges in parts in order, and takes no wrong code from its cache.

    A backward that runs once may write into *donated buffers*, which are tensors that the forward kept. Run
    twice, it would spoil them. Which kernels compute a layer's experts decides on the strides of a
    pre-activation. Inductor's own key knows of neither.
    """
    from torch._inductor import exc
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.utils import get_donated_idxs

    def compile_one(graph: Any, *args: Any, **kwargs: Any) -> Any:
        config: Any = torch.compiler.config
        tag = f"{config.cache_key_tag} donated: {get_donated_idxs()} strides: {_strides(graph.graph)}"
        _in_order(graph.graph)
        # PyTorch 2.11 describes an operator that it first meets, with all that its arguments were made of.
        # For parts of exchanges, each of which depends on the one before, that takes minutes.
        short = mock.patch.object(exc.OperatorIssue, "operator_str", staticmethod(_named))
        with config.patch(cache_key_tag=tag), short:
            return compile_fx_inner(graph, *args, **kwargs)

    passes = {"joint_custom_pre_pass": _without_size_checks()}
    return compile_fx(graph, inputs, inner_compile=compile_one, config_patches=passes)


def _strides(graph: Any) -> list[str]:
    """Those of what our operators make."""
    nodes = [node for node in graph.nodes if getattr(node.target, "namespace", "") == "fmoe"]
    made = optree.tree_leaves([node.meta.get("val") for node in nodes])
    return [str(tuple(t.stride())) for t in made if isinstance(t, torch.Tensor)]


def _named(target: Any, args: Any, kwargs: Any) -> str:
    return f"target: {target}"


@functools.cache
def _without_size_checks() -> Any:
    """A pass that takes out assertions that a size isn't negative, as it never is.

    PyTorch 2.11 would keep their truth for the backward, which Inductor refuses, where remat keeps a value.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass  # takes a second to import

    class WithoutSizeChecks(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            for node in reversed(graph.nodes):
                if node.target is torch.ops.aten._assert_scalar.default:
                    truth = node.args[0]
                    if getattr(truth, "target", None) is operator.ge and truth.args[1] == 0:
                        graph.erase_node(node)
            graph.eliminate_dead_code()

        def uuid(self) -> str:
            return "fmoe: without checks of sizes"

    return WithoutSizeChecks()


def _in_order(graph: Any) -> None:
    """Make each part of an exchange depend on the one before, or a compiler may choose another order."""
    parts, before = {op.raw for op in operators().values() if op.example is None}, None
    for node in [node for node in graph.nodes if node.target in parts]:
        if before is not None:
            others = len(node.target._schema.arguments) - 1
            node.args = (*node.args[:others], before)
            args, kwargs = node.meta.get("eager_input_vals", ((), {}))
            if args:
                node.meta["eager_input_vals"] = (*args[:others], before.meta["val"]), kwargs
        before = node
        if isinstance(node.meta["val"], tuple | list):
            with graph.inserting_after(node):
                before = graph.call_function(operator.getitem, (node, 0))
            before.meta["val"] = node.meta["val"][0]
