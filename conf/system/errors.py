"""Errors for users: an entry file prints the message without a traceback and exits with status 2."""


class UserError(ValueError):
    """Something the user gave cannot work. The message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """The composed configuration is wrong: an unknown key or option, a missing value, a contradiction."""
