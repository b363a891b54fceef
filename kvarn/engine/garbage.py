"""Garbage collection at our own pace while steps run.

A step makes some objects for each sequence, and Python's collector looks through them every few
hundred allocations: that took about a third of the host's time in steps of 256 sequences. Counting
references frees them; what others leave in cycles is collected every so many steps.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PERIOD = 512  #: steps between collections of the young generations


@contextmanager
def paced() -> Iterator[Callable[[], None]]:
    """Automatic collection is off inside; call what is given after every step.

    Whoever had automatic collection on gets it back.
    """
    steps = 0

    def stepped() -> None:
        nonlocal steps
        steps += 1
        if steps % PERIOD == 0:
            gc.collect(1)

    was_on = gc.isenabled()
    gc.disable()
    try:
        yield stepped
    finally:
        if was_on:
            gc.enable()
