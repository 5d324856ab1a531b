"""`mor flops`: parameters, FLOPs and key-value bytes of a recipe's model, or of a preset's variants side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from mor_model.config import ModelConfig
from mor_model.flops import by_kind, by_place, count_parameters, flops_per_token, kv_bytes_per_token
from mor_model.presets import PRESETS, preset
from pretrain.errors import UserError

app = typer.Typer(add_completion=False)


@app.command()
def flops(
    recipe: Annotated[str | None, typer.Argument(help="Recipe file whose model is counted.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to the recipe: section.key=value.")] = None,
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help=f"Instead of a recipe, all variants of a named size ({', '.join(PRESETS)})."),
    ] = None,
    recursions: Annotated[int, typer.Option(help="Recursions of the preset's recursive and MoR variants.")] = 3,
) -> None:
    """Count parameters, FLOPs per token and key-value bytes per token."""
    if recipe is not None and preset_name is None:
        from pretrain.recipe.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or [])
        _print_counts({loaded.name: (loaded.network, loaded.batch.sequence_length)})
    elif recipe is None and preset_name is not None:
        configs = {
            "vanilla": preset(preset_name),
            f"recursive R={recursions}": preset(preset_name, "recursive", recursions),
            f"MoR R={recursions}": preset(preset_name, "mor", recursions),
        }
        _print_counts({name: (config, config.context_length) for name, config in configs.items()})
    else:
        raise UserError(f"give either a recipe file or --preset with one of {', '.join(PRESETS)}.")


def _print_counts(models: dict[str, tuple[ModelConfig, int]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from data_prep.plain_text import cell

    counts = {name: _describe(config, length) for name, (config, length) in models.items()}
    table = Table(caption="Attention is counted as the causal half; training is 3 x forward.")
    table.add_column("")
    for name in models:
        table.add_column(cell(name), justify="right")
    for section in next(iter(counts.values())):
        fullest_first = sorted((count[section] for count in counts.values()), key=len, reverse=True)
        rows = dict.fromkeys(row for rows in fullest_first for row in rows)
        table.add_row(cell(section, style="bold"))
        for row in rows:
            table.add_row(cell(f"  {row}"), *(count[section].get(row, "-") for count in counts.values()))
        table.add_section()
    Console().print(table)


def _describe(config: ModelConfig, length: int) -> dict[str, dict[str, str]]:
    """The figures of one model: section -> row -> text."""
    parameters = count_parameters(config)
    count = flops_per_token(config, length)
    schedule = config.schedule
    return {
        "network": {
            "layer applications": str(len(schedule.applications)),
            "stored layers": str(schedule.num_stored),
            "tokens a sequence": f"{length:,}",
            "active at each step": " ".join(f"{capacity:.2f}" for capacity in config.capacities),
        },
        "stored parameters": {
            "layers": _millions(parameters.layers),
            "router": _millions(parameters.router),
            "norms": _millions(parameters.norms),
            "non-embedding": _millions(parameters.non_embedding_stored),
            "embedding": _millions(parameters.embedding),
            "head": _millions(parameters.head) if parameters.head else "tied",
            "total": _millions(parameters.total_stored),
        },
        "applied, non-embedding": {"of a full-depth token": _millions(parameters.applied)},
        "forward FLOPs per token": _written({**by_kind(count.components), "total": count.forward}),
        "of these, by place": _written(by_place(count.components)),
        "training FLOPs per token": _written({**by_kind(count.training_components), "total": count.training}),
        "cache per generated token": {"keys, values (16 bit)": f"{kv_bytes_per_token(config):,.0f} B"},
    }


def _written(flops: dict[str, float]) -> dict[str, str]:
    return {name.replace("_", " "): _millions(value) for name, value in flops.items()}


def _millions(value: float) -> str:
    return f"{value / 1e6:,.3f} M" if value < 1e6 else f"{value / 1e6:,.2f} M"
