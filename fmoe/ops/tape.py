"""Checkpoint names, and the tape on which remat keeps what operators computed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch._C import _functorch as functorch

Entry = tuple[torch.Tensor, ...] | None
Policy = Callable[[str], bool]

_CHECKPOINTS: dict[str, bool] = {}
_TAPE: "ContextVar[Tape | PlainTape | None]" = ContextVar("fmoe_tape", default=None)


class Recorded(Protocol):
    """What a tape needs of an operator."""

    name: str
    checkpoint: str
    function: Any
    plain: Any


def checkpoint(name: str, *, save: bool) -> str:
    """Declare a name that remat's policies see, and whether the default policy keeps what bears it."""
    _CHECKPOINTS[name] = save
    return name


def checkpoint_names() -> dict[str, bool]:
    """Every checkpoint name, and whether the default policy keeps it."""
    return dict(_CHECKPOINTS)


def _depth() -> int:
    """How many torch.func transforms are active."""
    return len(functorch.get_interpreter_stack() or ())


class Tape:
    """Outputs of operators during one run of a function: kept on the way, or handed back.

    It records every call whose checkpoint name ``record`` accepts, and serves ``entries``, in
    order, to the calls whose name ``serve`` accepts. A call beneath a transform that began inside
    the run has no value at this level: its entry is ``None`` and it is simply computed again.
    ``check`` sees every call's arguments and name first.
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
        self.recorded: list[tuple[str, Entry]] = []
        self.depth = _depth()

    @contextmanager
    def run(self) -> "Iterator[Tape]":
        token = _TAPE.set(self)
        try:
            yield self
        finally:
            _TAPE.reset(token)

    def call(self, op: Recorded, args: tuple[Any, ...]) -> Any:
        name = op.checkpoint
        if self.check is not None:
            self.check(args, op.name)
        kept = self._next(name)
        out = op.function.apply(*args, *(kept or ()))
        if self.record(name):
            self._append(name, out if isinstance(out, tuple) else (out,))
        return out

    def rest(self) -> Sequence[Entry]:
        """What is left to hand back."""
        return self.entries[self.position :]

    def absorb(self, served: int, recorded: Iterable[tuple[str, Entry]]) -> None:
        """Take over what a nested run was handed, and what it recorded that this tape wants too."""
        self.position += served
        for name, entry in recorded:
            if self.record(name):
                self._append(name, entry)

    def _next(self, name: str) -> Entry:
        if self.position == len(self.entries) or not self.serve(name):
            return None
        self.position += 1
        return self.entries[self.position - 1]

    def _append(self, name: str, entry: Entry) -> None:
        self.recorded.append((name, entry if _depth() == self.depth else None))


class PlainTape:
    """On it every operator is the plain PyTorch function it is declared to equal."""

    def call(self, op: Recorded, args: tuple[Any, ...]) -> Any:
        return op.plain(*args)


def current_tape() -> Tape | PlainTape | None:
    return _TAPE.get()


@contextmanager
def plain_operators() -> Iterator[None]:
    """Inside, operators are plain PyTorch: slow, obvious, and differentiated by PyTorch alone."""
    token = _TAPE.set(PlainTape())
    try:
        yield
    finally:
        _TAPE.reset(token)


@contextmanager
def no_tape() -> Iterator[None]:
    """Operators called inside belong to no tape."""
    token = _TAPE.set(None)
    try:
        yield
    finally:
        _TAPE.reset(token)
