"""Run `bnjax` in this process."""

from typer.testing import CliRunner

from bnjax.cli import app


def run(*arguments: object) -> tuple[int, str]:
    """The exit code and all output, on a wide terminal."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output
