"""Entry point of a training process, alike under every launcher:

deepspeed pretrain/train.py --config RECIPE [section.key=value ...]
torchrun --nproc-per-node 8 pretrain/train.py --config RECIPE
srun python pretrain/train.py --config RECIPE          mpirun -n 8 python pretrain/train.py --config RECIPE
python pretrain/train.py --config RECIPE               mor train RECIPE
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

if __package__ in (None, ""):
    # Started as a file: this folder is on the path in place of its parent, and would shadow modules of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.errors import DataError
from data_prep.plain_text import say
from mor_model.errors import ConfigError
from pretrain.errors import MeetingError, UserError
from pretrain.ranks.environment import Ranks, prepare_environment
from pretrain.ranks.signals import EXIT_FAILED, EXIT_FINISHED, EXIT_USER
from pretrain.recipe.recipe import load_recipe


def main(arguments: list[str] | None = None, program: str = "train") -> int:
    """Train as the command line says; returns the exit code. A message for a person is printed once, without a
    traceback, and begins with the name of the `program`.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments, program)
    ranks: Ranks | None = None
    try:
        ranks = prepare_environment()
        return _train(options, ranks)
    except (UserError, DataError, ConfigError) as error:
        # The first rank of every node reports the error: a file may be missing on one node only.
        if ranks is None or ranks.local_rank == 0:
            place = f" (rank {ranks.rank})" if ranks is not None and ranks.rank else ""
            with contextlib.suppress(OSError):
                say(f"{program}{place}: {error}", error=True)
        return EXIT_FAILED if isinstance(error, MeetingError) else EXIT_USER


def app(args: list[str], prog_name: str) -> NoReturn:
    """`mor train`: train in this process, and end it."""
    leave(main(args, prog_name))


def _train(options: argparse.Namespace, ranks: Ranks) -> int:
    recipe = load_recipe(options.config, options.overrides)
    if options.run_dir:
        # Not as an override, whose value is YAML: 'run #2' would be the folder 'run'.
        recipe = recipe.model_copy(update={"run_dir": options.run_dir})
    if options.print:
        if ranks.rank == 0:
            print(recipe.to_yaml(), end="", flush=True)
        return EXIT_FINISHED
    from pretrain.records.profiling import parse_steps
    from pretrain.training.prepare import prepare

    profiled = parse_steps(options.profile) if options.profile is not None else None
    prepared = prepare(recipe, ranks)
    if options.dry_run:
        from pretrain.training.dry_run import describe

        if ranks.rank == 0:
            say(describe(prepared, ranks))
        return EXIT_FINISHED
    if all(part.finished for part in prepared.parts):
        if ranks.rank == 0:
            say(f"{recipe.name}: already finished; its weights are in {prepared.folder.weights}. Nothing to do.")
        return EXIT_FINISHED
    from pretrain.training.run import execute

    return execute(prepared, ranks, profiled)


def _parse(arguments: list[str], program: str) -> argparse.Namespace:
    """The command line of every form of start: RECIPE comes first, or is named by `--config`."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train RECIPE, or continue where it stopped.",
        epilog="On several devices: deepspeed pretrain/train.py --config RECIPE",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help="recipe file (YAML) and changes")
    parser.add_argument("--config", metavar="RECIPE", help="the recipe file, if it is not the first word")
    parser.add_argument("--run-dir", metavar="FOLDER", help="run folder, instead of the recipe's")
    parser.add_argument("--print", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, estimate memory and time, and stop")
    parser.add_argument("--profile", metavar="STEPS", help="profile these steps (5-7, counted from 1) into RUN/profile")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    words = [options.config, *options.words] if options.config else options.words
    if not words:
        parser.error("the recipe file is missing")
    options.config, *options.overrides = words
    return options


def leave(code: int) -> NoReturn:
    """Exit with `code` also if the last lines cannot be written (full disk, closed terminal)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
