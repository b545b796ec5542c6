"""A program by itself: which paths match a cohort's patterns. In a process of its own, an endless match can be stopped.

It reads ``[patterns, paths]`` from its input and writes ``[path, groups]`` of every match of the first pattern that
has any, both as JSON.
"""

import json
import re
import sys


def main() -> None:
    """Match what stands in the input."""
    patterns, paths = json.load(sys.stdin)
    found = []
    for pattern in patterns:
        expression = re.compile(pattern)
        matches = [expression.fullmatch(path) for path in paths]
        found = [[match[0], match.groupdict()] for match in matches if match]
        if found:
            break
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
