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
        found = colors_in(file, MAX_REGIONS)
    except InputError as error:
        info(f"colors: {error}")
        return 2
    print(f"map: {file!r}\nregions:")
    for color, fraction in found:
        print(f'- {{color: "{color}", prompt: }}  # {fraction:.1%}')
    if len(found) == MAX_REGIONS:
        rest = 1 - sum(fraction for _, fraction in found)
        print(f"# {rest:.1%} of the pixels have other colors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
