"""A user's mistake as one line."""


class UserError(ValueError):
    """A mistake of the user's: one line on stderr and exit code 2."""
