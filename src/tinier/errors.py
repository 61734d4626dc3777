"""Everything that tinier raises on purpose.

TinierError
├── InputError        the user's model, data, option or file is wrong; the message names the fix  (exit code 2)
│   ├── ModelError    the model cannot be read, run or traced
│   ├── DataError     the data cannot be read, or does not fit the model or the metric
│   └── OutputError   the output folder cannot be written
├── MissingError      an optional dependency is not installed; the message has the install command  (exit code 2)
├── RefusedError      a method or target cannot take this network, with the operator and the reason
└── ParityError       an artifact computes something else than its simulation
"""


class TinierError(Exception):
    """Base of all errors raised on purpose."""


class InputError(TinierError, ValueError):
    """What the user handed in is wrong; the message says where, what it got, what it needed and what to do."""


class ModelError(InputError):
    """The model cannot be read, run or traced."""


class DataError(InputError):
    """The data cannot be read, or does not fit the model or the metric."""


class OutputError(InputError):
    """The output folder cannot be written."""


class MissingError(TinierError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: what is missing, as pip names it.
        extra: the extra of tinier that installs it.
        purpose: what it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: pip install 'tinier[{extra}]'"
        )


class RefusedError(TinierError):
    """A method or target cannot take this network."""


class ParityError(TinierError):
    """An artifact computes something else than its simulation."""
