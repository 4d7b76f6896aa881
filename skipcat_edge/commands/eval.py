"""`skipcat-edge eval`: perplexity and divergence from a reference, or the cosine to it; zero-shot tasks."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.commands.level_options import rank_level_option
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.progress import Progress

    from skipcat_edge.card import Figure
    from skipcat_edge.embedding_eval import EmbeddingSimilarity
    from skipcat_edge.evaluation import Begin, Evaluation
    from skipcat_edge.task_eval import TaskResult


@click.command(short_help="Measure perplexity, and how close a model is to its dense reference.",
               epilog=example("eval skipcat.gguf --text story.txt --reference dense.gguf"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text to measure on.")
@click.option("--tasks", metavar="NAMES",
              help="Tasks of lm-evaluation-harness, for example arc_easy,hellaswag; or task files.")
@click.option("--task-path", type=click.Path(path_type=Path), help="A folder with further task files.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first samples of each task only.")
@click.option("--context", type=click.IntRange(min=2),
              help="Tokens of a task's prompt and answer; the beginning of longer ones is cut off.  "
                   "[default: the model's]")
@click.option("--window", default=256, show_default=True, type=click.IntRange(min=2),
              help="Tokens of a window, BOS included.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Use the first tokens of the text only.")
@click.option("--reference", type=click.Path(path_type=Path),
              help="The dense GGUF that FILE was made from; an embedding model needs it.")
@click.option("--samples", default=0, show_default=True, type=click.IntRange(min=0),
              help="Also show so many beginnings of the text with what FILE and --reference make of them.")
@click.option("--sample-tokens", default=48, show_default=True, type=click.IntRange(min=1),
              help="Tokens of each continuation.")
@click.option("--cache/--no-cache", default=True, show_default=True,
              help="Keep the reference's logits on disk, for the next file that is compared with it.")
@click.option("--card", is_flag=True,
              help="Put the figures into FILE's model card, which lies beside it; it is made where there is "
                   "none.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@rank_level_option(say="The reference always has its full level.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: Path, text: Path | None, tasks: str | None, task_path: Path | None, limit: int | None,
            context: int | None, window: int, max_tokens: int | None, reference: Path | None,
            samples: int, sample_tokens: int, cache: bool, card: bool, threads: int | None,
            rank_level: float | None, as_json: bool) -> None:
    """Measure the quality of the model in FILE on a text, on tasks, or on both.

    A generative model: perplexity over windows that each start with BOS. With --reference also the
    mean KL divergence KL(reference || FILE) per token, in nats, and the top-1 agreement: the share of
    tokens for which both models hold the same next token most likely. Each figure has its standard
    error. The reference goes first, and its logits wait on disk: only one model is in memory at a
    time, and a second FILE is compared without it.

    An embedding model: the mean cosine between its sentence embeddings and those of --reference,
    one for each line.

    Tasks are run by lm-evaluation-harness (`pip install 'skipcat-edge[eval]'`), with its own prompts,
    metrics and standard errors, and without chat template; with --reference they are run on both. It
    fetches the data of a task when it is first used.
    """
    from skipcat_edge.session import model_info

    if text is None and tasks is None:
        raise UserError("There is nothing to measure on; give --text FILE or --tasks NAMES.")
    if text is None and (samples or max_tokens is not None):
        raise UserError("--samples and --max-tokens are of a text; give one with --text.")
    if tasks is None and (task_path is not None or limit is not None or context is not None):
        raise UserError("--task-path, --limit and --context are of tasks; name some with --tasks.")
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    if names == []:
        raise UserError("--tasks names no task; give one, for example arc_easy.")
    values: dict[str, Any] = {} if rank_level is None else {"rank_level": rank_level}
    figures: list[Figure] = []
    if rank_level is not None:
        from skipcat_edge.levels import file_levels, require_level

        require_level(file, file_levels(file), rank_level)
    if card:
        from skipcat_edge import card_figures

        card_figures.require_card(file)
    if model_info(file).embedding:
        if names is not None or text is None:
            raise UserError(f"{file} is an embedding model and answers no tasks; use --text and --reference.")
        if samples:
            raise UserError(f"{file} is an embedding model and writes no text; leave out --samples.")
        if reference is None:
            raise UserError(f"{file} is an embedding model; give its dense GGUF with --reference.")
        if max_tokens is not None:
            raise UserError("--max-tokens is for perplexity; an embedding model is compared on every line.")
        similarity = _similarity(file, reference, text, threads, rank_level)
        values |= asdict(similarity)
        if card:
            figures += card_figures.similarity_figures(similarity, file, text, reference, rank_level)
        if not as_json:
            click.echo(f"mean cosine {similarity.cosine_mean:.4f}, lowest {similarity.cosine_min:.4f}, "
                       f"over {similarity.lines:,} lines")
    elif text is not None:
        found = _evaluate(file, text, window=window, max_tokens=max_tokens, reference=reference, cache=cache,
                          samples=samples, sample_tokens=sample_tokens, threads=threads,
                          rank_level=rank_level)
        values |= found.to_json()
        if card:
            figures += card_figures.evaluation_figures(found, file, text, window, reference)
        if not as_json:
            click.echo("\n".join(_sentences(found, window, reference)))
    if names is not None:
        results = _tasks(file, names, task_path=task_path, limit=limit, length=context, reference=reference,
                         threads=threads, rank_level=rank_level)
        values["tasks"] = [result.to_json() for result in results]
        if card:
            figures += card_figures.task_figures(results, reference, context, rank_level)
        if not as_json:
            if text is not None:
                click.echo()
            _print_tasks(results, file, reference)
    if card:
        written = card_figures.write_figures(file, figures)
        click.echo(f"the figures are in {written}", err=True)
    if as_json:
        click.echo(json.dumps(values))


def _evaluate(file: Path, text: Path, **options: Any) -> Evaluation:
    from skipcat_edge.evaluation import evaluate
    from skipcat_edge.terminal import new_progress
    from skipcat_edge.text_file import read_text

    content = read_text(text)
    with new_progress() as progress:
        return evaluate(file, content, name=str(text), begin=_beginner(progress), **options)


def _tasks(file: Path, names: Sequence[str], **options: Any) -> list[TaskResult]:
    from skipcat_edge.task_eval import measure_tasks
    from skipcat_edge.terminal import new_progress

    with new_progress() as progress:
        return measure_tasks(file, names, begin=_beginner(progress), **options)


def _beginner(progress: Progress) -> Begin:
    def begin(title: str, total: int) -> Callable[[], None]:
        task = progress.add_task(title, total=total)
        return lambda: progress.advance(task)

    return begin


def _print_tasks(results: Sequence[TaskResult], file: Path, reference: Path | None) -> None:
    from skipcat_edge.task_eval import with_error
    from skipcat_edge.terminal import new_table, stdout_console

    table = new_table("task", "metric", "samples", file.name,
                      *([] if reference is None else [reference.name, "difference"]), left=2)
    for result in results:
        metric = result.metric if result.filter == "none" else f"{result.metric} ({result.filter})"
        row = [result.task, metric, f"{result.samples:,}", with_error(result.value, result.value_se)]
        if result.reference is not None and result.difference is not None:
            row += [with_error(result.reference, result.reference_se), f"{result.difference:+.4f}"]
        table.add_row(*row)
    stdout_console().print(table)


def _sentences(found: Evaluation, window: int, reference: Path | None) -> Iterator[str]:
    perplexity, divergence = found.perplexity, found.divergence
    yield (f"perplexity {perplexity.ppl:.4f} ± {perplexity.ppl_se:.4f} over {perplexity.tokens:,} tokens, "
           f"windows of {window}")
    if divergence is not None:
        yield (f"KL divergence from {reference}: {divergence.kl:.6f} ± {divergence.kl_se:.6f} nats per token")
        yield f"top-1 agreement with it: {100 * divergence.top1:.2f} ± {100 * divergence.top1_se:.2f} %"
    for sample in found.samples:
        yield ""
        told = (("text", sample.prompt), ("reference", sample.reference), ("model", sample.model))
        for title, text in told:
            if text is not None:
                yield textwrap.fill(" ".join(text.split()), 100, initial_indent=f"{title:<11}",
                                    subsequent_indent=" " * 11)


def _similarity(file: Path, reference: Path, text: Path, threads: int | None,
                rank_level: float | None) -> EmbeddingSimilarity:
    from skipcat_edge.embedding_eval import compare, lines_of, open_pair
    from skipcat_edge.levels import set_level
    from skipcat_edge.terminal import new_progress
    from skipcat_edge.text_file import read_text

    lines = lines_of(read_text(text), name=str(text))
    model, dense = open_pair(file, reference, threads)
    if rank_level is not None:
        set_level(model, rank_level)
    with new_progress() as progress:
        task = progress.add_task("lines", total=len(lines))
        return compare(model, dense, lines, advance=lambda count: progress.advance(task, count))
