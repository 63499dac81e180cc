"""The laws of fmoe, as functions that check a backend, experts or a router of your own."""

from .backend import check_backend
from .experts import check_experts
from .report import Found, LawBroken, Report
from .router import check_router

__all__ = ["Found", "LawBroken", "Report", "check_backend", "check_experts", "check_router"]
