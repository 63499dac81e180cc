"""Pipelines: schedules as values, and what they cost on a simulated clock."""

from .clock import Action, Costs, Timed
from .schedule import InFlight, Schedule, bubble, from_computations, in_flight, make_schedule, timeline

__all__ = [
    "Action", "Costs", "InFlight", "Schedule", "Timed", "bubble", "from_computations", "in_flight",
    "make_schedule", "timeline",
]  # fmt: skip
