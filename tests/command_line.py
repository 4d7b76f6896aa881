"""skipcat-edge's command line, called in this process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from skipcat_edge.cli import main


def run(*arguments: object, stdin: str | None = None) -> Result:
    """`skipcat-edge ARGUMENTS`."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def run_json(*arguments: object) -> Any:
    """What the command, which must not fail, says with --json."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
