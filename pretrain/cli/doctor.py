"""`mor doctor`: what of this machine works, and what to do about the rest."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from pretrain.cluster.clusters import Cluster

app = typer.Typer(add_completion=False)
_MARKS = {"ok": ("ok", "green"), "absent": ("--", "yellow"), "broken": ("XX", "red")}
# On a larger cluster only nodes that are not fit have a line, so that the report stays one page.
_EACH_HAS_A_LINE = 16
_MEASURED = {
    "matmul_tflops": "matrix product, TFLOP/s:",
    "reduce_gbytes": "all-reduce of all, GB/s:",
    "pair_gbytes": "all-reduce with a neighbour, GB/s:",
    "skew": "clock, s:",
}


@app.command()
def doctor(
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Also examine nodes of this cluster of ~/.config/mor/clusters.yaml, by a job of a few minutes; "
            "`default` is the file's default.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, show_default="the cluster's", help="Nodes to examine.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of each node to examine.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of these nodes.")] = None,
) -> None:
    """Examine this machine; exits with 1 if something that training needs is broken."""
    from rich.console import Console

    from data_prep.plain_text import cell
    from pretrain.cluster.doctor import examine

    console = Console(highlight=False, soft_wrap=True)
    findings = examine()
    width = max(map(len, findings))
    for name, finding in findings.items():
        console.print(_marked(finding.state, f"{name:<{width}}  {finding.detail}"))
        if finding.advice:
            console.print(cell(f"    {'':<{width}}  -> {finding.advice}"))
    works = not any(finding.state == "broken" for finding in findings.values())
    if cluster is not None:
        from pretrain.cluster.clusters import load_cluster

        chosen = load_cluster(cluster, nodes=nodes, gpus_per_node=gpus_per_node, partition=partition)
        works = _examine_cluster(console, chosen) and works
    if not works:
        raise typer.Exit(1)


def _examine_cluster(console: Console, cluster: Cluster) -> bool:
    """Print one page about the nodes of a job; whether all are fit to train together."""
    from data_prep.plain_text import cell
    from pretrain.cluster.health import examine_cluster, judge
    from pretrain.cluster.submit import job_environment, slurm_options
    from pretrain.errors import LaunchError

    if not shutil.which("srun"):
        raise LaunchError("--cluster: there is no srun here; run this on a cluster's login node.")
    # The examination has its own time limit.
    untimed = cluster.model_copy(update={"time": None})
    options = slurm_options(untimed, nodes=cluster.nodes, gpus=cluster.gpus_per_node, tasks=None)
    folder = Path.cwd() / f".health-{time.time_ns()}"
    console.print()
    console.print(cell(f"{cluster.nodes} nodes: srun {' '.join(options)}"))
    try:
        reports, printed = examine_cluster(folder, options, cluster.nodes, job_environment(cluster))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    problems = judge(reports, list(reports))
    for host, report in sorted(reports.items()):
        if host in problems or len(reports) <= _EACH_HAS_A_LINE:
            console.print(_marked("broken" if host in problems else "ok", f"{host}  {_facts(report)}"))
        if host in problems:
            console.print(cell(f"      -> {problems[host]}"))
    for key, name in _MEASURED.items():
        found = [report[key] for report in reports.values() if key in report]
        if found and len(reports) > 1:
            console.print(f"    {name} from {min(found):.3g} to {max(found):.3g}")
    if len(reports) < cluster.nodes:
        missing = f"{len(reports)} of {cluster.nodes} nodes wrote a report into {folder.parent}; srun printed:"
        console.print(_marked("broken", missing))
        for line in printed.strip().splitlines():
            console.print(cell(f"    {line}"))
    fit = len(reports) - len(problems)
    console.print(f"{fit} of {cluster.nodes} nodes are fit to train together.")
    return fit == cluster.nodes


def _marked(state: str, text: str) -> Text:
    from data_prep.plain_text import cell

    mark, colour = _MARKS[state]
    return cell(mark, style=colour).append_text(cell(f"  {text}", style="default"))


def _facts(report: dict[str, Any]) -> str:
    """A node's report in one line."""
    facts = [f"{report['cores']} cores", f"{report['gpus']} GPUs {', '.join(report['gpu_names'])}".strip()]
    if "gpu_free_share" in report:
        facts.append(f"{report['gpu_free_share']:.0%} of their memory free")
    facts += [f"{name} {report[key]:.3g}" for key, name in _MEASURED.items() if key in report]
    if "meeting" in report:
        facts.append(f"meets by {report['meeting']}")
    return "; ".join(facts)
