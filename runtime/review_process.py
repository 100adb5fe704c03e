"""The review process: `python -m vmad_edge.runtime.review_process PARENT BUNDLE HASH DEVICE PLANS`.

It ends with its parent, whatever it is busy with. Its standard input ends too then, but not where a fork of the parent
lives on; and nothing written in Python is heeded while a library that loads leaves it no turn.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import cast

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent: the id of the process that has that thread.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before
        os._exit(0)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    # These take long.
    from vmad_edge.runtime.engines import Device
    from vmad_edge.runtime.engines.plans import Plans
    from vmad_edge.runtime.review import Server

    Server().serve(Path(sys.argv[2]), sys.argv[3], cast(Device, sys.argv[4]), Plans(Path(sys.argv[5])))
