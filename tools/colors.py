"""The colors of a map, as regions of a layout.

python -m tools.colors map.png
"""

import sys

from errors import InputError, info
from regional.images import colors_in
from regional.layout import MAX_REGIONS


def main() -> int:
    """Prints YAML to paste, prompts to be filled in; returns the exit code."""
    if len(sys.argv) != 2:
        info(__doc__.strip())
        return 2
    file = sys.argv[1]
    try:
        found = colors_in(file)
    except InputError as error:
        info(f"colors: {error}")
        return 2
    pixels = sum(count for count, _ in found)
    print(f"# {len(found) or 'too many'} colors\nmap: {file!r}\nregions:")
    for count, color in found[:MAX_REGIONS]:
        print(f'- {{color: "#{bytes(color).hex()}", prompt: }}  # {count / pixels:.1%}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
