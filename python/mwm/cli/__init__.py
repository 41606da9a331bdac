"""The command line: parse, make a config, call. Each command is a module of this room with `add_arguments` and `run`.

Only the module of the command that was typed is imported, so that `mwm --help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import mwm
from mwm.cli.errors import EXPLAINED, INTERRUPTED, report

COMMANDS = {
    "demo": "run the whole pipeline on the scans that the package ships, in a few minutes",
    "localize": "turn a prompt and images into regions",
    "prompts": "list prompt sets, or have a language model write more",
    "preview": "look at regions and masks before training",
    "pretrain": "pre-train an encoder on unlabelled images",
    "finetune": "train a pre-trained encoder on labels, masks or boxes, or probe it",
    "predict": "apply a trained model to images",
    "study": "compare arms over data sets and folds, from pre-training to tables",
    "info": "versions, processor, and which backend runs which op here",
    "bench": "measure the kernels on this machine",
    "tune": "find the convolutions' block sizes for this machine's GPU",
}

_WARNED: set[str] = set()

USAGE = {"localize": "IMAGES ", "localize check": "IMAGES ", "localize eval": "REGIONS MASKS ", "localize choose": "IMAGES ", "localize train": "IMAGES MASKS ",
         "prompts": "[SET] ", "preview": "IMAGES ", "pretrain": "IMAGES ", "finetune": "RUN DATA ", "predict": "RESULTS IMAGES ", "bench": "[NAME] ", "study": "CONFIG "}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process where left out.

    Returns:
        The exit code: 0 when done, 1 for a failure nobody foresaw, 2 for one that its message explains, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not debug and argv is None:
        warnings.showwarning = _one_line
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nmwm: stopped by Ctrl-C. What was written is whole; `mwm pretrain --resume` continues a run from its last checkpoint.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) went away: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return report(error)


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None) -> None:
    """A warning as the sentence it is, once, without the place in our code; under torchrun, of the first process alone."""
    text = f"mwm: warning: {message}\n"
    if text not in _WARNED and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(text)
    _WARNED.add(text)


def _dispatch(words: list[str]) -> int:
    command = words[0] if words else None
    if command not in COMMANDS:
        parser = _parser()
        parser.parse_args(words)  # prints help, the version, or the error, and exits
        parser.print_help()
        return 2 if words else 0
    module, rest = importlib.import_module(f"mwm.cli.{command}"), words[1:]
    inner = getattr(module, "SUBCOMMANDS", {})  # a folder of such a name is written ./check
    if rest and rest[0] in inner:
        module, command, rest = importlib.import_module(inner[rest[0]]), f"{command} {rest[0]}", rest[1:]
    parser = Parser(prog=f"mwm {command}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    usage=f"mwm {command} {USAGE.get(command, '')}[options]", epilog="--debug shows the traceback of an error.")
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest), words) or 0


class Parser(argparse.ArgumentParser):
    """A parser whose refusal is one sentence, like every other refusal of the program."""

    def error(self, message: str) -> NoReturn:
        print(f"mwm: {message}. See `{self.prog} --help`.", file=sys.stderr)
        sys.exit(EXPLAINED)


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="mwm", formatter_class=argparse.RawDescriptionHelpFormatter, usage="mwm COMMAND [options]   (mwm COMMAND --help explains one)",
        description=f"Mask What Matters: text-guided masked image modelling for medical images.\n\ncommands:\n{lines}",
        epilog="Begin with `mwm demo`. Research software: not for clinical use.")
    parser.add_argument("command", nargs="?", metavar="COMMAND", choices=tuple(COMMANDS), help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"mwm {mwm.__version__}")
    return parser
