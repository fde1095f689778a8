"""Which version of a library an integration was tested with, and whether another one still fits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence


def check_version(
    library: str, installed: str, tested: str, needs: Mapping[str, tuple[Callable | None, Sequence[str]]]
) -> None:
    """Go on silently with the tested version, and with a warning where another one still has what is needed.

    tested: a version prefix, "1.16" fits 1.16.0 and 1.16.3. needs: name -> (function or None where it is missing, the
    parameters it is called with). Raises ImportError for another version that lacks one of them.
    """
    if installed == tested or installed.startswith(tested + "."):
        return
    missing = [name for name, (function, _) in needs.items() if function is None]
    for name, (function, wanted) in needs.items():
        if function is not None:
            found = inspect.signature(function).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in found.values()):
                missing += [f"{name}({parameter})" for parameter in wanted if parameter not in found]
    if missing:
        raise ImportError(
            f"mr1fast was tested with {library} {tested}; {library} {installed} has no {', '.join(missing)}. "
            f"Install {library} {tested}."
        )
    warnings.warn(f"mr1fast was tested with {library} {tested}, not with {installed}; going on", stacklevel=3)
