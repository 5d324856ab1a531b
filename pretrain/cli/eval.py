"""`mor eval RUN...`: perplexity, few-shot suites and routing analysis of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

_DEFAULT = ["perplexity", "own", "routing"]


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that `mor train` wrote.", show_default=False)],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            "-s",
            help="Suite to run; repeat it for several, `all` for every one. (unless given: perplexity, own, routing)",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions of each task (documents for perplexity).")
    ] = None,
    routing: Annotated[
        str, typer.Option(help="causal, or topk: the training-time selection, which looks ahead.")
    ] = "causal",
    depth: Annotated[
        int | None, typer.Option(min=1, help="Every token takes so many recursion steps; routers are ignored.")
    ] = None,
    text_bytes: Annotated[
        int | None, typer.Option(min=1, help="Held-out text to read for perplexity, in bytes. (unless given: 500000)")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data set folder whose held-out text is read; the recipe's unless given.")
    ] = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="Read benchmarks without local files from the Hugging Face hub.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the accelerator where there is one, unless given.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
) -> None:
    """Evaluate RUNS and write RUN/evaluation/<suite>.json; what was evaluated before, unchanged, is read again."""
    from data_prep.files import write_text
    from pretrain.errors import RunError
    from pretrain.evaluation.evaluate import Incomplete, evaluate_run, require_writable_for_all
    from pretrain.evaluation.evaluation_ranks import evaluation_ranks
    from pretrain.evaluation.settings import TEXT_BYTES, Settings, check_routing
    from pretrain.evaluation.suite_progress import suite_progress
    from pretrain.evaluation.suites import check_suites
    from pretrain.evaluation.summary import markdown_summary, print_summary
    from pretrain.records.run_folder import RunFolder

    settings = Settings(
        limit=limit, routing=check_routing(routing), depth=depth, text_bytes=text_bytes or TEXT_BYTES, hub=hub
    )
    suites = check_suites(suite or _DEFAULT)
    folders = [RunFolder.existing(path) for path in runs]
    names = [run.name for run in folders]
    results, problems = {}, []
    with evaluation_ranks(device) as (place, reports):
        if markdown is not None:
            require_writable_for_all(markdown.parent)
        for run in folders:
            title = run.name if names.count(run.name) == 1 else str(run)
            with suite_progress(title, reports) as progress:
                try:
                    results[title] = evaluate_run(
                        run, suites, device=place, settings=settings, data=data, progress=progress
                    )
                except Incomplete as error:
                    results[title] = error.results
                    problems.append(str(error))
    if not reports:
        return
    if any(results.values()):
        print_summary(results)
        if markdown is not None:
            try:
                write_text(markdown, markdown_summary(results))
            except OSError as error:
                problems.append(f"{markdown}: not written ({error.strerror or error}).")
    if problems:
        raise RunError(" ".join(dict.fromkeys(problems)))
