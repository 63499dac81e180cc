"""Checkpoint names, and the tape on which remat keeps what operators computed."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._C import _functorch as functorch

from ...errors import argument_error
from .handing import handed

if TYPE_CHECKING:
    from .primitive import Operator

OFFLOAD, COMPRESS = "offload", "compress"
# Whether to keep what has this name; OFFLOAD: in the host's memory; COMPRESS: in fp8.
Policy = Callable[[str], bool | str]
Place = tuple[int, ...]  # of a call of PyTorch's: its number in its region, after those of the regions around
Made = tuple[Place, str]  # the place and the function's name

_CHECKPOINTS: dict[str, bool] = {}
_TAPE: "ContextVar[Tape | PlainTape | None]" = ContextVar("fmoe_tape", default=None)
current_tape, set_tape, reset_tape = _TAPE.get, _TAPE.set, _TAPE.reset


class Entry(NamedTuple):
    """One operator call on a tape; ``outputs`` are ``None`` where it has no value at the tape's level.

    ``homes`` are the devices that offloaded outputs come back to, once they have ``left``. ``made`` says
    which call made the value that :func:`~fmoe.ops.core.naming.checkpoint_name` named. Once an entry is
    compressed, ``dtypes`` are those that its outputs get back; each that has one is two in ``outputs``.
    """

    operator: str
    checkpoint: str
    outputs: tuple[torch.Tensor, ...] | None
    homes: tuple[torch.device, ...] = ()
    left: bool = False
    made: Made | None = None
    dtypes: tuple[torch.dtype | None, ...] = ()


# Every entry of a tape without its outputs, and how many those are, if it has any.
Layout = Sequence[tuple[Entry, int | None]]


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


class _Maker(NamedTuple):
    """What made a tensor: which call of the region, and of what."""

    made: "weakref.ref[torch.Tensor]"
    number: int
    func: Any
    version: int


def _name(func: Any) -> str:
    return func if isinstance(func, str) else getattr(func, "__name__", str(func))


def _depth() -> int:
    """The number of torch.func transforms that are active."""
    return len(functorch.get_interpreter_stack() or ())


class Tape:
    """Outputs of operators during one run of a function: kept on the way, or handed back.

    It records every call whose checkpoint name ``record`` accepts. It serves ``entries``, in order, to the
    calls whose name ``serve`` accepts. A call beneath a transform that began inside the run has no value at
    this level. Its entry is ``None`` and it is computed again. ``check`` sees every call's arguments first.
    What ``record`` or ``throughout`` accepts, nested regions keep, too.

    It also numbers the calls of PyTorch's own functions, from ``place`` on. So it can say which of them made
    a value that is named later, and needn't compute that again.
    """

    def __init__(
        self,
        *,
        record: Policy,
        serve: Policy,
        throughout: Policy = lambda name: False,
        entries: Sequence[Entry] = (),
        check: Callable[[Any, str], None] | None = None,
        place: Place = (),
    ) -> None:
        self.record, self.serve, self.throughout, self.check = record, serve, throughout, check
        self.entries = tuple(entries)
        self.position = 0
        self.recorded: list[Entry] = []
        self.depth = _depth()
        self._versions: list[list[int]] = []
        self._place, self._calls, self._inside = place, 0, False
        self._makers: dict[int, _Maker] = {}
        self._to_hand = {e.made: e.outputs for e in self.entries if e.made and e.outputs}
        self._handed: dict[Made, torch.Tensor] = {}

    def call(self, op: "Operator", args: tuple[Any, ...]) -> Any:
        if self.check is not None:
            self.check(args, op.name)
        name = op.checkpoint_of(args)
        entry = self._next(op.name, name)
        self._calls += 1
        made = (self._place_of(self._calls), op.name) if self._to_hand else None
        kept = (entry and entry.outputs) or (self._to_hand.get(made, ()) if made else ())
        with self.inside():
            out = op.function.apply(*args, *kept)
        if isinstance(out, torch.Tensor):
            self._note(op.name, out, made if kept else None)
        if self.record(name):
            self._append(Entry(op.name, name, op.kept(out if isinstance(out, tuple) else (out,))))
        return out

    def name(self, op: "Operator", x: torch.Tensor, name: str) -> torch.Tensor:
        """A value that is only named: ``op``, the identity, doesn't run but to hand back what was kept."""
        if self.check is not None:
            self.check(x, op.name)
        entry, made = self._next(op.name, name), self._made(x)
        if entry and entry.outputs and not (entry.made and x is self._handed.get(entry.made)):
            if entry.made in self._handed:
                raise replay_error(f"{entry.made[1]} for another value than the one named {name!r}")
            with self.inside():
                x = op.function.apply(x, name, *entry.outputs)
        if self.record(name):
            self._append(Entry(op.name, name, (x,), made=entry.made if entry else made))
        return x

    def torch_call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a function of PyTorch's; it counts if it gives a tensor, as questions about one don't."""
        if self._inside:
            return func(*args, **kwargs)
        made, done = None, False
        if self._to_hand:
            made = self._place_of(self._calls + 1), _name(func)
        if made in self._to_hand:
            out, done = handed(func, args, kwargs, self._to_hand[made][0])
        else:
            out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            self._calls += 1
            self._note(func, out, made if done else None)
        return out

    def _note(self, func: Any, out: torch.Tensor, handed: Made | None) -> None:
        """What made a tensor, and whether it was handed. A call that gives an argument made nothing."""
        maker = self._makers.get(id(out))
        if maker is None or maker.made() is not out:
            self._makers[id(out)] = _Maker(weakref.ref(out), self._calls, func, _version(out))
        if handed in self._to_hand:
            self._handed[handed] = out

    def _made(self, x: torch.Tensor) -> Made | None:
        """The call that made a tensor, if nothing was written into it since."""
        maker = self._makers.get(id(x))
        if maker is None or maker.made() is not x or maker.version != _version(x):
            return None
        return self._place_of(maker.number), _name(maker.func)

    @property
    def hands(self) -> bool:
        """Whether a call may be handed its result."""
        return bool(self._to_hand)

    def next_place(self) -> Place:
        """That of an operator, or of a nested region."""
        self._calls += 1
        return self._place_of(self._calls)

    def _place_of(self, number: int) -> Place:
        return *self._place, number

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around an operator or a nested region, whose calls aren't the function's own."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def rest(self) -> Sequence[Entry]:
        """The entries left to hand back."""
        return self.entries[self.position :]

    def asks(self, name: str) -> bool | str:
        """Whether a nested region is to keep what has this name, whatever its policy."""
        return self.record(name) or self.throughout(name)

    def absorb(self, served: int, recorded: Iterable[Entry]) -> None:
        """Take over what a nested run was handed, and what it recorded that this tape wants too."""
        self.position += served
        for entry in recorded:
            if self.record(entry.checkpoint):
                self._append(entry)

    def check_unchanged(self) -> None:
        """Raise ``ValueError`` if something was written into what was recorded."""
        for entry, versions in zip(self.recorded, self._versions):
            if versions != _versions(entry):
                got = f"a function that writes into what the policy keeps as {entry.checkpoint!r}"
                expected, remedy = "values that stay as they are", "Use the operation that isn't in place."
                raise argument_error("remat", "fn", got=got, expected=expected, remedy=remedy)

    def _next(self, operator: str, name: str) -> Entry | None:
        if self.position == len(self.entries) or not self.serve(name):
            return None
        entry = self.entries[self.position]
        if (entry.operator, entry.checkpoint) != (operator, name):
            first = entry.operator if entry.operator != operator else f"{operator} of {entry.checkpoint!r}"
            now = operator if entry.operator != operator else f"{operator} of {name!r}"
            raise replay_error(f"{now} where {first} was called first")
        self.position += 1
        return entry

    def _append(self, entry: Entry) -> None:
        if _depth() != self.depth:
            entry = entry._replace(outputs=None, dtypes=())
        if self.record(entry.checkpoint) == OFFLOAD and not entry.homes:
            entry = entry._replace(homes=tuple(t.device for t in entry.outputs or ()))
        self.recorded.append(entry)
        self._versions.append(_versions(entry))


def _versions(entry: Entry) -> list[int]:
    return [_version(t) for t in entry.outputs or ()]


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version


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
