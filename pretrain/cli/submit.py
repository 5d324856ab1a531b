"""`mor submit`: a recipe or an experiment as a chain of Slurm jobs."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def submit(
    file: Annotated[str, typer.Argument(metavar="RECIPE|EXPERIMENT", help="Recipe or experiment (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="Values to replace.")
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(metavar="NAME", help="Cluster of ~/.config/mor/clusters.yaml; `default`: the file's."),
    ] = "default",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of each training job.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs, and ranks, of each node.")] = None,
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks of each node without GPUs.")] = None,
    partition: Annotated[str | None, typer.Option(help="Passed to sbatch, as are account, qos and constraint.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of each job: 24:00:00, 2-12:00:00 or minutes.")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", "-s", help="Suite to evaluate afterwards; repeat it for several.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Training jobs of an experiment at once (0: all).")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the chain; submit nothing.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="Run the same chain on this machine, without Slurm.")] = False,
) -> None:
    """Submit the chain: (prepare,) train, evaluate(, report). `mor jobs` follows it."""
    from data_prep.plain_text import say
    from pretrain.cluster.clusters import load_cluster
    from pretrain.cluster.submit import is_experiment, plan_experiment, plan_recipe, run_locally
    from pretrain.cluster.submit import submit as send

    chosen = load_cluster(
        cluster,
        nodes=1 if local else nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        partition=partition,
        time=time,
        account=account,
        qos=qos,
        constraint=constraint,
    )
    if is_experiment(file):
        steps = plan_experiment(file, overrides or [], chosen, suite, limit)
    else:
        steps = plan_recipe(file, overrides or [], chosen, suite)
    if local and not dry_run:
        raise typer.Exit(run_locally(steps, chosen, say))
    numbers = send(steps, chosen, dry_run=dry_run, say=say)
    if dry_run:
        say("Slurm would accept every job; nothing was submitted.")
        return
    say(f"{len(numbers)} jobs were submitted. Each starts when those before it have ended; mor jobs follows them.")
    for step in steps:
        if step.script == "train":
            say(f"  {step.name}: log {step.log.replace('%j', numbers[step.name])}, run {step.run}")
