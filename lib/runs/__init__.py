"""What a notebook's run was, what it measured and which of its claims hold."""

from lib.runs.record import ClaimError, Run

__all__ = ["ClaimError", "Run"]
