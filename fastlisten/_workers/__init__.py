"""Worker processes: a parent that binds, starts them, and replaces them without losing a client.

A fresh worker imports of it what a worker needs: nothing is imported here.
"""
