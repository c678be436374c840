"""A folder that `fastlisten run` puts first into PYTHONPATH; Python's `site` imports its sitecustomize.

As a package it is only here so that it is installed.
"""
