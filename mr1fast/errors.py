"""Mistakes of the user's, explained in one sentence."""


class UserError(ValueError):
    """Printed without a traceback; the program ends with exit code 2."""
