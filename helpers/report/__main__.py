"""Commands about results.

python -m helpers.report accept [name ...]   take the values measured last as the expected ones (all without a name)
python -m helpers.report html                write claims.json and report.html from what the notebooks left
"""

import sys

from helpers.report import accept, collect_claims, html_report


def main(words: list[str]) -> int:
    """Run one command and return the exit status."""
    match words:
        case ["accept", *names]:
            for name in accept(names):
                print(f"expected from now on: {name}")
        case ["html"]:
            collect_claims()
            print(html_report())
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
