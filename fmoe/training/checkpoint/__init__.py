"""Checkpoints that survive a crash, on ``torch.distributed.checkpoint``, in one process or in many.

A checkpoint is a folder ``step-00000010`` of tensors under dotted names, described by ``checkpoint.json``.
It is written under another name and renamed when all of it is on disk. So a folder of that name is whole,
whenever the process was killed.
"""

from .loading import Loaded, latest, load, start
from .saving import save
from .state import check_ranks

__all__ = ["Loaded", "check_ranks", "latest", "load", "save", "start"]
