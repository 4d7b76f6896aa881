"""From messages to tokens and back, as `chat` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipcat_edge.chat_template import TemplateError
from skipcat_edge.conversation import template_of
from skipcat_edge.generation import encode, piece
from skipcat_edge.serve.errors import RequestError
from skipcat_edge.session import import_llama_cpp


def use_own_prompts(llama: Any, context: int) -> None:
    """Let `llama` make prompts of up to `context` tokens as `chat` makes them.

    By itself llama_cpp replaces templates that it recognises by its own, gives a file without a template
    Llama 2's, leaves out BOS where a template does, and loses pieces of more than 32 bytes.
    """
    from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

    template = template_of(llama)

    def prompt(*, messages: Sequence[Any], **options: Any) -> Any:
        plain = [{**message, "content": _plain(message["content"])} for message in messages]
        if not plain:
            raise RequestError(400, "There are no messages; send at least one.")
        if template is None:
            text = _continued(plain)
        else:
            try:
                text = template.render(plain, **options)
            except TemplateError as error:
                message = f"The file's chat template refuses these messages: {error}."
                raise RequestError(400, message) from None
        text = text.encode("utf-8", errors="replace").decode()
        require_room(encode_short(llama, text, context), context)
        return ChatFormatterResponse(prompt=text)

    llama.chat_handler = chat_formatter_to_chat_completion_handler(prompt)
    llama.tokenizer_ = _tokenizer(llama)
    llama._n_ctx = context  # the model's own limit, where llama.cpp rounds the context up


def encode_short(llama: Any, text: str, context: int) -> list[int]:
    """Tokens of `text`. Raises RequestError at once where it is too long for `context`, however they are.

    Tokens of megabytes take seconds, in which nobody else gets an answer.
    """
    size = len(text.encode("utf-8", errors="replace"))
    least = size // llama.tokenizer_.longest
    if least >= context:
        raise RequestError(400, f"The prompt has {least} tokens at least, but the context holds {context}; "
                                "shorten it.")
    return encode(llama, text)


def require_room(tokens: Sequence[int], context: int) -> None:
    """Raise RequestError if no token fits after `tokens`, or there are none to begin with."""
    if not tokens:
        raise RequestError(400, "The prompt is empty and this model starts no text by itself.")
    if len(tokens) >= context:
        raise RequestError(
            400, f"The prompt has {len(tokens)} tokens, but the context holds {context}; shorten it."
        )


def _plain(content: Any) -> str:
    """The text of a message whose parts may come as a list."""
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" or "text" not in part for part in content):
        raise RequestError(400, "A message has a part that is not text; this model reads only text.")
    return "".join(str(part["text"]) for part in content)


def _continued(messages: Sequence[Any]) -> str:
    """The text so far for a file without a template: answers follow at once, all else on a new line."""
    text = ""
    for message in messages:
        newline = "\n" if text and message["role"] != "assistant" else ""
        text += newline + message["content"]
    return text


def _tokenizer(llama: Any) -> Any:
    from llama_cpp.llama_tokenizer import LlamaTokenizer

    llama_cpp = import_llama_cpp()
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    bos = llama_cpp.llama_vocab_bos(vocab)
    pieces: dict[int, bytes] = {}

    class Tokenizer(LlamaTokenizer):  # type: ignore[misc]
        """Adds BOS only where it is wanted and missing, and keeps every piece whole."""

        longest = max(len(llama_cpp.llama_vocab_get_text(vocab, token)) for token in range(llama.n_vocab()))

        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
            if add_bos:
                return encode(llama, text.decode("utf-8", errors="replace"))
            return list(super().tokenize(text, add_bos=False, special=special))

        def detokenize(self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None,
                       special: bool = False) -> bytes:
            # Llama asks for the whole answer again after each token, so pieces are remembered.
            for token in tokens:
                if token not in pieces:
                    pieces[token] = piece(llama, token)
            text = b"".join(map(pieces.__getitem__, tokens))
            return text.removeprefix(b" ") if prev_tokens and prev_tokens[-1] == bos else text

    return Tokenizer(llama)
