"""`python -m mwm` is the command `mwm`; also what `torchrun -m mwm` starts."""

from __future__ import annotations

import sys

from mwm.cli import main

if __name__ == "__main__":  # loader workers that are spawned import this file again
    sys.exit(main())
