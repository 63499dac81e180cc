"""What Dynamo makes of functions it is told about."""

import einops
import torch

from fmoe.ops.core.dynamo import rearrange


def test_rearranging_is_one_step_of_a_graph_for_any_number_of_rows():
    graphs = []

    def backend(graph, _example):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def heads(x):
        return rearrange(x, "L (H head) -> H L head", H=2)

    compiled = torch.compile(heads, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 7, 9):
        x = torch.randn(rows, 6)
        assert torch.equal(compiled(x), heads(x))
    assert graphs == [[einops.rearrange]]
