"""The whole pipeline on the scans that the package ships, in a few minutes: `mwm demo`."""

from __future__ import annotations

from mwm.demo.run import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
