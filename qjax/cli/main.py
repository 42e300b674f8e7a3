"""The `qjax` command: subcommands, and how an error looks."""

import os
import sys
from collections.abc import Sequence

import typer

from pallas_kernels.measurements import TableError
from qjax.cli import (
    bench,
    chat,
    convert,
    doctor,
    evaluate,
    generate,
    inspect,
    methods,
    plan,
    pull,
    quantize,
    recommend,
    report,
    serve,
    tune,
)
from qjax.errors import QjaxError

app = typer.Typer(
    help="Run and make quantized language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    *(generate, chat, serve, pull, inspect, plan, recommend, quantize, convert),
    *(methods, tune, report, doctor),
):
    app.command()(command.command)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")


@app.callback()
def _root() -> None:
    pass


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    run_app(app, args)


def run_app(app: typer.Typer, args: Sequence[str] | None) -> None:
    """Runs a command; an error of ours is one line on stderr and exit code 1."""
    try:
        app(args)
    except (QjaxError, TableError) as error:
        if os.environ.get("QJAX_DEBUG"):
            raise
        print(f"qjax: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
