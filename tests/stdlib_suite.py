"""Run one of the standard library's own test modules with drop-ins in the originals' place.

`python tests/stdlib_suite.py socketserver,http.server test.test_httpservers [unittest's arguments]`
"""

import importlib
import sys
import unittest


def put_in_place(name: str) -> None:
    """Have `import NAME` give fastlisten's module of that name, in every way to write it."""
    dropin = importlib.import_module(f"fastlisten.{name}")
    sys.modules[name] = dropin
    package, _, last = name.rpartition(".")
    if package:
        setattr(importlib.import_module(package), last, dropin)


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        put_in_place(name)
    unittest.main(module=sys.argv[2], argv=[sys.argv[0], *sys.argv[3:]])
