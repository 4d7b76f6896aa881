"""The steps that measure: the loss of one file, and the speed of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skipcat_edge import text_file
from skipcat_edge.compare.progress import Step
from skipcat_edge.compare.request import Request
from skipcat_edge.errors import NotFiniteError, UserError


def read_text(path: Path) -> str:
    """Raises UserError where `path` is no UTF-8 text with something in it."""
    text = text_file.read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty; give a text like the ones the model will see.")
    return text


class Evaluator:
    """Compares files with the reference on the text."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._reference: _KeptEmbeddings | None = None

    def __call__(self, path: Path, step: Step) -> dict[str, Any]:
        """`loss` with `loss_se`, and what else is measured of the kind of model; `impossible` and why where a
        file computes no numbers, which is no reason to lose what the others are worth.

        Raises UserError as `evaluate` and `open_pair`, and where the reference computes none.
        """
        from skipcat_edge.session import model_info

        reference = self._request.reference
        embeds = model_info(reference).embedding
        if model_info(path).embedding != embeds:
            kinds = ("predicts tokens", "is an embedding model")
            raise UserError(f"{path} {kinds[not embeds]}, but {reference} {kinds[embeds]}; leave it out of "
                            "--file.")
        try:
            return self._embedding(path, step) if embeds else self._generative(path, step)
        except NotFiniteError as error:
            if path == reference:
                raise
            return {"impossible": error.message}

    def _generative(self, path: Path, step: Step) -> dict[str, Any]:
        from skipcat_edge.evaluation import evaluate

        request = self._request
        is_reference = path == request.reference
        found = evaluate(
            path, read_text(request.text), name=str(request.text), window=request.window,
            max_tokens=request.max_tokens, reference=None if is_reference else request.reference,
            threads=request.threads, begin=_last_of(step, 1 if is_reference else 2))
        assert found.perplexity is not None  # it is no embedding model
        result = {"ppl": found.perplexity.ppl, "ppl_se": found.perplexity.ppl_se,
                  "tokens": found.perplexity.tokens, "loss": 0.0, "loss_se": 0.0, "top1": 1.0}
        if found.divergence is not None:
            result |= {"loss": found.divergence.kl, "loss_se": found.divergence.kl_se,
                       "top1": found.divergence.top1}
        return result

    def _embedding(self, path: Path, step: Step) -> dict[str, Any]:
        from skipcat_edge.embedding_eval import compare, open_pair

        request = self._request
        lines = self._lines()
        if path == request.reference:
            return {"loss": 0.0, "loss_se": 0.0, "cosine_min": 1.0, "lines": len(lines)}
        model, dense = open_pair(path, request.reference, request.threads)
        try:
            if self._reference is None:
                self._reference = _KeptEmbeddings(dense)
            self._reference.model = dense
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                step.to(done / len(lines))

            found = compare(model, self._reference, lines, advance)
        finally:
            model.close()
            dense.close()
        return {"loss": max(0.0, 1 - found.cosine_mean), "loss_se": found.cosine_se,
                "cosine_min": found.cosine_min, "lines": found.lines}

    def _lines(self) -> list[str]:
        """The first lines of the text, with about as many tokens as are to be read."""
        from skipcat_edge.embedding_eval import lines_of
        from skipcat_edge.session import BATCH, open_model

        request = self._request
        vocabulary = open_model(request.reference, context=BATCH, vocabulary_only=True)
        kept: list[str] = []
        tokens = 0
        try:
            for line in lines_of(read_text(request.text), str(request.text)):
                if tokens >= request.max_tokens:
                    break
                kept.append(line)
                tokens += len(vocabulary.tokenize(line.encode()))
        finally:
            vocabulary.close()
        return kept


class _KeptEmbeddings:
    """The reference, which embeds each line once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[str, list[float]] = {}

    def embed(self, lines: Sequence[str]) -> list[list[float]]:
        """As Llama.embed."""
        new = [line for line in dict.fromkeys(lines) if line not in self._known]
        if new:
            self._known |= zip(new, self.model.embed(new), strict=True)
        return [self._known[line] for line in lines]


def _last_of(step: Step, parts: int) -> Callable[[str, int], Callable[[], None]]:
    """`evaluate`'s Begin. The reference's windows may be on disk already: the file's are the last part of
    what was to come."""
    begun = 0

    def begin(_title: str, total: int) -> Callable[[], None]:
        nonlocal begun
        start, done = begun / parts, 0
        begun += 1

        def advance() -> None:
            nonlocal done
            done += 1
            step.to(start + done / total / parts)

        return advance

    return begin


def bench_all(request: Request, files: Sequence[Path], step: Step) -> dict[str, Any]:
    """Rows of `bench` for `files`, which take turns. Raises UserError where memory does not hold them."""
    import psutil

    from skipcat_edge.bandwidth import affordable_bandwidth
    from skipcat_edge.bench_rows import rows_of, this_machine
    from skipcat_edge.benchmark import bench, steps
    from skipcat_edge.terminal import decimal_bytes

    needed, free = sum(path.stat().st_size for path in files), psutil.virtual_memory().available
    if needed > free:
        raise UserError(f"The {len(files)} files, which are measured in turns, take {decimal_bytes(needed)}, "
                        f"but {decimal_bytes(free)} of memory are free; give fewer --types or --ratios. What "
                        "is done stays done.")
    total = steps(len(files), 1, request.repetitions)
    begun = 0

    def advance(_file: str) -> None:
        nonlocal begun
        step.to(begun / total)
        begun += 1

    results = bench([str(path) for path in files], prompt_tokens=request.prompt_tokens,
                    gen_tokens=request.gen_tokens, threads=[request.threads],
                    repetitions=request.repetitions, bandwidth=affordable_bandwidth, advance=advance)
    return {"rows": rows_of(results, this_machine("host"))}
