"""Worker processes: a parent that binds, starts them, and replaces them without losing a client."""

from fastlisten._workers.child import Worker, worker
from fastlisten._workers.totals import WorkersStats
from fastlisten._workers.workers import Workers

__all__ = ["Worker", "Workers", "WorkersStats", "worker"]
