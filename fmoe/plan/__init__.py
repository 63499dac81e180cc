"""Plans: what a training step will hold and send, before anything runs (``python -m fmoe plan``)."""

from .planning import Plan, copies_per_token, plan
from .stage import StagePlan
from .table import report

__all__ = ["Plan", "StagePlan", "copies_per_token", "plan", "report"]
