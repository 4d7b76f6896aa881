"""The server's addresses: OpenAI's /v1/..., /health, and the chat page."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from skipcat_edge.errors import UserError
from skipcat_edge.level_control import Control, checked, new_control
from skipcat_edge.serve.engine import Answer, Engine, Work
from skipcat_edge.serve.errors import JSON, RequestError, request_error
from skipcat_edge.serve.prompt import encode_short, require_room
from skipcat_edge.serve.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    chat_options,
    completion_options,
    text_of,
    wish_of,
)

# The page is one file: nothing but its own script, styles and this server.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                               "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_Choose = Callable[[Body], Control | None]


def create_app(engine: Engine, names: Sequence[str], *, embedding: bool, context: int,
               levels: Sequence[float] = (1.0,), control: Control | None = None) -> FastAPI:
    """The application that answers by `engine`'s model, which has `names`, the first one its own.

    `levels`: those of its file; `control` sets the one for requests that name none.
    """
    app = FastAPI(openapi_url=None)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_such_address)

    @app.get("/health")
    async def health() -> Response:
        return JSON({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "skipcat-edge"} for name in names]
        return JSON({"object": "list", "data": data})

    def choose(body: Body) -> Control | None:
        """What sets the level for one request. Raises UserError for a level that the file does not have."""
        wish = wish_of(body)
        if wish is not None:
            wish = checked(wish, names[0], levels)
        return control if wish is None or len(levels) == 1 else new_control(engine.llama, wish, levels)

    if embedding:
        _add_embeddings(app, engine, names, choose)
    else:
        _add_completions(app, engine, names, context, choose)
    return app


def _add_embeddings(app: FastAPI, engine: Engine, names: Sequence[str], choose: _Choose) -> None:
    llama = engine.llama

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not texts:
            raise RequestError(400, "There is no text to embed; send at least one.")
        control = choose(body)

        def work() -> Iterator[dict[str, Any]]:
            if control is not None:
                control.begin()
            encoded = [text.encode("utf-8", errors="replace") for text in texts]
            for number, text in enumerate(encoded, start=1):
                engine.require_wanted()
                count = len(llama.tokenize(text))
                if count > llama.n_batch:  # llama_cpp would cut it without a word
                    raise RequestError(400, f"Text {number} has {count} tokens, but the context holds "
                                            f"{llama.n_batch}; shorten it.")
            plain = [text.decode() for text in encoded]
            answer = llama.create_embedding(plain, model=_name(body.model, names))
            for item in answer["data"]:  # OpenAI's have the length 1
                length = math.hypot(*item["embedding"]) or 1.0
                item["embedding"] = [number / length for number in item["embedding"]]
            yield answer

        return await _respond(request, engine, work, stream=False)


def _add_completions(app: FastAPI, engine: Engine, names: Sequence[str], context: int,
                     choose: _Choose) -> None:
    llama = engine.llama

    @app.get("/")
    async def page() -> Response:
        text = files("skipcat_edge.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        options = chat_options(body, llama.n_vocab()) | {"model": _name(body.model, names)}

        def begin() -> Any:
            return llama.create_chat_completion(**options)

        work = _generation(engine, body, begin, choose(body))
        return await _respond(request, engine, work, stream=body.stream)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        options = completion_options(body, llama.n_vocab()) | {"model": _name(body.model, names)}
        text = text_of(body)

        def begin() -> Any:
            # As tokens, because from a text llama_cpp would make others where it begins with BOS.
            tokens = encode_short(llama, text, context)
            require_room(tokens, context)
            return llama.create_completion(tokens, **options)

        work = _generation(engine, body, begin, choose(body))
        return await _respond(request, engine, work, stream=body.stream)


def _name(wanted: str | None, names: Sequence[str]) -> str:
    """The model's name in an answer: there is one model, whatever is asked for."""
    return wanted if wanted is not None and wanted in names else names[0]


def _generation(engine: Engine, body: ChatRequest | CompletionRequest, begin: Callable[[], Any],
                control: Control | None) -> Work:
    def work() -> Iterator[dict[str, Any]]:
        engine.most_tokens, engine.control = body.max_tokens, control
        answer = begin()
        chunk: dict[str, Any] = {}
        for chunk in answer if body.stream else (answer,):
            for choice in chunk["choices"]:
                if choice["finish_reason"]:
                    choice["finish_reason"] = engine.finish_reason(choice["finish_reason"])
            yield chunk
        if not body.stream:
            return
        if body.stream_options is not None and body.stream_options.include_usage:
            yield {**chunk, "choices": [], "usage": engine.usage.body()}

    return work


async def _respond(request: Request, engine: Engine, work: Work, *, stream: bool) -> Response:
    """The answer to `request`: one object, or a stream of them as they come."""
    answer = engine.submit(work)
    watch = asyncio.create_task(_leave_with_client(request, answer))
    try:
        # Before the status is sent: what is wrong with a request shows at its first token.
        first = await anext(answer)
    except StopAsyncIteration:
        return Response(status_code=499)  # the client is gone
    except BaseException:
        answer.leave()
        watch.cancel()
        raise
    if stream:
        return StreamingResponse(_events(answer, first, watch), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store"})
    watch.cancel()
    return JSON(first)


async def _leave_with_client(request: Request, answer: Answer) -> None:
    """Give `answer` up when the client of `request` is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.leave()


async def _events(answer: Answer, first: dict[str, Any], watch: asyncio.Task[None]) -> AsyncIterator[str]:
    try:
        yield _event(first)
        async for item in answer:
            yield _event(item)
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body())
    finally:
        watch.cancel()
        answer.leave()


def _event(item: dict[str, Any]) -> str:
    return f"data: {json.dumps(item)}\n\n"


async def _refused(_request: Request, error: Exception) -> Response:
    told = request_error(error)
    return JSON(told.body(), told.status)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = f"The request is not valid: {where + ': ' if where else ''}{problem['msg']}."
    if "json" not in request.headers.get("content-type", ""):
        message = "The request is not JSON; send it with `Content-Type: application/json`."
    return JSON(RequestError(400, message).body(), 400)


async def _no_such_address(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}; this server has /v1/models and what its model can answer below /v1."
    if error.status_code == 400:  # the body is not UTF-8, or nested too deep
        message = "The request's JSON cannot be read; send valid JSON in UTF-8."
    return JSON(RequestError(error.status_code, message).body(), error.status_code)
