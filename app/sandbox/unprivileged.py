"""Run a program as another user that may still bypass file permissions. Standard library only.

PostgreSQL refuses to run as root. Changing the user alone would fail if the program or its data are in a directory that
only root may enter (a virtual environment under /root), so the capability DAC_OVERRIDE is kept in the ambient set. Where
the kernel refuses that (a container without SETPCAP, another operating system), only the user is changed, which is
enough if the paths are readable.

Run as root: `python unprivileged.py UID GID PROGRAM [ARGUMENT...]`. Replaces itself with the program.
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
    """Change to the user permanently. Return whether DAC_OVERRIDE was kept."""
    os.setgroups([])
    os.setgid(gid)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    # without this bit, access(2), which initdb uses on its own files, would ignore the capability
    kept = libc is not None and libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0) == 0
    os.setuid(uid)
    if libc is None or not kept:
        return False
    bit = 1 << CAP_DAC_OVERRIDE
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)
    if libc.capset(header, data) != 0:
        # the process must not keep all capabilities: give up every one, or fail
        nothing = (ctypes.c_uint32 * 6)()
        if libc.capset(header, nothing) != 0:
            raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")
        return False
    return bool(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0) == 0)


def main() -> None:
    uid, gid, *command = sys.argv[1:]
    become(int(uid), int(gid))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
