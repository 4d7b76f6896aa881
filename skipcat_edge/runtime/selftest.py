"""Does the installed build compute what it should? Logits of tiny models against stored ones.

The models and their logits, computed without llama.cpp, are made by converter/demo/golden.py. A kernel
that was miscompiled, or that this CPU computes otherwise, shows as an error of the size of the logits.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.check import BUILD_COMMAND
from skipcat_edge.runtime.selftest_worker import Job

if TYPE_CHECKING:
    import numpy as np

GOLDEN = Path(__file__).parent / "golden"
LOGITS = "logits.npz"
TOKENS = "tokens"

# llama.cpp rounds activations before it multiplies them: by blocks to 8 bits for a quantised weight, to
# F16 for an F16 one. Each is twice the largest error of 1,000 runs of the float64 reference with
# activations rounded that way, each run moved by another 1e-4 first: 0.038 for Q8_0, 0.041 for Q4_0 (with
# KleidiAI's scales, one for each row), 0.055 for Q4_K. F16 gave 0.002, and 0.0042 in 66 runs with sums
# kept in F16, as on Arm. AVX-512 kernels are off by 0.0007 to 0.032. With any one matrix zero the error is
# 0.5 or more, with every eighth of its rows zero 0.22 or more.
TOLERANCES: Mapping[str, float] = {"F16": 0.01, "Q8_0": 0.08, "Q4_0": 0.08, "Q4_K": 0.11}

ADVICE = ("If a build that was made on this machine fails too, try another compiler (CC and CXX), or code "
          "for any CPU (SKIPCAT_EDGE_CMAKE_ARGS=-DGGML_NATIVE=OFF).")

# A few are enough for the kernels of one row.
DECODED = 9

WORKER = (sys.executable, "-m", "skipcat_edge.runtime.selftest_worker")
_TIMEOUT_S = 60
# What the worker does after each of its answers about a model.
_DOING = {None: "loading {}", "loaded": "running a prompt in {}", "prompt": "decoding in {}",
          "decode": "closing {}"}


class RuntimeMissingError(UserError):
    """There is no patched runtime to be tested."""

    exit_code = 1


@dataclass(frozen=True)
class Outcome:
    """What became of one model."""

    model: str
    """The type of its matrices."""
    forms: tuple[str, ...]
    """How its layers are stored: every one of these is computed."""
    tolerance: float
    prompt_error: float | None
    """The largest error of a token's logits, relative to their norm; None: there are no logits, or
    some are not numbers."""
    decode_error: float | None
    tokens: int
    """Greedy next tokens whose lead over the second is larger than the tolerance, prompt and decode."""
    tokens_ok: int
    problem: str | None
    """What went wrong, as a sentence; None: all is well."""

    def to_json(self) -> dict[str, Any]:
        """The fields above as plain values."""
        return asdict(self)


@dataclass
class _Answers:
    """What the worker said about one model."""

    stage: str | None = None
    logits: dict[str, Any] = field(default_factory=dict)
    """`prompt` and `decode`: [tokens, vocabulary]."""
    error: str | None = None


def selftest(threads: int, directory: Path | None = None) -> list[Outcome]:
    """Run every model of `directory` (None: GOLDEN) and compare.

    Raises RuntimeMissingError where llama_cpp is missing, stock or crashes on import; UserError where the
    stored data is missing or damaged.
    """
    import numpy as np

    directory = directory or GOLDEN
    try:
        with np.load(directory / LOGITS) as file:
            expected = {name: file[name] for name in (TOKENS, *TOLERANCES)}
        forms = {name: _forms(directory / f"{name}.gguf") for name in TOLERANCES}
    except Exception as error:  # a damaged file is reported in as many ways as it has layers
        raise UserError(
            f"The stored models in {directory} are missing or damaged ({error}); install skipcat-edge again."
        ) from None
    paths = {str(directory / f"{name}.gguf"): name for name in TOLERANCES}
    answers = _run(paths, expected[TOKENS].tolist(), threads)
    return [_compare(name, forms[name], expected[name], answers[path]) for path, name in paths.items()]


def _forms(path: Path) -> tuple[str, ...]:
    from skipcat_edge.format import parse_weight_name, read_owners
    from skipcat_edge.gguf_file import open_gguf

    reader = open_gguf(path)
    found = {("single", "shared")[len(owner.members) > 1] + (" Skip" if owner.skip else "")
             for owner in read_owners(reader)}
    dense = ["dense"] if any(parse_weight_name(tensor.name) for tensor in reader.tensors) else []
    return (*sorted(found), *dense)


def _run(names: Mapping[str, str], tokens: Sequence[int], threads: int) -> dict[str, _Answers]:
    """What the worker says about each model of `names` (path -> name).

    One that kills it has that for an error, and a new worker goes on with those after it.
    """
    answers = {path: _Answers() for path in names}
    left = list(names)
    while left:
        lines, death = _work(Job(left, list(tokens), DECODED, threads))
        if not lines:
            death = death or "said nothing"
            raise RuntimeMissingError(f"The runtime {death} while being imported{_remedy(death)}")
        if "error" in lines[0]:
            raise RuntimeMissingError(lines[0]["error"])
        for line in lines[1:]:
            answer = answers[line["model"]]
            answer.error, answer.stage = line.get("error"), line.get("stage", answer.stage)
            if "logits" in line:
                answer.logits[line["stage"]] = line["logits"]
        if death is None:
            break
        # the last one, if it died after all answers were given
        culprit = next((path for path in left if answers[path].stage != "decode" and not answers[path].error),
                       left[-1])
        doing = _DOING[answers[culprit].stage].format(names[culprit])
        answers[culprit].error = f"The runtime {death} while {doing}{_remedy(death)}"
        left = left[left.index(culprit) + 1 :]
    return answers


def _work(job: Job) -> tuple[list[dict[str, Any]], str | None]:
    """The worker's answers, and how it died, as a part of a sentence; None: as it should."""
    process = subprocess.Popen(
        WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace",
        # A failed assertion would start a debugger; threads that wait would keep busy cores from others.
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_WAIT_POLICY": "passive"},
    )
    late = False
    try:
        out, err = process.communicate(json.dumps(asdict(job)) + "\n", timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        out, err = process.communicate()
    lines = [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith("\n")]
    code = process.returncode
    if late:
        return lines, f"did not answer for {_TIMEOUT_S} seconds"
    if code == 0:
        return lines, None
    said = [line.strip() for line in err.splitlines() if line.strip()]
    last = f" ({said[-1]})" if said else ""
    if code > 0:
        return lines, f"ended with exit code {code}{last}"
    return lines, f"crashed with {signal.Signals(-code).name}{last}"


def _remedy(death: str) -> str:
    if "SIGILL" in death:
        return f": this build uses instructions that this CPU lacks; build it here with `{BUILD_COMMAND}`."
    if "SIGKILL" in death:
        return "; free some memory and try again."
    return f"; build it here with `{BUILD_COMMAND}`."


def _compare(name: str, forms: tuple[str, ...], expected: np.ndarray, answers: _Answers) -> Outcome:
    """Judge the answers about one model; expected: [tokens, vocabulary]."""
    import numpy as np

    tolerance = TOLERANCES[name]
    first, second = np.sort(expected, axis=1)[:, [-1, -2]].T
    clear_lead = first - second > tolerance * np.sqrt((expected**2).mean(axis=1))
    errors: dict[str, float | None] = {}
    tokens = tokens_ok = 0
    for stage, count in ("prompt", len(expected)), ("decode", DECODED):
        found = np.array(answers.logits.get(stage, []))
        wanted, compared = expected[:count], clear_lead[:count]
        errors[stage] = _error(found, wanted)
        tokens += int(compared.sum())
        if found.shape == wanted.shape:
            tokens_ok += int((found.argmax(axis=1) == wanted.argmax(axis=1))[compared].sum())
    problem = answers.error
    if problem is None:
        wrong = [f"{stage} error {'not a number' if error is None else f'{error:.2g}'}"
                 for stage, error in errors.items() if error is None or error > tolerance]
        if tokens_ok < tokens:
            wrong.append(f"{tokens - tokens_ok} of {tokens} next tokens differ")
        if wrong:
            problem = (f"{name} gives wrong logits ({', '.join(wrong)}; allowed is {tolerance:g}): do not "
                       f"trust this build with files of that type; build it here with `{BUILD_COMMAND}`.")
    return Outcome(name, forms, tolerance, errors["prompt"], errors["decode"], tokens, tokens_ok, problem)


def _error(found: np.ndarray, expected: np.ndarray) -> float | None:
    """The largest over tokens of |found - expected| / |expected|, both [tokens, vocabulary].

    Its largest, because a kernel may be wrong for one token of a group only.
    """
    import numpy as np

    if found.shape != expected.shape:
        return None
    distances = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    largest = float(distances.max())
    return largest if math.isfinite(largest) else None
