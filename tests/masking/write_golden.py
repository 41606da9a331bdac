"""Add the masks of new settings to the golden file; existing entries are never changed.

Run from anywhere: python tests/masking/write_golden.py
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def main() -> int:
    """Write missing entries; returns 1 where an existing entry differs from today's masks."""
    here = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location("test_policies", here / "test_policies.py")
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    golden = json.loads(tests.GOLDEN.read_text()) if tests.GOLDEN.exists() else {}
    changed = []
    for name, settings in tests.SETTINGS.items():
        rows = tests.as_rows(tests.draw(tests.build(settings)))
        if golden.setdefault(name, rows) != rows:
            changed.append(name)
    tests.GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    if changed:
        print(f"masks differ from the golden file: {', '.join(changed)}. Runs that were started before cannot resume with them.", file=sys.stderr)
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
