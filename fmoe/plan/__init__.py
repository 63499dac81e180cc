"""Plans: what a training step will hold, send and take, before anything runs (``python -m fmoe plan``)."""

from .planning import Plan, copies_per_token, plan
from .rank import RankPlan
from .rates import Link, Rates, read_rates
from .table import report
from .time import Time

__all__ = ["Link", "Plan", "RankPlan", "Rates", "Time", "copies_per_token", "plan", "read_rates", "report"]
