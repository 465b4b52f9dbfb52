"""Run nx-27017, the sandbox's MongoDB-wire server, with a history of changes that lasts.

As it comes it keeps a collection's newest 1,000 changes once a reader has passed them, and starts a reader that comes
later at the oldest it has, without a word. A second lakehouse on the same sandbox, or one that rests, would lose changes.
"""

from __future__ import annotations

from nx_27017 import changestream, nx_27017

KEPT_CHANGES = 200_000

if __name__ == "__main__":
    assert changestream._RESUME_RETENTION_ROWS, "nx-27017 names its retention otherwise now"
    changestream._RESUME_RETENTION_ROWS = KEPT_CHANGES
    nx_27017.main()
