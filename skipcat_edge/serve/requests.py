"""Requests: llama_cpp's types with what they lack, and what of them is passed on."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from llama_cpp.server.types import (
    CreateChatCompletionRequest,
    CreateCompletionRequest,
    CreateEmbeddingRequest,
)
from pydantic import BaseModel, ConfigDict, Field, model_validator

from skipcat_edge.errors import UserError
from skipcat_edge.level_control import Wish
from skipcat_edge.levels import parse_schedule
from skipcat_edge.serve.errors import RequestError
from skipcat_edge.serve.grammar import schema_grammar

# A penalty that the client did not ask for would change greedy answers; llama_cpp's is 1.1.
_REPEAT_PENALTY = Field(1.0, gt=0, le=100)
# Not a number, or a negative one, reaches llama.cpp unchecked otherwise.
_TEMPERATURE = Field(0.8, ge=0, le=100)
_LARGEST_BIAS = 100
# Each is looked for after each token.
_MOST_STOPS = 64


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class Message(BaseModel):
    """One message; llama_cpp's types refuse an answer without content, as one that calls a tool is."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """What a chat template sees: no more than was sent, in words that it knows."""
        role = "system" if self.role == "developer" else self.role
        return self.model_dump(exclude_unset=True) | {"role": role, "content": self.content or ""}


class _Generation(BaseModel):
    """What requests for text have in common."""

    temperature: float = _TEMPERATURE
    repeat_penalty: float = _REPEAT_PENALTY
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        """In OpenAI's API null stands for what is not given."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class ChatRequest(_Generation, CreateChatCompletionRequest):  # type: ignore[misc]
    """A chat's next message is wanted."""

    messages: list[Message]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name of max_tokens."""
    rank_level: float | None = None
    progressive: str | None = None


class CompletionRequest(_Generation, CreateCompletionRequest):  # type: ignore[misc]
    """The continuation of a text is wanted."""

    max_tokens: int = Field(16, ge=1)
    rank_level: float | None = None
    progressive: str | None = None


class EmbeddingRequest(CreateEmbeddingRequest):  # type: ignore[misc]
    """Embeddings of texts are wanted."""

    encoding_format: Literal["float", "base64"] = "float"
    """Floats are sent in either case, which OpenAI's client takes too."""
    rank_level: float | None = None


Body = ChatRequest | CompletionRequest | EmbeddingRequest

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
             "repeat_penalty", "mirostat_mode", "mirostat_tau", "mirostat_eta")
_CHAT = ("functions", "function_call", "tools", "tool_choice", "response_format")


def chat_options(request: ChatRequest, vocabulary: int) -> dict[str, Any]:
    """Arguments of Llama.create_chat_completion for a model of `vocabulary` tokens.

    Raises RequestError where something is asked for that this server does not do.
    """
    if request.max_completion_tokens is not None:
        request.max_tokens = request.max_completion_tokens
    options = _common_options(request, vocabulary)
    options.update(request.model_dump(include=set(_CHAT)))
    if request.response_format and "schema" in request.response_format:
        options |= {"response_format": None, "grammar": schema_grammar(request.response_format["schema"])}
    _require_known_tool(request)
    options["messages"] = [message.for_template() for message in request.messages]
    return options


def _require_known_tool(request: ChatRequest) -> None:
    """Raise RequestError if `request` insists on a tool that cannot be called; llama_cpp would write text."""
    choice = request.tool_choice or request.function_call
    if choice == "required":
        raise RequestError(400, "This server calls a tool only where tool_choice names it.")
    if not isinstance(choice, dict):
        return
    name = choice.get("function", choice)["name"]
    tools = [tool["function"] for tool in request.tools or []] + (request.functions or [])
    tool = next((tool for tool in tools if tool["name"] == name), None)
    if tool is None:
        raise RequestError(400, f"tool_choice names {name}, which is not among the tools.")
    schema_grammar(tool["parameters"])


def completion_options(request: CompletionRequest, vocabulary: int) -> dict[str, Any]:
    """Arguments of Llama.create_completion, all but the prompt. Raises RequestError as `chat_options`."""
    for name in ("suffix", "echo"):
        if getattr(request, name):
            raise RequestError(400, f"This server does not know {name}; leave it out.")
    if (request.best_of or 1) > 1:
        raise RequestError(400, "This server gives one answer to a request; leave best_of out.")
    return _common_options(request, vocabulary)


def wish_of(request: Body) -> Wish | None:
    """At which level the answer is wanted; None for the server's own. Raises UserError where it says two
    things, or its schedule is none."""
    progressive = getattr(request, "progressive", None)
    if progressive is None:
        return request.rank_level
    if request.rank_level is not None:
        raise UserError("progressive sets the level of every token; leave out rank_level.")
    return parse_schedule(progressive)


def text_of(request: CompletionRequest) -> str:
    """The one prompt of `request`. Raises RequestError if it has several."""
    prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if len(prompts) > 1:
        raise RequestError(400, "This server continues one prompt at a time; send a request for each.")
    return str(prompts[0]) if prompts else ""


def _common_options(request: ChatRequest | CompletionRequest, vocabulary: int) -> dict[str, Any]:
    if (request.n or 1) > 1:
        raise RequestError(400, "This server gives one answer to a request; leave n out.")
    if request.logprobs is not None and request.logprobs is not False:
        raise RequestError(400, "This server gives no logprobs; leave them out.")
    if request.min_tokens:
        raise RequestError(400, "This server does not know min_tokens; leave it out.")
    options = {name: getattr(request, name) for name in _SAMPLING}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > _MOST_STOPS:
        raise RequestError(400, f"The request has {len(stop)} texts to stop at, but {_MOST_STOPS} are the "
                                "most; send fewer.")
    return options | {
        "max_tokens": request.max_tokens,
        "stream": request.stream,
        "stop": [text for text in stop if text],  # llama_cpp takes an empty one for found
        # Without a seed llama_cpp would draw one from that of the request before.
        "seed": secrets.randbits(31) if request.seed is None else request.seed,
        "grammar": _grammar(request.grammar),
        "logit_bias": _logit_bias(request, vocabulary),
    }


def _grammar(text: str | None) -> Any:
    from llama_cpp import LlamaGrammar

    return LlamaGrammar.from_string(text) if text else None


def _logit_bias(request: ChatRequest | CompletionRequest, vocabulary: int) -> dict[str, float] | None:
    if not request.logit_bias:
        return None
    if request.logit_bias_type == "tokens":
        raise RequestError(400, "This server takes logit_bias by token id only.")
    for token, bias in request.logit_bias.items():
        known = token.isdecimal() and len(token) < 10 and int(token) < vocabulary
        if not (known and abs(bias) <= _LARGEST_BIAS):
            raise RequestError(400, f"logit_bias has {token}: {bias}; ids are below {vocabulary}, and biases "
                                    f"from -{_LARGEST_BIAS} to {_LARGEST_BIAS}.")
    return dict(request.logit_bias)
