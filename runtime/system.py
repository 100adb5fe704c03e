"""The systems that this runs on."""

from __future__ import annotations

import platform

from vmad_edge.runtime.errors import VmadError


def check_system() -> None:
    """Only Linux tells what the runtime needs, such as the processors allowed to a process.

    Raises:
        VmadError: another system.
    """
    if (system := platform.system()) != "Linux":
        raise VmadError(
            f"vmad-edge runs on Linux (x86-64, aarch64); this is {system or 'an unknown system'} ({platform.machine()})"
        )
