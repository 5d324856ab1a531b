"""`mor doctor`: what of this machine works, and what to do about the rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False)
_MARKS = {"ok": "[green]ok[/green]", "absent": "[yellow]--[/yellow]", "broken": "[red]XX[/red]"}


@app.command()
def doctor(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Also examine a cluster's nodes, by a job of a few minutes.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes to examine with --cluster.")] = 2,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node to examine.")] = 0,
    partition: Annotated[Optional[str], typer.Option(help="Their partition.")] = None,  # noqa: UP045
) -> None:
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
    sound = not any(finding.state == "broken" for finding in findings)
    if cluster:
        options = [f"--nodes={nodes}", *([f"--gpus-per-node={gpus_per_node}"] if gpus_per_node else [])]
        options += [f"--partition={partition}"] if partition else []
        sound = _examine_cluster(console, options, nodes) and sound
    if not sound:
        raise typer.Exit(1)


def _examine_cluster(console: Console, options: list[str], nodes: int) -> bool:
    """Print one line for each node; whether all are fit to train together."""
    import shutil
    from pathlib import Path

    from rich.markup import escape

    from pretrain.cluster.health import examine_cluster, judge
    from pretrain.errors import LaunchError

    if not shutil.which("srun"):
        raise LaunchError("--cluster: there is no srun here; run this on a cluster's login node.")
    folder = Path.cwd() / f".health-{time.time_ns()}"
    try:
        reports, said = examine_cluster(folder, options, nodes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if len(reports) < nodes:
        console.print(
            f"{_MARKS['broken']}  {len(reports)} of {nodes} nodes wrote a report; srun said: {escape(said.strip())}"
        )
    problems = judge(reports, list(reports))
    for host, report in reports.items():
        mark = _MARKS["broken" if host in problems else "ok"]
        facts = [f"{report['cores']} cores", f"{report['gpus']} GPUs {', '.join(report['gpu_names'])}".strip()]
        facts += [f"matrix product {report['matmul_tflops']:.3g} TFLOP/s"] if "matmul_tflops" in report else []
        facts += [f"all-reduce {report['reduce_gbytes']:.3g} GB/s"] if "reduce_gbytes" in report else []
        console.print(f"{mark}  {host}  {escape('; '.join(facts))}")
        if host in problems:
            console.print(f"      -> {escape(problems[host])}")
    return len(reports) == nodes and not problems
