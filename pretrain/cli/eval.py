"""`mor eval RUN...`: perplexity, few-shot suites and routing analysis of finished runs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.evaluation.settings import HELD_OUT_SUITES, TEXT_BYTES

if TYPE_CHECKING:
    from data_prep.terminal import ProgressBars

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that `mor train` wrote.", show_default=False)],
    suite: Annotated[
        list[str], typer.Option("--suite", "-s", help="Suite to run; repeat it for several, `all` for every one.")
    ] = list(HELD_OUT_SUITES),  # noqa: B006
    limit: Annotated[
        int | None, typer.Option(min=1, help="Largest number of questions of each task (documents for perplexity).")
    ] = None,
    routing: Annotated[
        str, typer.Option(help="causal, or topk: the training-time selection, which looks ahead.")
    ] = "causal",
    depth: Annotated[
        int | None, typer.Option(min=1, help="Recursion steps that every token takes; routers are ignored.")
    ] = None,
    text_bytes: Annotated[
        int, typer.Option(min=1, help="Held-out text to read for perplexity, in bytes.")
    ] = TEXT_BYTES,
    data: Annotated[
        Path | None, typer.Option(show_default="the recipe's", help="Data set folder whose held-out text is read.")
    ] = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="Read benchmarks without local files from the Hugging Face hub.")
    ] = False,
    device: Annotated[str | None, typer.Option(show_default="cuda if there is a GPU", help="cpu or cuda.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
) -> None:
    """Evaluate RUNS and write RUN/evaluation/<suite>.json. Results that still hold are read, not computed again."""
    from data_prep.files import write_text
    from data_prep.terminal import ProgressBars
    from pretrain.errors import RunError
    from pretrain.evaluation.evaluate import Incomplete, evaluate_run
    from pretrain.evaluation.evaluation_ranks import launched_ranks, rank_and_world
    from pretrain.evaluation.settings import Settings
    from pretrain.evaluation.suites import check_suites
    from pretrain.evaluation.summary import markdown_summary, print_summary
    from pretrain.ranks.agreement import on_first_rank
    from pretrain.records.run_folder import RunFolder, require_writable

    settings = Settings(limit, routing, depth, text_bytes, hub)
    suites = check_suites(suite)
    folders = [RunFolder.existing(path) for path in runs]
    names = [run.name for run in folders]
    results, problems = {}, []
    with launched_ranks(device) as place:
        reports = rank_and_world()[0] == 0
        if markdown is not None:
            on_first_rank(lambda: require_writable(markdown.parent))
        with ProgressBars(bars=reports) as bars:
            for run in folders:
                title = run.name if names.count(run.name) == 1 else str(run)
                try:
                    advance = functools.partial(_advance, bars, {}, title)
                    results[title] = evaluate_run(run, suites, place, settings=settings, data=data, progress=advance)
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


def _advance(bars: ProgressBars, shown: dict[str, int], title: str, suite: str, done: int, total: int) -> None:
    if suite not in shown:
        shown[suite] = bars.add(f"{title}: {suite}", total)
    bars.update(shown[suite], done, total=total)
