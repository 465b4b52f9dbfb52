"""Run nx-27017, the sandbox's MongoDB-compatible server, with a longer change history.

By default it keeps a collection's newest 1,000 changes once a reader has read them, and silently starts a later reader at
the oldest change that is left. A second lakehouse on the same sandbox, or one that pauses, would lose changes.
"""

from __future__ import annotations

from nx_27017 import changestream, nx_27017

KEPT_CHANGES = 200_000

if __name__ == "__main__":
    assert changestream._RESUME_RETENTION_ROWS, "nx-27017 has renamed its retention setting"
    changestream._RESUME_RETENTION_ROWS = KEPT_CHANGES
    nx_27017.main()
