"""Entry point of `python -m bnjax` and of the script `bnjax`."""

import gc
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        import typer as _  # noqa: F401 - to explain what to install if it is missing
    except ModuleNotFoundError:
        sys.exit("The command line of bnjax needs typer: pip install 'bnjax[tools]'")
    from bnjax.cli import app

    # Imported modules live until exit. Collecting garbage among them, repeatedly while torch loads
    # and once more at exit, takes a quarter of the time of a short command.
    gc.set_threshold(100_000)
    try:
        app(prog_name="bnjax")
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
