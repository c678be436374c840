"""The command line: `fastlisten serve` runs a listener, `fastlisten hosts` asks the resolver."""

from fastlisten.cli.command import main

__all__ = ["main"]
