"""Train a small DeepSeek-V3, or another model, on Python's standard library, byte by byte.

    python examples/train_deepseek_v3.py
    torchrun --nproc-per-node 4 examples/train_deepseek_v3.py --mesh dp=2,ep=2
    torchrun --nproc-per-node 4 examples/train_deepseek_v3.py --mesh pp=2,ep=2 --micro-batches 8

With the defaults it takes about two minutes on two CPU cores. It leaves metrics in runs/debug, with pictures
where matplotlib is installed and checkpoints where --save-every says so. With --resume the same command goes
on from the newest: to the same bits as without a break, or on another mesh to the same within rounding.

The loop is fmoe/training/loop.py, which "python -m fmoe train" runs too: one page over functions that you can
use yourself. Copy that file to change what a step does.
"""

from fmoe.training import launch, loop, options


def parse():
    parser = options.Parser(description=__doc__)
    loop.add_options(parser)
    return parser.parse_args()


def main():
    loop.train(parse())


if __name__ == "__main__":
    launch.run(main)
