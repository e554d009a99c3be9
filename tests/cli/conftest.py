"""What the tests of the command share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jagtile.generator.cli import cli


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run ``jagtile`` with arguments; the exit code must be the one expected."""

    def call(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result

    return call


@pytest.fixture
def run_json(run: Callable[..., Result]) -> Callable[..., Any]:
    """Run ``jagtile`` with ``--json``; the parsed standard output."""

    def call(*arguments: str, code: int = 0) -> Any:
        return json.loads(run(*arguments, "--json", code=code).stdout)

    return call
