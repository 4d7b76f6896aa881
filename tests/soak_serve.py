"""Many clients of one `skipcat-edge serve`, some of whom leave in the middle of an answer.

    python tests/soak_serve.py [MODEL.gguf] [--seconds 300] [--clients 50]

Fails if the server ends, if an answer differs from what `generate` writes for its prompt alone, if a request
is refused, or if the server's resident memory grows by more than 5 % between a tenth of the time and the end.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import psutil
from serving import CHAT, chat_body, open_request, serving

CUT = 0.05
GROWTH = 0.05
CONTEXT = 1024
TOKENS = 32
_SAMPLES = 5


@dataclass
class Outcome:
    """What the clients saw."""

    complete: int = 0
    wrong: int = 0
    cut: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each complete answer."""
    memory: list[int] = field(default_factory=list)
    """Bytes, each tenth of a second."""
    ended: bool = False
    """The server ended by itself."""

    @property
    def warm(self) -> float:
        """Resident bytes after a tenth of the time."""
        start = len(self.memory) // 10
        return statistics.median(self.memory[start:start + _SAMPLES])

    @property
    def end(self) -> float:
        """Resident bytes at the end."""
        return statistics.median(self.memory[-_SAMPLES:])

    def failures(self) -> list[str]:
        """What must not be."""
        found = list(self.errors[:3])
        if self.ended:
            found.append("the server ended")
        if self.wrong:
            found.append(f"{self.wrong} answers differ from those of their prompts alone")
        if not self.complete or not self.cut:
            found.append("no answer was complete, or none was cut")
        if self.end > (1 + GROWTH) * self.warm:
            found.append(f"resident memory grew from {self.warm / 1e6:.1f} to {self.end / 1e6:.1f} MB")
        return found

    def table(self) -> str:
        """The figures."""
        seconds = sorted(self.seconds) or [0.0]
        rows = {
            "complete answers": f"{self.complete}", "that differ": f"{self.wrong}",
            "cut by the client": f"{self.cut}", "errors": f"{len(self.errors)}",
            "median answer": f"{seconds[len(seconds) // 2]:.2f} s",
            "slowest answer": f"{seconds[-1]:.2f} s",
            "resident memory, warm": f"{self.warm / 1e6:.1f} MB",
            "at most after that": f"{max(self.memory[len(self.memory) // 10:]) / 1e6:.1f} MB",
            "at the end": f"{self.end / 1e6:.1f} MB ({self.end / self.warm - 1:+.1%})",
        }
        return "\n".join(f"{name:<22} {value:>18}" for name, value in rows.items())


def known_answers(model: Path) -> dict[str, str]:
    """Prompts, short and of several batches, and what `generate` writes after each from an empty cache."""
    from skipcat_edge.conversation import Conversation
    from skipcat_edge.generation import Sampling
    from skipcat_edge.serve.model import BATCH
    from skipcat_edge.session import open_model

    start = "Once upon a time there was a little fox who lived in a big forest. " * 40
    heroes = ("dog", "cat", "girl", "boy", "bird")
    prompts = [f"{start[:length]}The {hero} said" for length in (0, 60, 700, 1500) for hero in heroes]
    llama = open_model(model, context=CONTEXT, batch=BATCH, threads=1)
    answers = {}
    for prompt in prompts:
        llama.reset()
        conversation = Conversation(llama, context=CONTEXT, max_tokens=TOKENS, sampling=Sampling())
        answers[prompt] = conversation.reply(prompt, lambda _: None).text
    return answers


def soak(model: Path, *, seconds: float, clients: int, seed: int = 0) -> Outcome:
    """Let `clients` ask `model` for `seconds`."""
    answers = known_answers(model)
    outcome = Outcome()
    with serving(model, "--context", CONTEXT) as server:
        process = psutil.Process(server.process.pid)
        end = time.monotonic() + seconds
        lock = threading.Lock()

        def client(number: int) -> None:
            chance = random.Random(seed + number)
            while time.monotonic() < end:
                prompt = chance.choice(list(answers))
                _ask(server.url, prompt, answers[prompt], chance, outcome, lock)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end and server.process.poll() is None:
            outcome.memory.append(process.memory_info().rss)
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        outcome.ended = server.process.poll() is not None
    return outcome


def _ask(url: str, prompt: str, expected: str, chance: random.Random, outcome: Outcome,
         lock: threading.Lock) -> None:
    cut = chance.random() < CUT
    stream = cut or chance.random() < 0.5
    started = time.monotonic()
    try:
        connection, response = open_request(url, CHAT, chat_body(prompt, stream=stream, max_tokens=TOKENS))
        text = _read(response, stream, chance.randrange(1, TOKENS // 2) if cut else None)
        connection.close()
    except (OSError, HTTPException, ValueError, KeyError) as error:
        with lock:
            outcome.errors.append(f"{type(error).__name__}: {error}")
        return
    with lock:
        if text is None:
            outcome.cut += 1
        else:
            outcome.complete += 1
            outcome.wrong += text.lstrip() != expected  # `chat` leaves out the space in front
            outcome.seconds.append(time.monotonic() - started)


def _read(response: HTTPResponse, stream: bool, chunks: int | None) -> str | None:
    """The text of an answer, or None if it was left after `chunks` of it. Raises ValueError if it is none."""
    if response.status != 200:
        raise ValueError(f"status {response.status}: {response.read()!r}")
    if not stream:
        return str(json.loads(response.read())["choices"][0]["message"]["content"])
    text = ""
    for line in response:
        if line == b"data: [DONE]\n":
            return text
        if line.startswith(b"data: "):
            text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            if chunks is not None and (chunks := chunks - 1) == 0:
                return None
    raise ValueError("the stream ended without [DONE]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="default: the demo model, low rank in Q8_0")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or _demo(Path(folder))
        outcome = soak(model, seconds=arguments.seconds, clients=arguments.clients)
    print(f"{arguments.clients} clients, {arguments.seconds:.0f} s, {CUT:.0%} of requests cut by the client")
    print(outcome.table())
    if failures := outcome.failures():
        sys.exit("; ".join(failures))


def _demo(folder: Path) -> Path:
    from conversion import DEMO, convert_model

    out = folder / "skipcat.gguf"
    convert_model(DEMO / "model", out, quant="Q8_0", calibration=DEMO / "calibration.txt")
    return out


if __name__ == "__main__":
    main()
