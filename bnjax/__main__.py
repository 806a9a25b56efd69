"""`python -m bnjax`, and the script `bnjax`."""

import gc
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        import typer as _  # noqa: F401 - it is looked for here, so that its absence has an answer
    except ModuleNotFoundError:
        sys.exit("The command line of bnjax needs typer: pip install 'bnjax[tools]'")
    from bnjax.cli import app

    # What is imported stays until the end. To look for garbage in it, again and again while torch
    # is imported and once more at the exit, takes a fourth of the time of a short command.
    gc.set_threshold(100_000)
    try:
        app(prog_name="bnjax")
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
