"""Take away what a process that decodes hostile media does not need. Linux; elsewhere only the limits apply."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

ADDRESS_SPACE_BYTES = 2 << 30
_NOBODY = 65_534
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def confine(parent_pid: int) -> None:
    """Give up rights and bind this process's life to its parent's.

    Call it when everything is imported and the media is open: no further file can be opened, none written, no memory
    beyond 2 GiB of address space taken, no core dumped; root becomes nobody.

    Args:
        parent_pid: the process to die with.

    Raises:
        SystemExit: if the parent is gone already.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # a container may lack the capability; the limits below still hold
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    for limit, value in (
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays open
    ):
        _, hard = resource.getrlimit(limit)
        lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lowered, lowered))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # after the change of user, which would clear it
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)
