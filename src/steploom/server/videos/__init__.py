"""``/v1/videos``: jobs that outlive the connection that asked for them, and the process that runs them."""

from __future__ import annotations
