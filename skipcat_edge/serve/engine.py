"""One model and the thread that runs it for many clients, in the order in which they came."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from skipcat_edge.serve.errors import RequestError, request_error
from skipcat_edge.serve.grammar import require_sound_grammar, sample_by_grammar
from skipcat_edge.session import import_llama_cpp

if TYPE_CHECKING:
    from skipcat_edge.level_control import Control

Work = Callable[[], Iterator[dict[str, Any]]]

_END = object()


class _GoneError(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class Usage:
    """Tokens of one answer."""

    prompt: int = 0
    completion: int = 0
    """Without the one that ends the text."""

    def body(self) -> dict[str, int]:
        """In OpenAI's form."""
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion,
                "total_tokens": self.prompt + self.completion}


class Answer:
    """The items of one answer, as they come; used in the event loop that asked for it."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.gone = False
        self._loop = asyncio.get_running_loop()
        # It has no limit, so that a client that reads slowly keeps nobody waiting; the context limits it.
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    def leave(self) -> None:
        """Ask for no more: an answer that waits is never begun, and one that runs ends at its next token."""
        self.gone = True
        self._items.put_nowait(_END)

    def put(self, item: Any) -> None:
        """Add an item, an error or the end, from the model's thread."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the server has ended
            self.gone = True

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> dict[str, Any]:
        """The next item. Raises RequestError where there is none for a reason."""
        item = await self._items.get()
        if item is _END:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise request_error(item) from item
        assert isinstance(item, dict)
        return item


class Engine:
    """Runs the work of one request at a time on `llama`.

    All in one thread: OpenMP keeps threads for each thread that ever used it.
    """

    def __init__(self, llama: Any) -> None:
        self.llama = llama
        self.usage = Usage()
        """Of the answer that runs; read it in the work itself."""
        self.control: Control | None = None
        """What sets the level for the answer that runs; set it in the work itself."""
        self.most_tokens: int | None = None
        """Of the answer that runs; the work itself sets it."""
        self._full = self._overrun = False
        self._prompt: list[int] = []
        self._prompt_level: float | None = None
        self._decode, self._generate, self._sample = llama._ctx.decode, llama.generate, llama.sample
        llama._ctx.decode, llama.generate = self._decode_while_wanted, self._generate_afresh
        llama.sample = self._sample_safely
        self._answers: SimpleQueue[Answer | None] = SimpleQueue()
        self._running: Answer | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Answers that are not begun."""
        return self._answers.qsize()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self._running is None and not self.waiting

    def submit(self, work: Work) -> Answer:
        """Run `work` after all that was submitted before."""
        answer = Answer(work)
        self._answers.put(answer)
        return answer

    def stop(self) -> None:
        """Refuse what waits, and end what runs at its next token."""
        self._stopping = True

    def close(self) -> None:
        """Stop, and wait for the thread."""
        self.stop()
        self._answers.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (answer := self._answers.get()) is not None:
            self._running = answer
            self._answer(answer)
            self._running = answer = None

    def _answer(self, answer: Answer) -> None:
        try:
            self.require_wanted()
            for item in answer.work():
                answer.put(item)
            answer.put(_END)
        except _GoneError:
            pass
        except Exception as error:
            answer.put(error)

    def require_wanted(self) -> None:
        """Raise where the answer that runs is not wanted any more."""
        if self._stopping:
            raise RequestError(503, "The server is being stopped; ask again later.")
        if self._running is not None and self._running.gone:
            raise _GoneError

    def _decode_while_wanted(self, batch: Any) -> None:
        """What Llama calls for each token, for each batch of a prompt, and for each of texts to embed."""
        self.require_wanted()
        self._decode(batch)

    def _generate_afresh(self, tokens: Sequence[int], **options: Any) -> Iterator[int]:
        """Llama.generate, with the same tokens whatever was computed before.

        Of the earlier prompt only whole batches are used again, and only at the same level: these were
        computed exactly as they would be now. Llama.generate would use all tokens that are the same, such as
        the answer, which was computed token by token, with other rounding.
        """
        llama = self.llama
        if options.get("grammar") is not None:
            require_sound_grammar(llama, options["grammar"])
        level = None if self.control is None else self.control.prompt
        same = llama.longest_token_prefix(self._prompt, tokens) if level == self._prompt_level else 0
        llama.n_tokens = min(same, llama.n_tokens, len(tokens) - 1) // llama.n_batch * llama.n_batch
        self._prompt, self._prompt_level = list(tokens), level
        self.usage, self._full, self._overrun = Usage(len(tokens)), False, False
        room = llama._n_ctx - len(tokens)
        limit = min(self.most_tokens or room, room)
        llama_cpp = import_llama_cpp()
        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        written = self._generate(tokens, **options)
        for token in written if self.control is None else self.control.over(written):
            ends = llama_cpp.llama_vocab_is_eog(vocab, token)
            self.usage.completion += not ends
            self._full = not ends and self.usage.completion >= limit
            yield token
            if self._full and (end := llama_cpp.llama_vocab_eos(vocab)) >= 0:
                # llama_cpp asks on for the rest of a character, even past the end of the context.
                self._overrun = True
                yield end
                return

    def finish_reason(self, said: str) -> str:
        """Why the answer ended: what llama_cpp `said`, except where it was not told or forgets it."""
        cut = self._overrun if said == "stop" else self._full and said == "tool_calls"
        return "length" if cut else said

    def _sample_safely(self, **options: Any) -> int:
        """Llama.sample, which ends the process where a grammar allows no token."""
        return int(self._sample(**options) if options.get("grammar") is None
                   else sample_by_grammar(self.llama))
