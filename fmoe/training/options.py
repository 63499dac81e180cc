"""Options of a script that trains, in groups, and what they stand for."""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ..graphs import graphed
from ..models.config import DecoderConfig
from ..ops.core.axes import axis_sizes
from ..ops.precision import Recipe, parse_recipe
from ..parallel.backends import Backend
from ..parallel.backends.payload import PAYLOADS
from ..parallel.mesh import named_device
from ..pipeline import Schedule, make_schedule
from ..transforms import exact_on_overflow, per_layer
from . import gradients
from .launch import World
from .tokenizer import BYTES, Tokenizer, load_tokenizer


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose help shows defaults and keeps the description's lines.

    Defaults of ``None``, ``""`` and ``False`` are left to the option's own text. A mistake is a
    ``ValueError``, of which :func:`fmoe.training.launch.run` makes one line.

    >>> parser = Parser(prog="train")
    >>> _ = parser.add_argument("--steps", type=at_least(1), default=600, help="how many")
    >>> "how many (default: 600)" in parser.format_help()
    True
    >>> parser.parse_args(["--steps", "0"])
    Traceback (most recent call last):
    ValueError: argument --steps: got 0, expected at least 1
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class Precision(NamedTuple):
    """Where a run computes, in which dtypes, and by which recipe its products, from :func:`add_precision`.

    >>> parser = Parser()
    >>> add_precision(parser)
    >>> print(Precision.of(parser.parse_args(["--device", "cpu", "--dtype", "bfloat16"])))
    on cpu, kept in bfloat16, moments in bfloat16, computing in bfloat16
    >>> Precision.of(parser.parse_args(["--precision", "experts=fp8_rowwise"])).recipe
    Recipe(experts='fp8_rowwise', dense=None)
    """

    device: torch.device
    dtype: torch.dtype
    moments: torch.dtype
    compute: torch.dtype
    recipe: Recipe

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Precision":
        """What was asked for. Float32 is computed in bfloat16 on CUDA, by default."""
        device = named_device(args.device)
        mixed = device.type == "cuda" and args.dtype == "float32"
        compute = args.compute_dtype or ("bfloat16" if mixed else args.dtype)
        names = args.dtype, args.moments_dtype or args.dtype, compute
        dtype, moments, compute = (getattr(torch, name) for name in names)
        return cls(device, dtype, moments, compute, args.precision or Recipe())

    def __str__(self) -> str:
        dtype, moments, compute = (str(name).removeprefix("torch.") for name in self[1:4])
        products = f", products by {self.recipe}" if self.recipe != Recipe() else ""
        return f"on {self.device}, kept in {dtype}, moments in {moments}, computing in {compute}{products}"


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, ``--dtype``, ``--compute-dtype``, ``--moments-dtype`` and ``--precision``.

    They are for :class:`Precision`.

    >>> parser = Parser()
    >>> add_precision(parser)
    >>> parser.parse_args([]).dtype
    'float32'
    """
    dtypes = dict(choices=["float32", "bfloat16", "float64"])
    add: Callable[..., Any] = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--dtype", **dtypes, default="float32", help="of parameters and gradients")
    add("--compute-dtype", **dtypes, help="default: bfloat16 on CUDA with --dtype float32, else --dtype")
    add("--moments-dtype", **dtypes, help="of the optimiser's moments (default: --dtype)")
    add("--precision", type=recipe, metavar="RECIPE", help=PRECISION_HELP)


PRECISION_HELP = (
    "of products: fp8_rowwise; fp8_rowwise_with_gw_hp, whose gradients of weights aren't in fp8; "
    "or by kind of layer, as experts=fp8_rowwise"
)


def recipe(text: str) -> Recipe:
    """A ``type`` for an option, as :func:`fmoe.ops.precision.parse_recipe` reads it.

    >>> recipe("dense=fp8_block").dense
    'fp8_block'
    """
    try:
        return parse_recipe(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Layout(NamedTuple):
    """How a step's work lies on devices and in time, from the options of :func:`add_layout`.

    ============  ======================================================================
    ``schedule``  of the stages along ``pp``
    ``how``       keyword arguments of :func:`fmoe.training.gradients.of_model`
    ``of_step``   those which :func:`fmoe.training.gradients.loss_of_model` doesn't take
    ``bounded``   the backend of ``--ep-capacity``, for :func:`fmoe.exact_on_overflow`; ``None``: none, or
                  one with room for the worst case, which is among ``how``
    ============  ======================================================================

    >>> parser = Parser()
    >>> add_layout(parser)
    >>> layout = Layout.of(parser.parse_args(["--micro-batches", "2"]), World(None, (0, 1)))
    >>> layout.schedule.stage_to_rank, layout.how["micro_batches"], layout.of_step["zero"]
    ((0,), 2, 3)
    """

    schedule: Schedule
    how: dict[str, Any]
    of_step: dict[str, Any]
    bounded: Backend | None

    @classmethod
    def of(cls, args: argparse.Namespace, world: World) -> "Layout":
        """What was asked for on these devices. Raises ``ValueError`` for what doesn't fit.

        With ``--ep-capacity`` it also wants ``args.batch_size`` and ``args.seq_len``.
        """
        sizes = dict(pp=world.pp, micro_batches=args.micro_batches, stages_per_rank=args.stages_per_rank)
        schedule = make_schedule(args.pp_schedule, **sizes)
        room = bounds(args.ep_capacity)
        backend = Backend(args.ep_backend, in_halves=args.ep_overlap, payload=args.ep_payload)
        how = dict(mesh=world.mesh, backend=backend, micro_batches=args.micro_batches, schedule=schedule)
        how["per_layer"] = per_layer(args.remat, compiled=args.compile)
        bounded = None
        if not room["host_sync"]:
            at_once = args.micro_batches * (2 if args.ep_overlap else 1)
            most = -(-args.batch_size // (world.part[1] * at_once)) * args.seq_len
            bounded = backend._replace(**room, max_tokens=most)
            if bounded.capacity is None:  # nothing can overflow
                how["backend"], bounded = bounded, None
        return cls(schedule, how, dict(zero=args.zero, keep_rounded=args.keep_rounded), bounded)

    @staticmethod
    def idle(args: argparse.Namespace, world: World) -> list[str]:
        """The options that change nothing on these devices.

        >>> parser = Parser()
        >>> add_layout(parser)
        >>> Layout.idle(parser.parse_args(["--ep-overlap", "--pp-schedule", "zbv"]), World(None, (0, 1)))
        ['--ep-overlap', '--pp-schedule']
        """
        sizes = {} if world.mesh is None else axis_sizes(world.mesh)
        along_ep = {
            "--ep-backend": args.ep_backend != "auto",
            "--ep-capacity": args.ep_capacity is not None and not args.graph,  # it says what is in the graph
            "--ep-payload": args.ep_payload is not None,
            "--ep-overlap": args.ep_overlap,
        }
        along_pp = {"--pp-schedule": args.pp_schedule != "1f1b"}
        return [
            name
            for axis, options in (("ep", along_ep), ("pp", along_pp))
            for name, given in options.items()
            if given and sizes.get(axis, 1) == 1
        ]

    def gradient(self, config: DecoderConfig, *, graph: bool = False, **how: Any) -> Callable[..., Any]:
        """:func:`fmoe.training.gradients.of_model` of this layout, done again exactly if it has no room.

        ``graph`` makes a CUDA graph of what is bounded; of a step without a bound the caller can make one.
        """
        of_model = functools.partial(gradients.of_model, config, **self.of_step, **self.how | how)
        if not self.bounded:
            return of_model()
        fast = of_model(backend=self.bounded)
        return exact_on_overflow(graphed(fast) if graph else fast, of_model())


def bounds(ep_capacity: float | None) -> dict[str, Any]:
    """What ``--ep-capacity`` says of a :class:`fmoe.parallel.Backend`.

    >>> bounds(None), bounds(float("inf"))
    ({'host_sync': True, 'capacity': None}, {'host_sync': False, 'capacity': None})
    """
    capacity = None if ep_capacity == math.inf else ep_capacity
    return {"host_sync": ep_capacity is None, "capacity": capacity}


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add ``--mesh``, and the options of micro-batches, pipelines, ZeRO, backends, remat and compiling.

    >>> parser = Parser()
    >>> add_layout(parser)
    >>> parser.parse_args([]).pp_schedule
    '1f1b'
    """
    add: Callable[..., Any] = parser.add_argument
    add("--mesh", default="", help='axes and sizes under torchrun, as "dp=2,ep=4"; experts lie along ep')
    add("--micro-batches", type=at_least(1), default=1, help="parts a step's batch is computed in")
    add("--zero", type=int, choices=[1, 2, 3], default=3, help="how often parameters travel: ZeRO's stages")
    add("--keep-rounded", action="store_true", help="round weights to fp8 once a step, not each micro-batch")
    add("--pp-schedule", default="1f1b", help="of stages along pp: 1f1b, interleaved, zero_bubble or zbv")
    add("--stages-per-rank", type=at_least(1), help="of --pp-schedule (default: 1 for 1f1b, else 2)")
    add("--ep-backend", default="auto", help="what carries tokens along ep: auto, all_to_all or deepep")
    add("--ep-capacity", type=float, help="room for this times the mean of rows, asking nobody; inf: all")
    add("--ep-payload", choices=PAYLOADS, help="what tokens travel to experts as (default: their dtype)")
    add("--ep-overlap", action="store_true", help="compute one half of a batch while the other's rows travel")
    add(
        "--remat",
        default="none",
        help="what layers recompute: none, full, default, save:NAMES, offload:NAMES, compress:NAMES, "
        "or several joined by +",
    )
    add("--compile", action="store_true", help="compile each layer with torch.compile")
    add("--graph", action="store_true", help="on a GPU: make a CUDA graph of the first step, and replay it")


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, ``--suffix``, ``--field``, ``--tokenizer`` and ``--segments``.

    >>> parser = Parser()
    >>> add_text(parser)
    >>> parser.parse_args(["--data", "books"]).data
    [PosixPath('books')]
    """
    add: Callable[..., Any] = parser.add_argument
    add("--data", type=Path, nargs="+", help="files and folders (default: Python's standard library)")
    add("--suffix", default=".py", help="of the files in folders; a .jsonl file has a document a line")
    add("--field", default="text", help="of a JSONL line")
    add("--tokenizer", type=Path, help="a tokenizer.json (default: a token is a byte)")
    add("--segments", action="store_true", help="documents in a sequence don't see each other")


def tokenizer_of(args: argparse.Namespace) -> tuple[Tokenizer, str]:
    """The tokenizer of :func:`add_text`'s options, and the word for what it makes of text.

    Raises ``ValueError`` for ``--segments`` of bytes.

    >>> parser = Parser()
    >>> add_text(parser)
    >>> tokenizer_of(parser.parse_args([]))[1]
    'byte'
    """
    if args.tokenizer:
        return load_tokenizer(args.tokenizer), "token"
    if args.segments:
        reason = "among bytes, a separator is a newline like any other"
        raise ValueError(f"--segments needs --tokenizer: {reason}")
    return BYTES, "byte"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, but for those that say nothing, and keeps the description's lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, "") or action.default is False
        return action.help if silent else super()._get_help_string(action)


def at_least(least: int | float) -> Callable[[str], int | float]:
    """A ``type`` for an option: a number of the type of ``least`` that isn't below it.

    >>> at_least(0.0)("1")
    1.0
    """

    def number(text: str) -> int | float:
        value = type(least)(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"got {text}, expected at least {least}")
        return value

    return number
