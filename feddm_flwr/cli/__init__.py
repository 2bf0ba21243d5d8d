"""The `feddm` command."""
