"""Paths for redirects, which must not lead to another site."""

from __future__ import annotations

import re


def local_path(text: str) -> str:
    """Return the text if it is a path of this site, else '/'."""
    return text if re.fullmatch(r"/(?!/)[\w\-.~:%?=&+/]*", text, re.ASCII) else "/"
