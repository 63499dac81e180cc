"""A pure function as one CUDA graph: its kernels are launched together, and its Python runs once."""

import functools
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch._C import _functorch as functorch

from .errors import TransformError, argument_error, check_function
from .ops.core.dtensors import is_dtensor, local, map_local
from .ops.core.memory import alone
from .tree import dotted_names


def graphed(fn: Callable[..., Any], *, donate: Sequence[int] = ()) -> Callable[..., Any]:
    """``fn`` as a CUDA graph, captured at the first call of each kind and replayed afterwards.

    ===========  ==========================================================================
    fn           a pure function of pytrees whose tensors lie on one CUDA device, and of hashable values
    donate       places of arguments whose memory it may keep and write into: those that a training loop
                 replaces by results
    -> function  the same function. Its results are valid until its next call
    ===========  ==========================================================================

    Calls are of one kind if their structures, the shapes, strides and dtypes of their tensors, and their
    other values are equal. The first call of a kind runs ``fn`` twice. Its results are those of the first
    time, which also compiles and tunes what needs that. The second time records the graph. Later calls copy
    their arguments to where the graph reads them, unless they lie there already, as results made of donated
    arguments do. So a number that changes, such as a learning rate, must be a tensor.

    The graph has memory of its own, which holds the results and all that is alive inside ``fn`` at once.
    Random numbers of the default generator go on from call to call. Without a CUDA device it is ``fn``.

    Raises ``ValueError`` for tensors on another device, and for values that can't be hashed. Raises
    :class:`~fmoe.errors.TransformError` beneath transforms and where gradients are recorded, and for a
    function that waits for the device, naming the line that does.

    >>> double = graphed(lambda x: 2 * x)
    >>> double(torch.ones(2, device="cuda" if torch.cuda.is_available() else "cpu")).tolist()
    [2.0, 2.0]
    """
    check_function("graphed", "fn", fn)
    if not torch.cuda.is_available():
        return fn
    captured: dict[Any, _Captured] = {}

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        leaves, structure = optree.tree_flatten(args, none_is_leaf=True)
        key = structure, tuple(_kind(args, i, leaf) for i, leaf in enumerate(leaves))
        _check_plain(leaves)
        if found := captured.get(key):
            return found.replay(leaves)
        out, captured[key] = _first(fn, args, leaves, structure, donate)
        return out

    return call


class _Captured(NamedTuple):
    """A graph, the tensors that it reads, by their places among the arguments' leaves, and its results."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[int, torch.Tensor]
    out: Any

    def replay(self, leaves: Sequence[Any]) -> Any:
        pairs = [(mine, local(leaves[i])) for i, mine in self.inputs.items()]
        pairs = [(mine, given) for mine, given in pairs if mine.data_ptr() != given.data_ptr()]
        if pairs:
            # First copy out what lies where another argument goes, as after a swap of donated ones.
            read = {_memory(mine) for mine in self.inputs.values()}
            given = [tensor.clone() if _memory(tensor) in read else tensor for _, tensor in pairs]
            torch._foreach_copy_([mine for mine, _ in pairs], given)
        self.graph.replay()
        return self.out


def _first(
    fn: Callable[..., Any], args: tuple[Any, ...], leaves: list[Any], structure: Any, donate: Sequence[int]
) -> tuple[Any, _Captured]:
    """The results of a first call, and the graph of later ones."""
    places = (i for i, arg in enumerate(args) for _ in optree.tree_leaves(arg, none_is_leaf=True))
    kept = [i in donate and own for i, own in zip(places, alone(leaves))]  # two leaves may later differ
    static = [
        leaf if keep or not isinstance(leaf, torch.Tensor) else map_local(torch.clone, leaf)
        for leaf, keep in zip(leaves, kept)
    ]
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(here)  # on which libraries set up what mustn't be set up during a capture
    with torch.cuda.stream(side):
        out = fn(*structure.unflatten(static))
    here.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as NCCL's watchdog, may ask the device meanwhile.
        with warnings.catch_warnings(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # as after an error
            again = fn(*structure.unflatten(static))
    except (RuntimeError, ValueError) as error:
        _end_capture()
        raise TransformError(_cannot(fn, error)) from error
    inputs = {i: local(leaf) for i, leaf in enumerate(static) if isinstance(leaf, torch.Tensor)}
    return out, _Captured(graph, inputs, again)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _kind(args: Any, i: int, leaf: Any) -> Any:
    """What a leaf must have in common with that of the call that was captured."""
    if isinstance(leaf, torch.Tensor):
        piece = local(leaf)
        if not piece.is_cuda:
            name, expected = _named(args, i), "a CUDA device"
            remedy = "Move it there. A number may also be Python's, which is part of the graph."
            raise argument_error("graphed", name, got=piece.device, expected=expected, remedy=remedy)
        where = (leaf.device_mesh, leaf.placements) if is_dtensor(leaf) else ()
        return piece.shape, piece.stride(), piece.dtype, piece.device, where
    try:
        hash(leaf)
    except TypeError as error:
        got, expected = type(leaf).__name__, "a tensor or a hashable value"
        raise argument_error("graphed", _named(args, i), got=got, expected=expected) from error
    return type(leaf), leaf


def _named(args: Any, i: int) -> str:
    return f"args.{dotted_names(args)[i]}"


def _check_plain(leaves: Sequence[Any]) -> None:
    recorded = any(isinstance(t, torch.Tensor) and t.requires_grad for t in leaves)
    if functorch.get_interpreter_stack() or (recorded and torch.is_grad_enabled()):
        raise TransformError("graphed: no derivative goes through a graph. Differentiate inside of it.")


def _end_capture() -> None:
    """PyTorch's generator stays in a capture that failed, unless it gets another state."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _cannot(fn: Callable[..., Any], error: BaseException) -> str:
    """What stands in the way, and the innermost line outside PyTorch."""
    while error.__context__:  # the end of a capture that failed raises another error
        error = error.__context__
    root = str(torch.__path__[0])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(root)]
    line = next((f for f in reversed(frames) if f.filename != __file__), frames[-1])
    reason = str(error).splitlines()[0]
    return (
        f"graphed: {getattr(fn, '__name__', fn)} can't be captured at {line.filename}:{line.lineno} "
        f"({line.line}): {reason.rstrip('.')}. A graph can't ask the device for a value, as all_to_all "
        "and DeepEP do unless host_sync=False, and experts in float32 or float64. Nor can it use a CPU "
        "tensor or a generator of its own."
    )
