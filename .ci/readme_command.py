# SPDX-License-Identifier: Apache-2.0
"""Print the one command that stands in the README under a heading: ``readme_command.py "Test it"``."""

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def command(heading: str) -> str:
    """The single line of the first ``sh`` block under ``## heading``.

    Args:
        heading: text of the heading.

    Returns:
        The line.
    """
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    if block is None or block[1].strip().count("\n"):
        sys.exit(f"README: '## {heading}' must be followed by one sh block of one line")
    return block[1].strip()


if __name__ == "__main__":
    print(command(sys.argv[1]))
