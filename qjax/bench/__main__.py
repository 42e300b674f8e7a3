"""`python -m qjax.bench kernels ...`, and `python -m qjax.bench ...` as `qjax bench ...`."""

import sys

import typer

from qjax.cli import bench, bench_kernels
from qjax.cli.main import run_app


def main(args: list[str]) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    kernels = args[:1] == ["kernels"]
    app.command()(bench_kernels.command if kernels else bench.command)
    run_app(app, args[1:] if kernels else args)


if __name__ == "__main__":
    main(sys.argv[1:])
