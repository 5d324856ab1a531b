"""`mor generate`: continue a prompt; on a terminal, each token in the colour of the recursion steps it took."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.text import Text

    from data_prep.tokenizers.base import Tokenizer

app = typer.Typer(add_completion=False)

_COLOURS = ("grey58", "cyan", "green", "yellow", "magenta", "red", "blue", "bright_white")


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="Run folder that `mor train` wrote.", show_default=False)],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeat the option for several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token; above 0: sample.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens (0: all).")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens with this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Recursion steps of every token; routers are ignored.")
    ] = None,
    device: Annotated[str | None, typer.Option(show_default="cuda if there is a GPU", help="cpu or cuda.")] = None,
) -> None:
    """Continue each prompt with the model of RUN."""
    from pretrain.errors import RunError, UserError
    from pretrain.records.run_folder import RunFolder

    folder = RunFolder.existing(run)
    if not folder.weights.is_dir():
        raise RunError(f"{folder}: holds no weights/ yet; `mor train` writes them when the run finishes.")
    if not prompt:
        raise UserError('give a text to continue with --prompt "...".')

    from rich.console import Console

    from data_prep.tokenizers.loading import load_tokenizer
    from mor_model.generation import generate as continue_prompts
    from mor_model.weights import load_model

    tokenizer = load_tokenizer(folder.tokenizer)
    model = load_model(folder.weights, device=_device(device))
    # A document begins after an END_OF_DOCUMENT, so an empty prompt means a new document.
    prompts = [tokenizer.encode(text) or [tokenizer.eod_id] for text in prompt]
    console = Console(highlight=False)
    with console.status(f"Generating up to {max_new_tokens} tokens"):
        found = continue_prompts(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eod_id,
            depth=depth,
        )
    for text, ids, tokens, depths in zip(prompt, prompts, found.tokens, found.depths):
        pieces = spell(tokenizer, ids, tokens, depths)
        if console.is_terminal:
            console.print(_coloured(text, pieces))
        else:
            print(text + "".join(piece for piece, _ in pieces))
    if console.is_terminal:
        console.print(_legend([taken for depths in found.depths for taken in depths], model.config.recursions))


def _device(name: str | None) -> torch.device:
    import torch

    from pretrain.errors import UserError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]}).") from None
    return device


def spell(tokenizer: Tokenizer, prompt: list[int], tokens: list[int], depths: list[int]) -> list[tuple[str, int]]:
    """Text that each generated token adds, with its depth; END_OF_DOCUMENT adds none.

    A token may hold part of a character; its text then appears with the token that completes it.
    """
    pieces = []
    shown = tokenizer.decode(prompt)
    for count, (token, depth) in enumerate(zip(tokens, depths), 1):
        if token == tokenizer.eod_id:
            break
        text = tokenizer.decode(prompt + tokens[:count])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and count < len(tokens):
            continue
        pieces.append((text[len(shown) :], depth))
        shown = text
    return pieces


def _coloured(prompt: str, pieces: list[tuple[str, int]]) -> Text:
    from rich.text import Text

    from data_prep.plain_text import plain

    text = Text(plain(prompt, lines=True), style="bold")
    for piece, depth in pieces:
        text.append(plain(piece, lines=True), style=f"not bold {_COLOURS[depth % len(_COLOURS)]}")
    return text


def _legend(depths: list[int], recursions: int) -> Text:
    """The colour of each depth, and the share of tokens that took it."""
    from rich.text import Text

    counts = Counter(depths)
    text = Text("\nrecursion steps taken to predict a token: ", style="dim")
    for depth in range(min(counts), recursions + 1):
        text.append(f" {depth} ", style=f"reverse {_COLOURS[depth % len(_COLOURS)]}")
        text.append(f" {counts[depth] / len(depths):.0%}  ", style="dim")
    text.append(f"mean {sum(depths) / len(depths):.2f} of {recursions}", style="dim")
    return text
