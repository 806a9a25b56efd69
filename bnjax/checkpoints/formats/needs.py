"""The packages of formats, imported where they are used."""

import importlib
from typing import Any


def needed(module: str, extra: str) -> Any:
    """A module, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"This format needs {package}, which is not installed: `pip install {extra}`."
        ) from error
