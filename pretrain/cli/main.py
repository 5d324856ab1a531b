"""`mor`: one command, thin over the packages. A subcommand's module is imported only when that subcommand runs."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

from data_prep.errors import DataError
from data_prep.plain_text import say
from mor_model.errors import ConfigError
from pretrain.errors import UserError

_COMMANDS = {
    "prep": ("data_prep.cli", "Corpora to shards: tokenize, train a tokenizer, inspect, verify."),
    "train": ("pretrain.train", "Train one recipe."),
    "eval": ("pretrain.cli.eval", "Perplexity, few-shot suites and routing analysis of a run."),
    "generate": ("pretrain.cli.generate", "Continue a prompt, showing each token's depth."),
    "compare": ("pretrain.cli.compare", "Plan, run and report a FLOPs-matched comparison."),
    "submit": ("pretrain.cli.submit", "Send a recipe or an experiment to Slurm."),
    "jobs": ("pretrain.cli.jobs", "Follow submitted jobs."),
    "runs": ("pretrain.cli.runs", "List run folders with state, progress and last loss."),
    "export": ("pretrain.cli.export", "Write a run's weights for Hugging Face transformers."),
    "import": ("pretrain.cli.import_", "Import a Hugging Face Llama checkpoint."),
    "flops": ("pretrain.cli.flops", "Parameters, FLOPs and key-value bytes of a model."),
    "doctor": ("pretrain.cli.doctor", "What works on this machine, and what to do about the rest."),
}


_USAGE = """\
Usage: mor COMMAND [OPTIONS]

Pretrain Mixture-of-Recursions and vanilla transformers, and compare them at equal FLOPs.

Commands:
{commands}

`mor COMMAND --help` describes a command; `mor --version` prints the version."""


def main() -> None:
    """Run `mor`; an error meant for a person is printed as its message alone and exits with 2."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_USAGE.format(commands="\n".join(f"  {name:<8}  {text}" for name, (_, text) in _COMMANDS.items())))
        return
    if name == "--version":
        print(importlib.metadata.version("mor-pretrain"))
        return
    if name not in _COMMANDS:
        from pretrain.recipe.messages import nearest, shorten

        sys.exit(f"mor: no command {shorten(name)}; {nearest(name, _COMMANDS)}")
    try:
        importlib.import_module(_COMMANDS[name][0]).app(args=arguments, prog_name=f"mor {name}")
    except (ConfigError, DataError, UserError) as error:
        say(f"mor {name}: {error}", error=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
