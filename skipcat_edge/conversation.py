"""A conversation: the file's chat template, the turns so far, and a context that never overflows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipcat_edge.chat_template import ChatTemplate, TemplateError
from skipcat_edge.errors import UserError
from skipcat_edge.generation import Sampling, Statistics, encode, generate
from skipcat_edge.session import import_llama_cpp

if TYPE_CHECKING:
    from skipcat_edge.level_control import Control

_KEY_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Turn:
    """What the user wrote and what the model answered."""

    user: str
    reply: str


@dataclass(frozen=True)
class Reply:
    """One answer."""

    text: str
    dropped: int
    """Oldest turns that were dropped to make room for it."""
    statistics: Statistics
    levels: str | None = None
    """What was done at which level, where something sets it."""


class Conversation:
    """Turns with a model, formatted by the chat template of its file.

    Without a template the text so far is continued: turns follow one another on new lines.
    """

    def __init__(self, llama: Any, *, context: int, max_tokens: int, sampling: Sampling,
                 system: str | None = None, control: Control | None = None) -> None:
        """`context`: tokens that the turns and the reply share; `max_tokens`: most of one reply; `system`:
        what the model is told before all turns; `control` sets the level."""
        self._llama = llama
        self.system = system
        self._context = context
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._control = control
        self._template = template_of(llama)
        self.turns: list[Turn] = []

    @property
    def has_template(self) -> bool:
        """Whether the file has a chat template."""
        return self._template is not None

    def reply(self, user: str, emit: Callable[[str], None]) -> Reply:
        """Answer `user`; `emit` gets the text as it comes. Oldest turns are dropped when it is full.

        Where Ctrl-C comes before the first token, the conversation is as it was before. So it is when this
        raises UserError: `user` alone does not fit, the template refuses it, or llama.cpp fails.
        """
        tokens, dropped = self._prompt(user)
        parts: list[str] = []

        def keep(text: str) -> None:
            if self.has_template and not parts:
                text = text.lstrip()
            if text:
                parts.append(text)
                emit(text)

        statistics = generate(self._llama, tokens, max_tokens=self._max_tokens, context=self._context,
                              emit=keep, sampling=self._sampling, control=self._control)
        levels = None if self._control is None else self._control.report()
        if not statistics.tokens:
            return Reply("", 0, statistics, levels)
        self.turns = [*self.turns[dropped:], Turn(user, "".join(parts))]
        return Reply("".join(parts), dropped, statistics, levels)

    def _prompt(self, user: str) -> tuple[list[int], int]:
        """Tokens of the turns that leave room for a reply, and how many turns that drops."""
        room = min(self._max_tokens, self._context // 4)
        for dropped in range(len(self.turns) + 1):
            tokens = encode(self._llama, self._format([*self.turns[dropped:], Turn(user, "")]))
            if len(tokens) + room <= self._context:
                return tokens, dropped
        raise UserError(
            f"This message has {len(tokens)} tokens, but a context of {self._context} with room for a "
            f"reply holds {self._context - room}; shorten it or raise --context."
        )

    def _format(self, turns: list[Turn]) -> str:
        if self._template is None:
            said = [self.system] if self.system else []
            return "\n".join([*said, *(turn.user + turn.reply for turn in turns)])
        messages: list[dict[str, str]] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.reply})
        try:
            return self._template.render(messages[:-1])
        except TemplateError as error:
            raise UserError(f"The file's chat template refuses this conversation: {error}.") from None


def template_of(llama: Any) -> ChatTemplate | None:
    """The file's chat template; None where it has none. Raises UserError where it is broken."""
    template = llama.metadata.get(_KEY_TEMPLATE)
    if template is None:
        return None
    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)

    def text(token: int) -> str:
        return "" if token < 0 else str(llama_cpp.llama_vocab_get_text(vocab, token).decode())

    try:
        return ChatTemplate(template, bos=text(llama_cpp.llama_vocab_bos(vocab)),
                            eos=text(llama_cpp.llama_vocab_eos(vocab)))
    except TemplateError as error:
        raise UserError(f"{llama.model_path}: its chat template is broken ({error}); convert it again."
                        ) from None
