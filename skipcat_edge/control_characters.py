"""Text of others on a terminal: shown, not obeyed."""

from __future__ import annotations

import re

# C0 without tab and newline, DEL, and C1, which some terminals take as ESC and a letter.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""`text` with each control character, such as those that a terminal's commands begin with, written out:
    `\x1b`. Tabs and newlines stay."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
