"""What stands in for the package `spaces`: decorated generators run in a forked process, as on ZeroGPU.

Arguments and what is yielded are pickled; of an error only the name of its class comes back, in an error of
the page's kind; whoever asks for more seconds than there are is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PACKAGE = """
import multiprocessing
import os
import pickle

ctx = multiprocessing.get_context("fork")
asked = []


class Error(Exception):
    def __init__(self, message, title):
        super().__init__(message)
        self.message, self.title = message, title


def GPU(task=None, *, duration=None, size=None):
    if task is None:
        return lambda task: GPU(task, duration=duration)

    def handler(*args):
        asked.append(duration(*args))
        if asked[-1] > int(os.environ.get("SECONDS_LEFT", "1000")):
            raise Error(f"You have exceeded your quota ({asked[-1]}s requested)", "ZeroGPU quota exceeded")
        given, results = ctx.SimpleQueue(), ctx.SimpleQueue()
        stopped = ctx.Event()
        process = ctx.Process(target=work, args=(task, given, results, stopped), daemon=True)
        process.start()
        given.put(args)
        try:
            while True:
                kind, value = results.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise Error(value, "ZeroGPU worker error")
                yield value
        except GeneratorExit:
            stopped.set()
            while results.get()[0] != "end":
                pass
            raise
        finally:
            process.join()

    return handler


def work(task, given, results, stopped):
    running = task(*given.get())
    try:
        for value in running:
            if stopped.is_set():
                running.close()
                break
            results.put(("value", value))
    except Exception as error:
        results.put(("error", type(error).__name__))
    results.put(("end", None))
"""


def write(folder: Path) -> dict[str, Any]:
    """Put the package there → the variables of a process that finds it, as in a Space."""
    package = folder / "spaces"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    return {"PYTHONPATH": str(folder), "SPACES_ZERO_GPU": "true", "OMP_NUM_THREADS": "1"}
