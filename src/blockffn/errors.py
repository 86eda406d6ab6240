"""Errors that a user can act on, besides `ValueError` and `OSError`."""

from __future__ import annotations


class UserFacingError(RuntimeError):
    """Something outside the program's control went wrong; the message says what, and what to do."""
