"""Run a program as another user, keeping only the right to pass file permissions. Standard library only.

PostgreSQL refuses to run as root. A plain change of user would fail where the program or its data lie below
a directory that only root may enter (a virtual environment under /root), so the one capability DAC_OVERRIDE
is kept, in the ambient set, over the change of user. Where the kernel refuses that (a container without
SETPCAP, another operating system) the user is changed plainly, which is enough when the paths are readable.

Run as root: `python unprivileged.py UID GID PROGRAM [ARGUMENT...]`. Replaces itself by the program.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION_3 = 0x20080522


def become(uid: int, gid: int) -> bool:
    """Become the user for good; returns whether DAC_OVERRIDE was kept."""
    os.setgroups([])
    os.setgid(gid)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    # Without this bit access(2), which initdb uses on its own files, would ignore the capability.
    kept = libc is not None and libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0
    os.setuid(uid)
    if libc is None or not kept:
        return False
    bit = 1 << CAP_DAC_OVERRIDE
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)
    if libc.capset(header, data) != 0:
        # Full capabilities must not stay: an unprivileged user it is, or nothing.
        nothing = (ctypes.c_uint32 * 6)()
        if libc.capset(header, nothing) != 0:
            raise OSError(ctypes.get_errno(), "capabilities cannot be given up")
        return False
    return bool(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0) == 0)


def main() -> None:
    uid, gid, *command = sys.argv[1:]
    become(int(uid), int(gid))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
