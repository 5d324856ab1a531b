"""The commands of `python -m data_prep` and `mor prep`. Importing this is cheap; commands import what they need."""

from __future__ import annotations

import typer

from data_prep.commands import corpora, datasets, tokenize, tokenizers

app = typer.Typer(
    help="Corpora to training shards.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for _commands in (tokenize.app, datasets.app, corpora.app):
    app.registered_commands += _commands.registered_commands
app.add_typer(tokenizers.app, name="tokenizer")
