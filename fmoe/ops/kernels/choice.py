"""The choice among engines: the first that is able, or the one that is asked for."""

import os
from collections.abc import Sequence

from ...errors import argument_error


def chosen(function: str, override: str, able: Sequence[str], work: str) -> str:
    """The first of ``able``, unless the environment variable ``override`` names another of them."""
    wanted = os.environ.get(override, able[0])
    if wanted not in able:
        got, expected = repr(wanted), f"one of {list(able)}, which can do {work}"
        raise argument_error(function, override, got=got, expected=expected, remedy=f"Unset {override}.")
    return wanted
