"""Errors that are the user's to mend: shown as one sentence, without a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, on the command line or in the data; the message says how to mend it."""


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist or holds nothing usable."""


class StuckError(UserError):
    """A process of ours has failed so that one must not wait for it: after the message the program ends."""
