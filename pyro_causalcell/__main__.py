"""``python -m pyro_causalcell``: the command line."""

import sys

from pyro_causalcell.cli import main

if __name__ == "__main__":
    sys.exit(main())
