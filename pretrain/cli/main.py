"""`mor`: one command, thin over the packages. A subcommand's module is imported only when that subcommand runs."""

from __future__ import annotations

import importlib
import sys

import click
import typer.core
import typer.main

from data_prep.errors import DataError
from mor_model.errors import ConfigError
from pretrain.errors import UserError

_COMMANDS = {
    "prep": ("data_prep.cli", "Corpora to shards: tokenize, train a tokenizer, inspect, verify."),
    "train": ("pretrain.cli.train", "Train one recipe."),
    "eval": ("pretrain.cli.eval", "Perplexity, few-shot suites and routing analysis of a run."),
    "generate": ("pretrain.cli.generate", "Continue a prompt, showing each token's depth."),
    "compare": ("pretrain.cli.compare", "Plan, run and report a FLOPs-matched comparison."),
    "submit": ("pretrain.cli.submit", "Send a recipe or an experiment to Slurm."),
    "jobs": ("pretrain.cli.jobs", "Follow submitted jobs."),
    "runs": ("pretrain.cli.runs", "List run folders with state, progress and last loss."),
    "export": ("pretrain.cli.export", "Write a run's weights for Hugging Face transformers."),
    "import": ("pretrain.cli.import_", "Bring a Hugging Face Llama checkpoint in."),
    "flops": ("pretrain.cli.flops", "Parameters, FLOPs and key-value bytes of a model."),
    "doctor": ("pretrain.cli.doctor", "What of this machine works, and what to do about the rest."),
}


class _LazyGroup(click.Group):
    """Lists every subcommand from the table above and imports only the one that is called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[name][0])
        command = typer.main.get_command(module.app)
        command.name = name
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mor-pretrain")
def cli() -> None:
    """Pretrain Mixture-of-Recursions and vanilla transformers, and compare them at equal FLOPs."""


def main() -> None:
    """Run `mor`; an error meant for a person is printed as its message alone and exits with 2."""
    try:
        cli(prog_name="mor")
    except (ConfigError, DataError, UserError) as error:
        print(f"mor: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
