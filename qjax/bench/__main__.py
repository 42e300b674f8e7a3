"""`python -m qjax.bench ...` as `qjax bench ...`."""

import sys

from qjax.cli.bench import app
from qjax.cli.main import run_app


def main(args: list[str]) -> None:
    run_app(app, args)


if __name__ == "__main__":
    main(sys.argv[1:])
