"""Errors that a person meets. The message says what is wrong and what to do next, in one line."""


class MegidoError(Exception):
    """Base of every error that is shown to a user as its message alone, without a trace."""

    exit_code = 1


class ConfigurationError(MegidoError):
    """A setting that cannot work. Found before anything is started; exit code 2."""

    exit_code = 2


class Unavailable(MegidoError):
    """Something that we depend on (Postgres, Kafka, a disk) cannot be reached now; trying again may help."""
