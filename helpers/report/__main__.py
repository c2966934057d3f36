"""Takes the values that `report.check` measured last as the expected ones.

python -m helpers.report accept [name ...]   (all without a name)
"""

import sys

from helpers.report import accept


def main(words: list[str]) -> int:
    """Run the command and return the exit status."""
    match words:
        case ["accept", *names]:
            for name in accept(names):
                print(f"expected from now on: {name}")
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
