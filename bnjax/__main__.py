"""`python -m bnjax`, and the script `bnjax`."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        import typer as _  # noqa: F401 - it is looked for here, so that its absence has an answer
    except ModuleNotFoundError:
        sys.exit("The command line of bnjax needs typer: pip install 'bnjax[tools]'")
    from bnjax.cli import app

    app(prog_name="bnjax")


if __name__ == "__main__":
    main()
