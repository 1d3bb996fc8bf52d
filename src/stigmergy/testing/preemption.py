"""Threads that lose the processor where it hurts: between any two lines, or any two opcodes, of the code under test.

Plain stress finds few races under the GIL, which is rarely handed over in the middle of things. Here a tracer hands it
over, at random places drawn from a seed, so often that calls of different threads overlap.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import stigmergy

__all__ = ["preemption"]

_INTERVAL = 1e-6


@contextmanager
def preemption(
    seed: object, *, between: Literal["line", "opcode"] | None, share: float = 0.05, inside: Path | None = None
) -> Iterator[None]:
    """Preempt the threads that are started within the block.

    Args:
        seed: what the places are drawn from; the operating system has its say, too.
        between: what to hand over between; `None` leaves it to a switch interval of a microsecond.
        share: at how many of the places, from 0 to 1.
        inside: the folder of the code under test; by default this package. Files of `stigmergy.testing` are left alone.

    """
    folder = str(Path(stigmergy.__file__).parent if inside is None else inside)
    ours = str(Path(__file__).parent)
    draw = random.Random(str(seed)).random

    def begin(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(folder) or name.startswith(ours):
            return None
        frame.f_trace_opcodes = between == "opcode"
        return step

    def step(_: FrameType, event: str, __: Any) -> Any:
        if event == between and draw() < share:
            time.sleep(0)
        return step

    interval, tracer = sys.getswitchinterval(), threading.gettrace()
    sys.setswitchinterval(_INTERVAL)
    if between == "opcode":
        _ask_for_opcodes()
    if between is not None:
        threading.settrace(begin)
    try:
        yield
    finally:
        threading.settrace(tracer)
        sys.setswitchinterval(interval)


def _ask_for_opcodes() -> None:
    """Have threads that are started from now on traced by opcode, if one of their frames wants that.

    CPython 3.12 does so only if a frame had wanted it before the thread began to be traced. On 3.13 the first call of
    each function goes untraced whatever one does.
    """

    def ask(frame: FrameType, *_: Any) -> None:
        frame.f_trace_opcodes = True

    threading.settrace(ask)
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
