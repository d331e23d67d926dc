"""Commands as a container or a hardened unit runs them: no rights, a file system that cannot be written to.

`sandboxed` says how to start one from a test. The rest of this file is what becomes the command: it is run as a script.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65_534
_ACTION_ALLOW = 0x7FFF0000
_ACTION_EPERM = 0x00050001
_NR_UNKNOWN = -1

# Arguments: an empty directory, the directory that can be written to, those that can be read, "--", the command.
# The root is a file system in memory of its own, with the system, the interpreter and this project bound into it: a
# checkout below /root, which only root may enter, is as good as any.
_ENTER = """
set -eu
root=$1 data=$2; shift 2
mount -t tmpfs -o mode=755 tmpfs "$root"
mkdir -m 1777 "$root/tmp"
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$root/tmp"
show() { mkdir -p "$root$1"; mount --rbind "$1" "$root$1"; mount -o remount,bind,ro "$root$1"; }
while [ "$1" != -- ]; do show "$1"; shift; done
shift
for path in /bin /lib /lib64 /sbin; do if [ -L $path ]; then cp -P $path "$root$path"; else show $path; fi; done
for path in /usr /etc /proc /sys /dev; do show $path; done
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$root/dev/shm"
mkdir -p "$root$data"
mount --bind -o noexec "$data" "$root$data"
mount -o remount,ro "$root"
cd "$root"
exec chroot "$root" setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --bounding-set=-all \
    --no-new-privs "$@"
"""


def has_rights() -> bool:
    """Whether a file system of its own can be made here."""
    if os.geteuid() != 0:
        return False
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    tried = subprocess.run(mount, check=False, capture_output=True)
    return tried.returncode == 0


def allowed_calls(groups: Sequence[str]) -> set[str]:
    """Return the system calls of `groups` (as `SystemCallFilter=` has them) by what systemd says."""
    calls: set[str] = set()
    for group in groups:
        if not group.startswith("@"):
            calls.add(group)
            continue
        listed = subprocess.run(
            ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
        )
        names = [line.split("#")[0].strip() for line in listed.stdout.splitlines()[1:]]
        calls |= allowed_calls([name for name in names if name])
    return calls


def sandboxed(command: Sequence[str], root: Path, data: Path, readable: Sequence[Path], calls: set[str]) -> list[str]:
    """Return what runs `command` as nobody: reading the system, this project and `readable`, writing below `data`.

    `root` is an empty directory to mount on. `calls`: the system calls that are permitted; empty: all.
    """
    os.chown(data, NOBODY, NOBODY)
    shown = [str(path) for path in (Path(sys.base_prefix), Path(sys.prefix), ROOT, *readable)]
    enter = ["unshare", "--mount", "--propagation=private", "sh", "-c", _ENTER, "sandbox", str(root), str(data), *shown]
    return [*enter, "--", sys.executable, __file__, ",".join(sorted(calls)), *command]


def _permit(calls: Sequence[str]) -> None:
    """Let this process and its children make `calls` and no others; those fail with EPERM."""
    seccomp = ctypes.CDLL(ctypes.util.find_library("seccomp") or "libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_ACTION_EPERM))
    for call in calls:
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number != _NR_UNKNOWN:
            seccomp.seccomp_rule_add(context, _ACTION_ALLOW, number, 0)
    if seccomp.seccomp_load(context) != 0:
        raise OSError("the filter of system calls was refused")


def main() -> None:
    """Become the command."""
    calls, *command = sys.argv[1:]
    if calls:
        _permit(calls.split(","))
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
