"""What a user may choose for a bench."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Choices that the benches' `cases` read.

    Attributes:
        smoke: tiny cases with names that no bar judges, to see that everything runs.
        compiled: torch.compile of the dense network is a rival, too; compiling takes minutes.
        encoder: timm names instead of the chosen ones (encoder).
        hidden: hidden shares instead of the chosen ones (encoder, layers).
        batch: images instead of the chosen number (encoder, layers).
        bf16: bfloat16 instead of float32, together with `encoder` or `hidden`; layers: in any case.
    """

    smoke: bool = False
    compiled: bool = False
    encoder: tuple[str, ...] = ()
    hidden: tuple[float, ...] = ()
    batch: int | None = None
    bf16: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every bench."""
    parser.add_argument("--csv", metavar="FILE", help="append every row here as soon as it is measured")
    parser.add_argument("--json", metavar="FILE", help="the same, one JSON object per line")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, seconds: to see that it runs")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains this")
    parser.add_argument("--part", choices=("bars", "rest"), help="only the cases that a bar judges, or only the others (default: first those, then the others)")
    parser.add_argument("--pairs", type=_positive, metavar="N", help="interleaved pairs instead of the bench's own number")
    parser.add_argument("--threads", type=_positive, metavar="N", help="torch threads (default: torch's)")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None,
                        help="encoder: torch.compile of the dense network is a rival, too (default: only in `all`)")
    parser.add_argument("--encoder", nargs="+", metavar="NAME", default=[], help="encoder: timm names")
    parser.add_argument("--hidden", nargs="+", type=_percent, metavar="PERCENT", default=[], help="encoder, layers: hidden patches, per cent")
    parser.add_argument("--batch", type=_positive, metavar="N", help="encoder, layers: images (default: 8)")
    parser.add_argument("--bf16", action="store_true", help="encoder (with --encoder or --hidden), layers: bfloat16 on every side")


def settings_of(options: argparse.Namespace, *, compiled: bool) -> Settings:
    """Settings from parsed options; `compiled` where the user left that open."""
    return Settings(options.smoke, compiled if options.compiled is None else options.compiled, tuple(options.encoder),
                    tuple(share / 100 for share in options.hidden), options.batch, options.bf16)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"must be in [0, 100), got {value:g}")
    return value
