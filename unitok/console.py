"""What the verbs of the command line share: one plain line for what fails, quiet libraries, tables that fit."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

PLAIN = (ValueError, OSError, ImportError, MemoryError, NotImplementedError)  # say themselves what is wrong
LIBRARIES = {"huggingface_hub", "httpx", "pyarrow", "safetensors", "safetensors_rust", "torch", "yaml"}  # so do theirs
WIDE = 200  # columns of a table that goes into a file


class Verbs(TyperGroup):
    """The verbs. One that fails ends with one plain line on stderr, and its traceback before it with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.TyperException, typer.Exit, typer.Abort):  # wrong usage, and ends that are meant
            raise
        except KeyboardInterrupt as error:
            fail(f"interrupted: {error}" if str(error) else "interrupted", error, ctx)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            fail(f"error: {plain_line(error)}", error, ctx)
            raise typer.Exit(1) from None


def fail(line: str, error: BaseException, ctx: typer.Context) -> None:
    if ctx.params.get("debug"):
        traceback.print_exception(error)
    print(line, file=sys.stderr)


def plain_line(error: BaseException) -> str:
    """What went wrong in one line; an error that nobody foresaw has its type named."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    homes = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    if isinstance(error, PLAIN) or homes & LIBRARIES:
        return text
    return f"{type(error).__name__}: {text} (not foreseen; --debug shows where)"


def program_options_first(args: list[str]) -> list[str]:
    """--debug may stand anywhere before a `--`."""
    end = args.index("--") if "--" in args else len(args)
    front = [arg for arg in args[:end] if arg == "--debug"]
    return front + [arg for arg in args[:end] if arg != "--debug"] + args[end:]


def quiet() -> None:
    """No warnings of libraries about one another; their errors still arrive."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of worker processes
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns after every fork
    for name in ("DeepSpeed", "accelerate", "datasets", "diffusers", "peft", "torch"):
        logging.getLogger(name).addFilter(_is_error)  # they set their own levels when they are imported


def _is_error(record: Any) -> bool:
    return record.levelno >= 40  # logging.ERROR


def no_bars() -> None:
    """No progress bar for every file of weights that transformers reads or writes; downloads keep theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_table(item: Any) -> None:
    """A rich table or text; in a file it may be wide, so that nothing is cut off."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDE, soft_wrap=isinstance(item, str)).print(item)
