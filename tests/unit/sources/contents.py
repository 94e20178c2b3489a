"""What raw files of these tests hold."""

from __future__ import annotations

import hashlib


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


LINES = b'{"text": "a"}\n'
