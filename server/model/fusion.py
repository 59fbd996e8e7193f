"""A gated MLP's activation becomes part of the product that it reads: `silu(gate) * up` -> `manylora::gated`.

Gate and up are two thirds of a layer's columns. A large step, which runs uncaptured, would write their deltas for the activation alone to
read; the operator's kernel adds them as it reads the product (kernels.gated_kernels). Steps that are captured compute their deltas beside
the products (`linear_apart`) and stay as they are: there the kernel would wait for both (LOG.md).
A pass over the graph that dynamo traced; layers of transformers are called as they are. Used by model/base.py when layers are compiled.
"""

import operator

import torch
import torch.nn.functional as F
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node


class FuseActivations(CustomGraphPass):
    """Rewrites `silu(y[.., :n]) * y[.., n:]` with `y = linear(x, ..)` into `gated(x, ..)`."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite `graph`, dynamo's, in place."""
        for node in list(graph.nodes):
            if node.target is operator.mul:
                _gate_in_product(graph, node)

    def __eq__(self, other: object) -> bool:
        """All are alike: dynamo takes code that was compiled for one layer for another only if their passes are equal."""
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def uuid(self) -> bytes:
        """What this does, for inductor's disk cache."""
        return get_hash_for_files((__file__,))


def _is_linear(node: Node) -> bool:
    """Whether `node` calls our operator."""
    return node.op == "call_function" and node.target in (torch.ops.manylora.linear, torch.ops.manylora.linear.default)


def _gate_in_product(graph: Graph, product: Node) -> None:
    for activated, up in (product.args, product.args[::-1]):
        if not isinstance(activated, Node) or activated.target is not F.silu or len(activated.users) > 1:
            continue
        gate = activated.args[0] if activated.args else None
        call = _halves_of(gate, up)
        if call is None or not _is_linear(call):
            continue
        with graph.inserting_before(product):
            out = graph.call_function(torch.ops.manylora.gated, call.args, call.kwargs)
            out.meta = dict(product.meta)
        product.replace_all_uses_with(out)
        graph.erase_node(product)
        _erase_unread(graph, activated)
        _erase_unread(graph, up)
        return


def _halves_of(gate, up) -> Node | None:
    """The tensor whose last dimension's first half `gate` is, and `up` its second; None if that is not what they are, or all it is for."""
    if not isinstance(gate, Node) or not isinstance(up, Node) or gate.target is not operator.getitem or up.target is not operator.getitem:
        return None
    whole = gate.args[0]
    value = whole.meta.get("example_value") if isinstance(whole, Node) else None
    if up.args[0] is not whole or not isinstance(value, torch.Tensor) or set(whole.users) != {gate, up}:
        return None
    if len(gate.users) > 1 or len(up.users) > 1:
        return None
    width = getattr(gate.args[1][-1], "stop", None) if isinstance(gate.args[1], tuple) else None
    if not isinstance(width, int) or gate.args[1] != (Ellipsis, slice(0, width, None)):
        return None
    return whole if up.args[1] == (Ellipsis, slice(width, 2 * width, None)) and value.shape[-1] == 2 * width else None


def _erase_unread(graph: Graph, node: Node) -> None:
    """Erase `node` if nothing reads it, and then what it alone had read."""
    if node.users or node.op == "placeholder":
        return
    read = node.all_input_nodes
    graph.erase_node(node)
    for one in read:
        _erase_unread(graph, one)
