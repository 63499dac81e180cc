"""Checkpoint names, and the tape on which remat keeps what operators computed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._C import _functorch as functorch

from ...errors import argument_error

if TYPE_CHECKING:
    from .primitive import Operator

Policy = Callable[[str], bool]

_CHECKPOINTS: dict[str, bool] = {}
_TAPE: "ContextVar[Tape | PlainTape | None]" = ContextVar("fmoe_tape", default=None)
current_tape = _TAPE.get


class Entry(NamedTuple):
    """One operator call on a tape; ``outputs`` are ``None`` where it has no value at the tape's level."""

    operator: str
    checkpoint: str
    outputs: tuple[torch.Tensor, ...] | None


def checkpoint(name: str, *, save: bool) -> str:
    """Declare a name that remat's policies see, and whether the default policy keeps its outputs.

    Returns the name. Several operators may bear it.

    >>> from fmoe.transforms import save, save_declared
    >>> SQUARE = checkpoint("square", save=False)
    >>> save_declared(SQUARE), save(SQUARE)(SQUARE)
    (False, True)
    """
    _CHECKPOINTS[name] = save
    return name


def checkpoint_names() -> dict[str, bool]:
    """Every checkpoint name, and whether the default policy keeps it."""
    return dict(_CHECKPOINTS)


def _depth() -> int:
    """The number of torch.func transforms that are active."""
    return len(functorch.get_interpreter_stack() or ())


class Tape:
    """Outputs of operators during one run of a function: kept on the way, or handed back.

    It records every call whose checkpoint name ``record`` accepts. It serves ``entries``, in order, to the
    calls whose name ``serve`` accepts. A call beneath a transform that began inside the run has no value at
    this level. Its entry is ``None`` and it is computed again. ``check`` sees every call's arguments first.
    """

    def __init__(
        self,
        *,
        record: Policy,
        serve: Policy,
        entries: Sequence[Entry] = (),
        check: Callable[[Any, str], None] | None = None,
    ) -> None:
        self.record, self.serve, self.check = record, serve, check
        self.entries = tuple(entries)
        self.position = 0
        self.recorded: list[Entry] = []
        self.depth = _depth()

    def call(self, op: "Operator", args: tuple[Any, ...]) -> Any:
        if self.check is not None:
            self.check(args, op.name)
        out = op.function.apply(*args, *(self._next(op) or ()))
        if self.record(op.checkpoint):
            self._append(Entry(op.name, op.checkpoint, out if isinstance(out, tuple) else (out,)))
        return out

    def rest(self) -> Sequence[Entry]:
        """The entries left to hand back."""
        return self.entries[self.position :]

    def absorb(self, served: int, recorded: Iterable[Entry]) -> None:
        """Take over what a nested run was handed, and what it recorded that this tape wants too."""
        self.position += served
        for entry in recorded:
            if self.record(entry.checkpoint):
                self._append(entry)

    def _next(self, op: "Operator") -> tuple[torch.Tensor, ...] | None:
        if self.position == len(self.entries) or not self.serve(op.checkpoint):
            return None
        entry = self.entries[self.position]
        if entry.operator != op.name:
            raise replay_error(f"{op.name} where {entry.operator} was called first")
        self.position += 1
        return entry.outputs

    def _append(self, entry: Entry) -> None:
        self.recorded.append(entry if _depth() == self.depth else entry._replace(outputs=None))


def replay_error(got: str) -> ValueError:
    expected = "the same operators in the same order each time"
    remedy = "Make it depend on its arguments only."
    return argument_error(
        "remat", "fn", got=f"a function that, run again, calls {got}", expected=expected, remedy=remedy
    )


class PlainTape:
    """On it every operator is the plain PyTorch function that it is declared to equal."""

    def call(self, op: "Operator", args: tuple[Any, ...]) -> Any:
        return op.plain(*args)


@contextmanager
def on_tape(tape: Tape | PlainTape | None) -> Iterator[None]:
    """Operators called inside belong to this tape."""
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def plain_operators() -> AbstractContextManager[None]:
    """Inside, operators are plain PyTorch: slow, obvious, and differentiated by PyTorch alone."""
    return on_tape(PlainTape())
