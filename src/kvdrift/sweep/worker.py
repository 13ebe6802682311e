"""A worker of the local backend: `python -m kvdrift.sweep.worker` reads jobs, a line of JSON each, and answers each.

It ends with its driver: the driver's death closes stdin, which a thread watches while a job computes.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import traceback


def main() -> None:
    """Answer jobs until stdin ends. What a model prints goes to stderr; the answers have a descriptor of their own."""
    gc.set_threshold(1_000_000, 20, 20)  # as the command itself does
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.Queue[str] = queue.Queue()

    def watch() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the driver is gone, or wants nothing more

    threading.Thread(target=watch, daemon=True).start()
    from kvdrift.sweep.backend import call

    while True:
        job = json.loads(lines.get())
        try:
            answer: dict[str, object] = {"value": call(job["function"], job["payload"])}
        except Exception as error:  # noqa: BLE001  # one cell's failure is that cell's outcome
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        answers.write(json.dumps({"id": job["id"], **answer}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
