"""The `qjax` command: one module a subcommand; each imports what it needs when it is run."""
