"""The user's file and line of an equation."""

from __future__ import annotations

import os
import sys
import sysconfig
from typing import Any

import jax

_HERE = os.path.dirname(os.path.abspath(__file__))
_SITES = [sysconfig.get_path(k) for k in ("purelib", "platlib")]
_SITES.append(os.path.dirname(os.path.dirname(os.path.abspath(jax.__file__))))  # installed elsewhere: --user, --target
_LIBRARIES = tuple(
    os.path.join(site, name) + os.sep
    for site in dict.fromkeys(_SITES)
    for name in ("jax", "jaxlib", "flax", "equinox", "haiku", "optax")
)
_PYTHON = sysconfig.get_path("stdlib") + os.sep


def source_of(eqn: Any) -> str:
    """`file.py:12 (function)`: the innermost frame that belongs to neither a model library, Python nor jaxlrp."""
    trace = eqn.source_info.traceback
    for frame in trace.frames if trace is not None else ():
        if _is_users(frame.file_name):
            return f"{_short(frame.file_name)}:{frame.line_num} ({frame.function_name})"
    return ""


def _is_users(file: str) -> bool:
    if file.startswith(("<", *_LIBRARIES)) or os.path.dirname(file) in (_HERE, os.path.join(_HERE, "rules")):
        return False
    return not file.startswith(_PYTHON) or "site-packages" in file


def _short(file: str) -> str:
    """The path below the folder that Python found it in: the working directory, or an entry of `sys.path`."""
    folders = [os.path.join(os.path.abspath(f or "."), "") for f in (os.getcwd(), *sys.path)]
    return min((file.removeprefix(f) for f in folders), key=len)
