"""Errors meant for users: an entry file prints the message alone, without a traceback, and exits with status 2."""


class UserError(ValueError):
    """Something the user gave cannot work. The message says what is wrong, where, and what to do."""


class ConfigError(UserError):
    """The composed configuration is wrong: unknown key or group option, missing value, contradiction."""
