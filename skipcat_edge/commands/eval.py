"""`skipcat-edge eval`: perplexity and the divergence from a reference, or the cosine to it."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from skipcat_edge.embedding_eval import EmbeddingSimilarity
    from skipcat_edge.evaluation import Evaluation


@click.command(short_help="Measure perplexity, and how close a model is to its dense reference.",
               epilog=example("eval skipcat.gguf --text story.txt --reference dense.gguf"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text to measure on.")
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
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: Path, text: Path, window: int, max_tokens: int | None, reference: Path | None,
            samples: int, sample_tokens: int, cache: bool, threads: int | None, as_json: bool) -> None:
    """Measure the quality of the model in FILE on a text.

    A generative model: perplexity over windows that each start with BOS. With --reference also the
    mean KL divergence KL(reference || FILE) per token, in nats, and the top-1 agreement: the share of
    tokens for which both models hold the same next token most likely. Each figure has its standard
    error. The reference goes first, and its logits wait on disk: only one model is in memory at a
    time, and a second FILE is compared without it.

    An embedding model: the mean cosine between its sentence embeddings and those of --reference,
    one for each line.
    """
    from skipcat_edge.session import model_info

    if model_info(file).embedding:
        if samples:
            raise UserError(f"{file} is an embedding model and writes no text; leave out --samples.")
        if reference is None:
            raise UserError(f"{file} is an embedding model; give its dense GGUF with --reference.")
        if max_tokens is not None:
            raise UserError("--max-tokens is for perplexity; an embedding model is compared on every line.")
        similarity = _similarity(file, reference, text, threads)
        values, sentence = asdict(similarity), (
            f"mean cosine {similarity.cosine_mean:.4f}, lowest {similarity.cosine_min:.4f}, "
            f"over {similarity.lines:,} lines"
        )
    else:
        found = _evaluate(file, text, window=window, max_tokens=max_tokens, reference=reference, cache=cache,
                          samples=samples, sample_tokens=sample_tokens, threads=threads)
        values, sentence = found.to_json(), "\n".join(_sentences(found, window, reference))
    click.echo(json.dumps(values) if as_json else sentence)


def _evaluate(file: Path, text: Path, **options: Any) -> Evaluation:
    from skipcat_edge.evaluation import evaluate
    from skipcat_edge.terminal import new_progress

    content = _read(text)
    with new_progress() as progress:

        def begin(title: str, total: int) -> Callable[[], None]:
            task = progress.add_task(title, total=total)
            return lambda: progress.advance(task)

        return evaluate(file, content, name=str(text), begin=begin, **options)


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


def _similarity(file: Path, reference: Path, text: Path, threads: int | None) -> EmbeddingSimilarity:
    from skipcat_edge.embedding_eval import compare, lines_of, open_pair
    from skipcat_edge.terminal import new_progress

    lines = lines_of(_read(text), name=str(text))
    model, dense = open_pair(file, reference, threads)
    with new_progress() as progress:
        task = progress.add_task("lines", total=len(lines))
        return compare(model, dense, lines, advance=lambda count: progress.advance(task, count))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first.") from None
