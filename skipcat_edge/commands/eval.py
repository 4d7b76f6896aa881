"""`skipcat-edge eval`: perplexity and divergence from a reference, or the cosine to it; zero-shot tasks."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.commands.level_options import progressive_option, rank_level_option
from skipcat_edge.commands.rpc_option import rpc_option
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from skipcat_edge.divergence import Divergence
    from skipcat_edge.evaluation import Evaluation
    from skipcat_edge.levels import Schedule
    from skipcat_edge.progressive_eval import ProgressiveEvaluation
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
@progressive_option
@rpc_option
@click.option("--prompts", default=200, show_default=True, type=click.IntRange(min=1),
              help="With --progressive: windows of the text that are measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: Path, text: Path | None, tasks: str | None, task_path: Path | None, limit: int | None,
            context: int | None, window: int, max_tokens: int | None, reference: Path | None,
            samples: int, sample_tokens: int, cache: bool, card: bool, threads: int | None,
            rank_level: float | None, progressive: Schedule | None, prompts: int, rpc: tuple[str, ...],
            as_json: bool) -> None:
    """Measure the quality of the model in FILE on a text, on tasks, or on both.

    A generative model: perplexity over windows that each start with BOS. With --reference also the
    mean KL divergence KL(reference || FILE) per token, in nats, and the top-1 agreement: the share of
    tokens for which both models hold the same next token most likely. Each figure has its standard
    error. The reference goes first, and its logits wait on disk: only one model is in memory at a
    time, and a second FILE is compared without it.

    With --progressive: the same divergence and agreement by token after a prompt, which is the beginning
    of a window and has the full level. The window's other tokens follow one by one, each computed at its
    level. Also ROUGE-L's F-measure between what FILE and --reference make of the prompts. Standard errors
    are over prompts.

    An embedding model: the mean cosine between its sentence embeddings and those of --reference,
    one for each line.

    Tasks are run by lm-evaluation-harness (`pip install 'skipcat-edge[eval]'`), with its own prompts,
    metrics and standard errors, and without chat template; with --reference they are run on both. It
    fetches the data of a task when it is first used.
    """
    if text is None and tasks is None:
        raise UserError("There is nothing to measure on; give --text FILE or --tasks NAMES.")
    if text is None and (samples or max_tokens is not None):
        raise UserError("--samples and --max-tokens are of a text; give one with --text.")
    if tasks is None and (task_path is not None or limit is not None or context is not None):
        raise UserError("--task-path, --limit and --context are of tasks; name some with --tasks.")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise UserError("--tasks names no task; give one, for example arc_easy.")
    if rank_level is not None:
        from skipcat_edge.levels import file_levels, require_level

        require_level(file, file_levels(file), rank_level)
    if progressive is not None and card:
        raise UserError("--card takes figures of one level; leave it out with --progressive.")
    if card:
        from skipcat_edge import card_figures

        card_figures.require_card(file)
    if rpc:
        from skipcat_edge.rpc import connect

        connect(rpc)
    found = _evaluate(file, text, window=window, max_tokens=max_tokens, reference=reference, cache=cache,
                      samples=samples, sample_tokens=sample_tokens, tasks=names, task_path=task_path,
                      limit=limit, context=context, threads=threads, rank_level=rank_level,
                      progressive=progressive, prompts=prompts)
    if not as_json:
        for sentence in _sentences(found, window, reference):
            click.echo(sentence)
        if found.progressive is not None:
            _print_progressive(found.progressive, prompts, window, reference)
        if found.tasks:
            if text is not None:
                click.echo()
            _print_tasks(found.tasks, file, reference)
    if card:
        figures = card_figures.figures_of(found, file, text, window, reference, context)
        click.echo(f"the figures are in {card_figures.write_figures(file, [*figures])}", err=True)
    if as_json:
        click.echo(json.dumps(found.to_json()))


def _evaluate(file: Path, text: Path | None, **options: Any) -> Evaluation:
    from skipcat_edge.evaluation import evaluate
    from skipcat_edge.gguf_file import require_gguf
    from skipcat_edge.terminal import new_progress
    from skipcat_edge.text_file import read_text

    require_gguf(file)
    content = None if text is None else read_text(text)
    with new_progress() as progress:

        def begin(title: str, total: int) -> Callable[[], None]:
            task = progress.add_task(title, total=total)
            return lambda: progress.advance(task)

        return evaluate(file, content, name=str(text), begin=begin, **options)


def _print_progressive(found: ProgressiveEvaluation, wanted: int, window: int,
                       reference: Path | None) -> None:
    from skipcat_edge.terminal import decimal_bytes, new_table, stdout_console

    few = f" (the text has no more windows of {window})" if found.prompts < wanted else ""
    click.echo(f"{found.prompts} prompts{few}, {found.tokens} tokens after each, levels {found.schedule}; "
               f"{decimal_bytes(found.bytes_per_token)} of weights are read per token")
    click.echo(_kl_sentence(found.divergence, reference))
    click.echo(_top1_sentence(found.divergence))
    click.echo(f"ROUGE-L with its continuations: {found.rouge_l:.4f} ± {found.rouge_l_se:.4f}\n")
    table = new_table("tokens", "level", "KL divergence", "top-1 %", left=1)
    for span in found.spans:
        table.add_row(str(span.first) if span.first == span.last else f"{span.first}-{span.last}",
                      f"{span.level:g}", f"{span.kl:.6f} ± {span.kl_se:.6f}",
                      f"{100 * span.top1:.2f} ± {100 * span.top1_se:.2f}")
    stdout_console().print(table)


def _kl_sentence(found: Divergence, reference: Path | None) -> str:
    return f"KL divergence from {reference}: {found.kl:.6f} ± {found.kl_se:.6f} nats per token"


def _top1_sentence(found: Divergence) -> str:
    return f"top-1 agreement with it: {100 * found.top1:.2f} ± {100 * found.top1_se:.2f} %"


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
    text, divergence, similarity = found.perplexity, found.divergence, found.similarity
    if similarity is not None:
        yield (f"mean cosine {similarity.cosine_mean:.4f} ± {similarity.cosine_se:.4f}, lowest "
               f"{similarity.cosine_min:.4f}, over {similarity.lines:,} lines")
    if text is not None:
        yield (f"perplexity {text.ppl:.4f} ± {text.ppl_se:.4f} over {text.tokens:,} tokens, "
               f"windows of {window}")
    if divergence is not None:
        yield _kl_sentence(divergence, reference)
        yield _top1_sentence(divergence)
    for sample in found.samples:
        yield ""
        told = (("text", sample.prompt), ("reference", sample.reference), ("model", sample.model))
        for title, said in told:
            if said is not None:
                yield textwrap.fill(" ".join(said.split()), 100, initial_indent=f"{title:<11}",
                                    subsequent_indent=" " * 11)
