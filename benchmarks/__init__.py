"""Measures fastlisten beside its peers: ``python -m benchmarks`` from a clone. See README.md."""
