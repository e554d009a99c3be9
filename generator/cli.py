"""The ``jagtile`` command. Each verb has a module of its own, which parses and prints; what it does lives elsewhere.

Exit codes: 0 all right, 1 the user's error (or one of the system), 2 no compiler, 3 no GPU, 4 a result was wrong.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

import jagtile
from jagtile.generator.cli_common import GpuMissingError, VerificationError
from jagtile.runtime.errors import (
    CompilerNotFoundError,
    IllegalConfigError,
    JagtileError,
    SettingError,
    UnsupportedError,
)

VERBS = ("generate", "build", "tune", "bench", "report", "explain", "db", "pack", "doctor")


class Verbs(click.Group):
    """Finds ``cli_<verb>.py`` when its verb is asked for, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = getattr(importlib.import_module(f"jagtile.generator.cli_{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> NoReturn:
        options["standalone_mode"] = False
        sys.exit(_exit_code(lambda: super(Verbs, self).main(args, *rest, **options)))


def _exit_code(run: Callable[[], object]) -> int:
    try:
        result = run()
    except click.ClickException as error:
        error.show()
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except GpuMissingError as error:
        code, message = 3, str(error)
    except VerificationError as error:
        code, message = 4, str(error)
    except CompilerNotFoundError as error:
        code, message = 2, str(error)
    except (JagtileError, UnsupportedError, IllegalConfigError, SettingError) as error:
        code, message = 1, str(error)
    except OSError as error:  # a file that an option names, or a full disk
        code, message = 1, str(error)
    else:
        return result if isinstance(result, int) else 0
    click.echo(f"Error: {message}", err=True)
    return code


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(jagtile.__version__, message="%(version)s")
def cli() -> None:
    """Attention kernels for jagged batches: generate, build, tune, look up.

    A spec says what is computed (fwd_bf16_d128_causal), a config how (its tile sizes and other knobs); a variant is
    TARGET/SPEC/CONFIG. `jagtile VERB --help` explains each verb.
    """


def main() -> NoReturn:
    """Entry point of the console script."""
    cli.main(prog_name="jagtile")


if __name__ == "__main__":
    main()
