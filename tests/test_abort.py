"""A prompt that is interrupted: within one node, and without a trace in what comes after."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skipcat_edge.abort import AbortedError, abort_when
from skipcat_edge.conversation import Conversation
from skipcat_edge.generation import Sampling, encode
from skipcat_edge.llama_log import Log, keep_log
from skipcat_edge.samples import continuations
from skipcat_edge.session import open_model

pytestmark = pytest.mark.runtime

BATCH = 32
LONG = "Once upon a time there was a little dog who lived in the park. " * 9
NEXT = "The dog"


@pytest.fixture(scope="module")
def open_demo(demo_dense_gguf: Path) -> Callable[..., Any]:
    from llama_cpp import Llama

    return lambda threads=1: Llama(str(demo_dense_gguf), n_ctx=512, n_batch=BATCH, n_ubatch=BATCH,
                                   n_threads=1, n_threads_batch=threads, verbose=False)


@pytest.fixture
def model(open_demo: Callable[..., Any]) -> Any:
    return open_demo()


def conversation(model: Any) -> Conversation:
    return Conversation(model, context=512, max_tokens=12, sampling=Sampling())


@pytest.fixture(scope="module")
def never_interrupted(open_demo: Callable[..., Any]) -> tuple[str, str]:
    """The replies to NEXT, and then to LONG."""
    talk = conversation(open_demo())
    return talk.reply(NEXT, lambda _: None).text, talk.reply(LONG, lambda _: None).text


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def at_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], None]], list[int]]]:
    """Runs something after the node of a number; the numbers of all nodes are kept in the list."""
    import llama_cpp

    made = llama_cpp.ggml_abort_callback

    def arrange(number: int, run: Callable[[], None]) -> list[int]:
        nodes: list[int] = []

        def factory(*asks: Callable[[Any], bool]) -> Any:
            def ask(data: Any) -> bool:
                nodes.append(len(nodes))
                if nodes[-1] == number:
                    run()
                return asks[0](data)

            return made(ask) if asks else made()

        monkeypatch.setattr(llama_cpp, "ggml_abort_callback", factory)
        return nodes

    yield arrange
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture(scope="module")
def nodes_of_a_batch(open_demo: Callable[..., Any]) -> int:
    model = open_demo()
    nodes: list[bool] = []
    with abort_when(model, lambda: bool(nodes.append(True))):
        model.eval([1] * BATCH)
    assert len(nodes) > 60
    return len(nodes)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_ctrl_c_in_a_prompt(model: Any, at_node: Any, nodes_of_a_batch: int, batch: int, share: float,
                            never_interrupted: tuple[str, str]) -> None:
    assert len(encode(model, LONG)) > 3 * BATCH
    node = batch * nodes_of_a_batch + int(share * (nodes_of_a_batch - 1))
    nodes = at_node(node, press_ctrl_c)
    talk = conversation(model)
    reply = talk.reply(LONG, lambda _: None)
    assert (reply.text, reply.statistics.tokens, reply.statistics.stop) == ("", 0, "interrupted")
    assert node <= nodes[-1] <= node + 1  # the signal is seen in this callback or the next
    assert model.n_tokens == batch * BATCH + (BATCH if nodes[-1] >= (batch + 1) * nodes_of_a_batch else 0)
    assert not talk.turns and not keep_log().errors
    assert (talk.reply(NEXT, lambda _: None).text, talk.reply(LONG, lambda _: None).text) == never_interrupted


def test_ctrl_c_in_the_second_turn(model: Any, at_node: Any, never_interrupted: tuple[str, str]) -> None:
    talk = conversation(model)
    assert talk.reply(NEXT, lambda _: None).text == never_interrupted[0]
    turns = list(talk.turns)
    at_node(100, press_ctrl_c)
    assert talk.reply("and so on " * 30, lambda _: None).statistics.stop == "interrupted"
    assert talk.turns == turns
    assert talk.reply(LONG, lambda _: None).text == never_interrupted[1]


@pytest.mark.parametrize("place", ["_init_sampler", "eval", "sample"])
def test_ctrl_c_before_and_after_a_batch(model: Any, monkeypatch: pytest.MonkeyPatch, place: str,
                                         never_interrupted: tuple[str, str]) -> None:
    usual = getattr(model, place)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        press_ctrl_c()
        return usual(*arguments, **options)

    talk = conversation(model)
    with monkeypatch.context() as patch:
        patch.setattr(model, place, interrupted)
        assert talk.reply(LONG, lambda _: None).statistics.stop == "interrupted"
    assert (talk.reply(NEXT, lambda _: None).text, talk.reply(LONG, lambda _: None).text) == never_interrupted


def test_the_batches_before_it_are_used_again(model: Any, open_demo: Callable[..., Any],
                                              nodes_of_a_batch: int) -> None:
    """Also where they are the whole next prompt, whose logits came before the batch that was interrupted."""
    tokens = encode(model, LONG)[:2 * BATCH]
    asked = iter(range(4 * nodes_of_a_batch))
    with pytest.raises(AbortedError), abort_when(model, lambda: next(asked) == 2 * nodes_of_a_batch + 50):
        model.eval(encode(model, LONG))
    assert model.n_tokens == 2 * BATCH
    fresh = open_demo()
    assert next(model.generate(tokens, temp=0)) == next(fresh.generate(tokens, temp=0))


def test_a_state_that_knows_no_way_back_is_computed_afresh(model: Any, at_node: Any, nodes_of_a_batch: int,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           never_interrupted: tuple[str, str]) -> None:
    talk = conversation(model)
    at_node(nodes_of_a_batch + 1, press_ctrl_c)
    remove = model._ctx.kv_cache_seq_rm
    with monkeypatch.context() as patch:
        patch.setattr(model._ctx, "kv_cache_seq_rm", lambda s, p0, p1: p0 == 0 and remove(s, p0, p1))
        talk.reply(LONG, lambda _: None)
    assert model.n_tokens == 0
    assert talk.reply(NEXT, lambda _: None).text == never_interrupted[0]


def test_another_thread_aborts(open_demo: Callable[..., Any], at_node: Any) -> None:
    """As a server does, whose model has a thread of its own."""
    model, gone = open_demo(threads=2), threading.Event()
    nodes = at_node(50, gone.set)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with abort_when(model, gone.is_set):
                model.eval(encode(model, LONG))
        except AbortedError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(raised) == 1 and len(nodes) == 51


def test_other_failures_keep_their_reason(model: Any) -> None:
    with pytest.raises(RuntimeError, match="llama_decode returned"), abort_when(model, lambda: False):
        model.eval([-5])


def test_ctrl_c_while_a_model_is_loaded(demo_dense_gguf: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """Python's handler would raise in the callback that gets llama.cpp's log."""
    once = iter([press_ctrl_c])
    monkeypatch.setattr(Log, "note_buffer", lambda *_: next(once, lambda: None)())
    with pytest.raises(KeyboardInterrupt):
        open_model(demo_dense_gguf, context=256, threads=1)
    assert not capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_gives_no_shorter_sample(model: Any, at_node: Any) -> None:
    at_node(10, press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        continuations(model, [encode(model, NEXT)], max_tokens=4)
