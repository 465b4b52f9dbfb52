"""Static files of the pages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).parent
MEDIA_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Asset:
    """A static file. Its path contains a digest of its content, so browsers may cache it indefinitely."""

    path: str
    content: bytes
    media_type: str


def load_assets(directory: Path = DIRECTORY / "static") -> dict[str, Asset]:
    """Return the static files of a directory by file name."""
    assets = {}
    for file in sorted(directory.iterdir()):
        if file.suffix in MEDIA_TYPES:
            content = file.read_bytes()
            name = f"{file.stem}-{hashlib.sha256(content).hexdigest()[:12]}{file.suffix}"
            assets[file.name] = Asset(f"/static/{name}", content, MEDIA_TYPES[file.suffix])
    return assets
