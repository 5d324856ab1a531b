"""`mor doctor`: what of this machine works, and what to do about the rest."""

from __future__ import annotations

import typer

app = typer.Typer(add_completion=False)
_MARKS = {"ok": "[green]ok[/green]", "absent": "[yellow]--[/yellow]", "broken": "[red]XX[/red]"}


@app.command()
def doctor() -> None:
    """Look at this machine; exits with 1 when something is broken without which training fails."""
    from rich.console import Console
    from rich.markup import escape

    from pretrain.doctor import examine

    console = Console(highlight=False, soft_wrap=True)
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        console.print(f"{_MARKS[finding.state]}  {finding.name:<{width}}  {escape(finding.detail)}")
        if finding.advice:
            console.print(f"    {'':<{width}}  -> {escape(finding.advice)}")
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
