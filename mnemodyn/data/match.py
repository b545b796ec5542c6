"""A program by itself: which paths match a cohort's patterns. In a process of its own, an endless match can be stopped.

It reads ``[patterns, paths]`` from its input and writes, for every pattern, ``[number of the path, groups]`` of its
matches, both as JSON.
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
        matches = [(i, expression.fullmatch(path)) for i, path in enumerate(paths)]
        found.append([(i, match.groupdict()) for i, match in matches if match])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
