"""What a person must change: a message that says what, where and what to do; printed without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base of every error whose message alone is meant for the person at the terminal."""


class RecipeError(UserError):
    """A recipe or experiment file that cannot be used."""


class RunError(UserError):
    """A run folder that is missing something, damaged, or belongs to another recipe."""


class LaunchError(UserError):
    """Ranks, launchers or machines that do not fit together."""


class MeetingError(LaunchError):
    """Ranks that do not reach one another: another start, elsewhere or later, may go well without a change."""
