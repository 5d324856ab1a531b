"""`mor submit`: a recipe or an experiment as a chain of Slurm jobs."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

app = typer.Typer(add_completion=False)


@app.command()
def submit(
    file: Annotated[str, typer.Argument(metavar="RECIPE|EXPERIMENT", help="Recipe or experiment (YAML).")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[section.key=value ...]", help="Values to replace."),
    ] = None,
    cluster: Annotated[Optional[str], typer.Option(help="Cluster of ~/.config/mor/clusters.yaml.")] = None,  # noqa: UP045
    nodes: Annotated[Optional[int], typer.Option(min=1, help="Nodes of each training job.")] = None,  # noqa: UP045
    gpus_per_node: Annotated[Optional[int], typer.Option(min=0, help="GPUs, and ranks, of each node.")] = None,  # noqa: UP045
    tasks_per_node: Annotated[Optional[int], typer.Option(min=1, help="Ranks of each node, without GPUs.")] = None,  # noqa: UP045
    partition: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    time: Annotated[Optional[str], typer.Option(help="Time limit of each job: 24:00:00 or 2-12:00:00.")] = None,  # noqa: UP045
    account: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    qos: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    constraint: Annotated[Optional[str], typer.Option()] = None,  # noqa: UP045
    suite: Annotated[Optional[list[str]], typer.Option("--suite", "-s", help="Suites to evaluate afterwards.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(min=0, help="Training jobs of an experiment at once (0: all).")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the chain; submit nothing.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="Run the same chain on this machine, without Slurm.")] = False,
) -> None:
    """Submit the chain: (prepare,) train, evaluate(, report). `mor jobs` follows it."""
    from data_prep.plain_text import say
    from pretrain.cluster.profiles import load_profile
    from pretrain.cluster.submit import check_time, is_experiment, plan_experiment, plan_recipe, run_locally
    from pretrain.cluster.submit import submit as send

    profile = load_profile(
        cluster,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        tasks_per_node=tasks_per_node,
        partition=partition,
        time=time,
        account=account,
        qos=qos,
        constraint=constraint,
    )
    if local:
        profile = profile.model_copy(update={"nodes": 1})
    check_time(profile)
    if is_experiment(file):
        steps = plan_experiment(file, overrides or [], profile, suite, limit)
    else:
        steps = plan_recipe(file, overrides or [], profile, suite)
    if local and not dry_run:
        raise typer.Exit(run_locally(steps, profile, say))
    numbers = send(steps, profile, dry_run=dry_run, say=say)
    if dry_run:
        typer.echo("Slurm would accept every job; nothing was submitted.")
        return
    typer.echo(f"{len(numbers)} jobs are submitted, each started when those before it are done: mor jobs follows them.")
    for step in steps:
        if step.script == "train":
            say(f"  {step.name}: log {step.log.replace('%j', numbers[step.name])}, run {step.run}")
