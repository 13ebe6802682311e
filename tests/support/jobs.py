"""Jobs without a model, for tests of what runs them. A worker imports this module, so that it imports nothing slow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def answer(payload: dict[str, Any]) -> dict[str, Any]:
    """A job: dies as often as it is told, writes down when it ran, and returns its process."""
    place = Path(payload["place"])
    tried = len(list(place.glob(f"{payload['name']}.*")))
    (place / f"{payload['name']}.{tried}").touch()
    if tried < payload.get("deaths", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    time.sleep(payload.get("seconds", 0.0))
    return {"process": os.getpid(), "began": began, "ended": time.monotonic()}


def nap(payload: dict[str, Any]) -> dict[str, Any]:
    """A job that takes its time."""
    time.sleep(payload["seconds"])
    return {"process": os.getpid(), "node": os.environ.get("RAY_NODE_ID")}


def fail(payload: dict[str, Any]) -> dict[str, Any]:
    """A job that breaks."""
    raise ValueError("broken on purpose")
