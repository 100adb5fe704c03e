"""Kill a process before each of its system calls in turn."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Callable, Iterator

import pytest

_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E  # linux/ptrace.h
_TELL_APART, _ENTRY = 1, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def kills(work: Callable[[], object]) -> Iterator[int]:
    """Yield 0, 1, … each after a fork of this process was killed when it had made so many system calls of `work`.

    Ends when one got to the end of `work`. What `work` changed in memory is lost with its process.

    Skips the test where the system does not let a process trace its child.
    """
    calls = 0
    while _killed_after(calls, work):
        yield calls
        calls += 1


def _killed_after(calls: int, work: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        gc.disable()
        traced = _libc.ptrace(_TRACEME, 0, None, None) == 0
        os.kill(os.getpid(), signal.SIGSTOP if traced else signal.SIGKILL)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        pytest.skip("a process may not trace its child here (ptrace)")
    _ptrace(_SETOPTIONS, child, _TELL_APART)
    while os.WIFSTOPPED(status) and calls >= 0:
        _ptrace(_SYSCALL, child, 0)
        _, status = os.waitpid(child, 0)
        if os.WIFSTOPPED(status) and _is_entry(child):
            calls -= 1
    if not os.WIFSTOPPED(status):
        assert status == 0, f"the work failed: {status}"
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _is_entry(child: int) -> bool:
    info = ctypes.create_string_buffer(88)
    _ptrace(_GET_SYSCALL_INFO, child, ctypes.addressof(info), len(info))
    return info.raw[0] == _ENTRY


def _ptrace(request: int, child: int, data: int, address: int = 0) -> None:
    if _libc.ptrace(request, child, address, data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")
