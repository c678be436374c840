"""Drop-in for `http`: everything is the original's; see `server`."""

from http import *  # noqa: F403
from http import __all__ as __all__
