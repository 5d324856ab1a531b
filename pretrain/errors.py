"""Errors that a person can fix: the message says what is wrong, where, and what to do; printed without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base of all errors of which a person sees the message alone."""


class RecipeError(UserError):
    """A recipe or experiment file that cannot be used."""


class RunError(UserError):
    """A run folder that is missing something, damaged, or belongs to another recipe."""


class LaunchError(UserError):
    """Ranks, launchers or machines that do not fit together."""


class MeetingError(LaunchError):
    """Ranks that do not reach one another: another start, elsewhere or later, may succeed without a change."""
