"""Print a command of README.md, so that CI runs the very text that a reader copies.

A command is the one line of the `sh` block that follows the comment `<!-- command: NAME -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def readme_command(name: str, text: str) -> str:
    """The command of that name; LookupError unless there is exactly one, of exactly one line."""
    found = re.findall(rf"^<!-- command: {re.escape(name)} -->\n+```sh\n([^\n]+)\n```$", text, re.MULTILINE)
    if len(found) != 1:
        message = f"README.md has {len(found)} one-line commands named {name!r}, not one"
        raise LookupError(message)
    return str(found[0])


if __name__ == "__main__":
    print(readme_command(sys.argv[1], (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")))
