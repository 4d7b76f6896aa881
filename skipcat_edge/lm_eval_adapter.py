"""A GGUF file as a model of lm-evaluation-harness.

lm_eval may import torch, which this package otherwise never does: this module is imported only where
`eval --tasks` runs, inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from skipcat_edge.errors import UserError
from skipcat_edge.generation import detokenize, encode, piece
from skipcat_edge.levels import set_level
from skipcat_edge.perplexity import start_token
from skipcat_edge.scoring import Request, Score, score
from skipcat_edge.session import BATCH, import_llama_cpp, model_info, open_generative, open_model

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from skipcat_edge.evaluation import Begin

_DEFAULT_LENGTH = 2048
"""Tokens of context where the file does not say, as lm-eval's own models have it."""
_DEFAULT_NEW_TOKENS = 256
_SEED = 1234
_SAMPLING = {"temperature": 0.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""What a task may set, with the values that transformers takes where it does not."""


class GgufLM(TemplateLM):  # type: ignore[misc]
    """What lm-eval asks of `file`, answered as by its own `hf` model: the same tokens, the same truncation.

    Args:
        file: a GGUF file that predicts tokens.
        length: tokens that fit into the context; longer sequences lose their beginning. None: the model's.
        threads: None takes one for each physical core.
        rank_level: None takes the full one.
        begin: hears what is done and how many steps it has; what it returns is called after each.

    Raises UserError if the file cannot be loaded or a request cannot be answered.
    """

    def __init__(self, file: Path, *, length: int | None = None, threads: int | None = None,
                 rank_level: float | None = None,
                 begin: Begin = lambda title, total: lambda: None) -> None:
        super().__init__()
        self._file, self._threads, self._rank_level, self._begin = file, threads, rank_level, begin
        limit = model_info(file).context_length
        if length is not None and limit and length > limit:
            raise UserError(f"{file}: its context holds {limit} tokens; use --context {limit} or less.")
        self.max_length = length or limit or _DEFAULT_LENGTH
        self._vocabulary = open_model(file, context=BATCH, vocabulary_only=True)
        self._llama: Any = None
        self._context = 0

    def close(self) -> None:
        """Free the model."""
        for llama in (self._llama, self._vocabulary):
            if llama is not None:
                llama.close()
        self._llama = None

    @property
    def eot_token_id(self) -> int:
        """The end of a text, -1 where the vocabulary has none."""
        llama_cpp = import_llama_cpp()
        return int(llama_cpp.llama_vocab_eos(llama_cpp.llama_model_get_vocab(self._vocabulary.model)))

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        return start_token(self._vocabulary)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of `string`, after BOS where the file wants it and `add_special_tokens` is not False."""
        return encode(self._vocabulary, string, add_bos=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]],
                              **_: Any) -> list[tuple[float, bool]]:
        scores = self._scores([(context, continuation) for _, context, continuation in requests])
        return [(found.log_likelihood, found.greedy) for found in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows that each keep one token of what came before.

        As in lm-eval's `hf` model, a BOS that the vocabulary adds is itself predicted, from BOS.
        """
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )
            windows += map(make_disjoint_window, found)
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for index, part in zip(owners, self._scores(windows), strict=True):
            totals[index] += part.log_likelihood
        return totals

    def _scores(self, requests: Sequence[Request]) -> list[Score]:
        # no context: only spaces, which went to the continuation
        fitting = [self._fit(context or [self.prefix_token_id], continuation)
                   for context, continuation in requests]
        if not fitting:
            return []
        llama = self._open(max(len(context) + len(continuation) - 1 for context, continuation in fitting))
        return score(llama, fitting, self._begin(f"log-likelihoods of {self._file.name}", len(fitting)))

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """Without what the context has too much; the last token is predicted and need not fit."""
        if not continuation:
            raise UserError("A task has an answer without tokens of its own; look at its doc_to_choice and "
                            "target_delimiter.")
        if len(continuation) > self.max_length:
            raise UserError(f"{self._file}: an answer has {len(continuation)} tokens, but the context holds "
                            f"{self.max_length}; use a larger --context or another model.")
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to the first of the task's stop strings."""
        plans = [self._plan(*request.args) for request in requests]
        if not plans:
            return []
        self._open(max(len(tokens) + settings["max_gen_toks"] for tokens, settings in plans))
        advance = self._begin(f"answers of {self._file.name}", len(plans))
        return [self._write(tokens, settings, _SEED + index, advance)
                for index, (tokens, settings) in enumerate(plans)]

    def _plan(self, context: str, asked: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        settings = dict(normalize_gen_kwargs(asked, _DEFAULT_NEW_TOKENS))
        unknown = sorted(settings.keys() - {*_SAMPLING, "do_sample", "until", "max_gen_toks"})
        if unknown:
            raise UserError(f"A task sets {', '.join(unknown)} in its generation_kwargs, which is not known "
                            "here; take it out.")
        room = self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise UserError(f"{self._file}: a task wants {settings['max_gen_toks']} new tokens, but the "
                            f"context holds {self.max_length}; set max_gen_toks in its generation_kwargs.")
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        return tokens[-room:], settings

    def _write(self, tokens: list[int], settings: dict[str, Any], seed: int,
               advance: Callable[[], None]) -> str:
        llama_cpp, llama = import_llama_cpp(), self._llama
        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        sampling = {name: settings.get(name, usual) for name, usual in _SAMPLING.items()}
        temperature = sampling.pop("temperature")
        stops = [stop for stop in settings["until"] if stop]
        llama.reset()
        llama.set_seed(seed)
        written: list[int] = []
        text = b""
        for token in llama.generate(tokens, temp=temperature if settings["do_sample"] else 0.0, **sampling):
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                break
            written.append(token)
            text += piece(llama, token)
            if len(written) == settings["max_gen_toks"] or any(stop.encode() in text for stop in stops):
                break
        advance()
        found: str = postprocess_generated_text(detokenize(llama, written), stops, None)
        return found

    def _open(self, context: int) -> Any:
        """The model with a context of at least so many tokens: a long one costs memory."""
        if self._llama is not None and self._context < context:
            self._llama.close()
            self._llama = None
        if self._llama is None:
            self._llama, self._context = open_generative(self._file, context, self._threads), context
            if self._rank_level is not None:
                set_level(self._llama, self._rank_level)
        return self._llama
