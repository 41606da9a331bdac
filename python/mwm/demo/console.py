"""What the demo says while it runs: numbered steps with the time since the start."""

from __future__ import annotations

import sys
import time
from pathlib import Path


class Console:
    """Prints steps and lines; keeps the clock.

    Args:
        steps: how many steps there will be.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def begin(self, title: str) -> None:
        """Announce the next step."""
        self.step += 1
        minutes, seconds = divmod(int(self.seconds), 60)
        self.say(f"\n[{minutes}:{seconds:02}] {self.step}/{self.steps}  {title}")

    def say(self, line: str = "") -> None:
        """Print a line, in order with the progress bars on stderr."""
        sys.stderr.flush()
        print(line, flush=True)

    def wrote(self, *paths: Path) -> None:
        """Say which files were written."""
        self.say(f"       wrote {', '.join(path.name for path in paths)}")
