"""The laws of fmoe as functions to call on a backend, experts or a router of one's own."""

from .backend import check_backend
from .experts import check_experts
from .report import Found, LawBroken, Report
from .router import check_router

__all__ = ["Found", "LawBroken", "Report", "check_backend", "check_experts", "check_router"]
