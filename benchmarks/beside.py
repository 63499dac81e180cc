"""Training steps of this checkout's example beside another's, in turns, on the processes of one machine.

    git worktree add ../before 2468756
    python benchmarks/beside.py ../before --processes 2 -- --layers 3 --mesh ep=2 --steps 40

``--more`` are options of this checkout's runs alone: with ``.`` as the other, it compares what they do.

    python benchmarks/beside.py . --more=--ep-overlap --processes 2 -- --mesh ep=2 --steps 40

What stands after ``--`` are options of ``examples/train_deepseek_v3.py`` that both know.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fmoe.training import launch, options
from fmoe.training.metrics import read_metrics

HERE = Path(__file__).resolve().parents[1]
WARM_UP = 10


def speed(tree: Path, processes: int, options: list[str]) -> float:
    """Tokens a second: the median of the steps after the first few."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [*torchrun, "examples/train_deepseek_v3.py", "--out", folder, *options]
        subprocess.run(command, cwd=tree, env=env, check=True, stdout=subprocess.DEVNULL)
        records = read_metrics(Path(folder) / "metrics.jsonl")[WARM_UP:]
    return statistics.median(record["tokens_per_second"] for record in records)


def main() -> None:
    mine, theirs = sys.argv[1:], []
    if "--" in mine:
        mine, theirs = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    parser = options.Parser(description=__doc__)
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--more", type=str.split, default=[], help="options of this checkout's runs alone")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(mine)
    trees = {"before": args.before.resolve(), "now": HERE}
    more = {"before": [], "now": args.more}
    found: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(args.rounds):
        for name, tree in trees.items():
            found[name].append(speed(tree, args.processes, theirs + more[name]))
    for name, several in found.items():
        print(
            f"{name:6s} {statistics.median(several):10,.0f} tokens/s, of", *(f"{one:,.0f}" for one in several)
        )
    print(f"now / before: {statistics.median(found['now']) / statistics.median(found['before']):.2f}")


if __name__ == "__main__":
    launch.run(main)
