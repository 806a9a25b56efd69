"""Import the packages that formats need where they are used."""

import importlib
from typing import Any


def needed(module: str, extra: str) -> Any:
    """Import a module, or raise an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"This format needs {package}, which is not installed: `pip install {extra}`."
        ) from error
