"""`mor import hf`: a Llama checkpoint as a vanilla network, or as the first weights of a recursive one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from data_prep.plain_text import say

app = typer.Typer(add_completion=False)


@app.callback()
def import_() -> None:
    """Import a checkpoint of another library."""


@app.command()
def hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with config.json and model.safetensors of a Llama.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder to make; it gets weights/ and, if there is one, tokenizer/.", show_default=False),
    ],
    variant: Annotated[
        str, typer.Option(help="vanilla: unchanged. recursive, mor: with shared layers, to be trained further.")
    ] = "vanilla",
    recursions: Annotated[int, typer.Option(min=2, help="Recursions of recursive and mor.")] = 3,
    sharing: Annotated[str, typer.Option(help="Which layers recursive and mor share.")] = "middle_cycle",
    initialization: Annotated[
        str, typer.Option(help="Shared layers start from layers at even steps (stepwise) or from the mean (average).")
    ] = "stepwise",
) -> None:
    """Read a Llama checkpoint of Hugging Face transformers."""
    from safetensors import SafetensorError

    from pretrain.errors import RunError, UserError
    from pretrain.records.run_folder import require_writable

    if variant not in ("vanilla", "recursive", "mor"):
        raise UserError(f"--variant {variant}: not one of vanilla, recursive, mor.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder.")

    require_writable(out.parent)

    from mor_model.config import ExpertChoiceConfig
    from mor_model.flops import count_parameters
    from mor_model.hub.importing import import_hf
    from mor_model.weights import save_weights

    shared = variant != "vanilla"
    config, state = import_hf(
        checkpoint,
        sharing=sharing if shared else "none",
        recursions=recursions if shared else 1,
        router=ExpertChoiceConfig() if variant == "mor" else None,
        initialization=initialization,  # type: ignore[arg-type]  # checked there
    )
    known = [checkpoint / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    present = [file for file in known if file.is_file()]
    try:
        save_weights(out / "weights", state, config)
        if present:
            (out / "tokenizer").mkdir()
        for file in present:
            shutil.copyfile(file, out / "tokenizer" / file.name)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        shutil.rmtree(out, ignore_errors=True)  # it was absent or empty
        raise RunError(f"{out}: not written ({error}); make room, or choose another folder.") from None
    count = count_parameters(config)
    say(f"{out / 'weights'}: {count.total_stored / 1e6:,.1f} M parameters, {len(config.schedule.applications)} layers")
