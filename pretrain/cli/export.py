"""`mor export`: a run's weights in the format of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_prep.plain_text import say

app = typer.Typer(add_completion=False)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder that `mor train` wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="Format; hf is Hugging Face transformers.")] = "hf",
) -> None:
    """Write the model of RUN to OUT: weights, configuration, tokenizer and, where needed, modelling code."""
    from pretrain.errors import RunError, UserError
    from pretrain.records.run_folder import RunFolder, require_writable

    if to != "hf":
        raise UserError(f"--to {to}: not a format; hf is the only one.")
    folder = RunFolder.existing(run)
    if not folder.weights.is_dir():
        raise RunError(f"{folder}: holds no weights/ yet; `mor train` writes them when the run finishes.")

    from safetensors import SafetensorError

    from mor_model.hub.export import export_hf
    from mor_model.hub.llama import is_llama
    from mor_model.weights import load_model

    require_writable(out.parent)
    model = load_model(folder.weights)
    try:
        export_hf(model, folder.tokenizer, out)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise RunError(f"{out}: not written ({error}); make room, or choose another folder.") from None
    how = "" if is_llama(model.config) else ", trust_remote_code=True"
    say(f'{out}: load it with AutoModelForCausalLM.from_pretrained("{out}"{how})')
