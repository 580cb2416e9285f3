"""Where the packages lie that the networks' weights come in."""

from importlib.util import find_spec
from pathlib import Path


def folder(name: str, extra: str) -> Path:
    """The folder of an installed package, which is not imported: some would load what only they need.

    ImportError if it is not installed; `extra` is the one of jaxlrp that installs it.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'the package {name} is missing: pip install "jaxlrp[{extra}]"')
    return Path(spec.submodule_search_locations[0])
