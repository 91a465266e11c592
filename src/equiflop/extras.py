"""Packages that equiflop can do without, and the extras that bring them."""

import importlib.util


def check_installed(package: str, extra: str, user: str) -> None:
    """See that a package is there.

    Args:
        package: the name of a module.
        extra: of equiflop, which brings it.
        user: what needs it, as the message begins.

    Raises:
        ImportError: if it is not; the message says what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{user} needs {package}; install it with: pip install 'equiflop[{extra}]'", name=package)
