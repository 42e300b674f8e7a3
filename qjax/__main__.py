"""`python -m qjax`: the same program as the `qjax` command."""

from qjax.cli.main import main

if __name__ == "__main__":
    main()
