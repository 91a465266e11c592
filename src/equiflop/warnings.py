"""The warning class of this library."""


class EquiflopWarning(UserWarning):
    """Something is allowed but probably not what was meant."""
