"""Measurements on an Android phone, through the `adb` program: what `bench --adb` does.

Everything on the phone lies in FOLDER. Of the phone itself only its shell and toybox are used.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from skipcat_edge.benchmark import Result, Spread, steadiness
from skipcat_edge.conditions import Conditions
from skipcat_edge.device import Device, load_device
from skipcat_edge.errors import UserError
from skipcat_edge.gguf_file import require_gguf
from skipcat_edge.session import model_info
from skipcat_edge.terminal import decimal_bytes
from skipcat_edge.thermal import hottest_cpu

FOLDER = "/data/local/tmp/skipcat-edge"
TOOL = "llama-bench"
_MARCH = "march.txt"
_SIGILL, _SIGKILL = 4, 9  # the phone's, not this computer's

_NO_SPACE = "The phone has no space left in /data; delete something there."
# adb's own complaints among those of the phone's programs, and what to do about them. Older adb starts
# them with "error:", newer with "adb:", and a push with both.
_ADB_SAYS = re.compile(
    r"^(?:adb(?:\.exe)?|error): (?:error: )?(?:failed to get feature set: )?(.+)", re.MULTILINE)
_CAUSES = (
    (r"no devices", "adb sees no phone; connect one by USB, with USB debugging on (Developer options)."),
    (r"more than one", "Several phones are connected; give --serial with one that `adb devices` lists."),
    (r"device (unauthorized|still authorizing)",
     "The phone does not trust this computer yet; unlock it and allow USB debugging there."),
    (r"device (offline|still connecting)|closed|protocol fault",
     "The phone does not answer adb; unlock it and connect it again."),
    (r"device '.*' not found", "adb does not see that phone; `adb devices` lists those that it sees."),
    (r".*No space left on device", _NO_SPACE),
)

_ZONES = ("for zone in /sys/class/thermal/thermal_zone*; do "
          'echo "$(cat $zone/type 2>/dev/null) $(cat $zone/temp 2>/dev/null)"; done')


@dataclass(frozen=True)
class Answer:
    """Of a command on the phone."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last thing it complained of, in brackets, or nothing."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return f" ({lines[-1]})" if lines else ""


@dataclass(frozen=True)
class Copy:
    """A file of this computer and its name in FOLDER."""

    source: Path
    name: str
    size: int
    sha256: str


class Adb:
    """The adb program, bound to one phone."""

    def __init__(self, serial: str | None = None) -> None:
        """`serial`: None for the only phone, or the one that ANDROID_SERIAL names. Raises UserError
        where there is no adb."""
        program = shutil.which("adb")
        if program is None:
            raise UserError("adb was not found; install it, on Debian with `sudo apt install adb`.")
        self._command = [program, *(["-s", serial] if serial else [])]

    def shell(self, command: str) -> Answer:
        """Run `command` in the phone's shell. Raises UserError where adb reaches no phone."""
        return self._run("shell", command)

    def push(self, copy: Copy) -> None:
        """Send a file. Raises UserError where that fails."""
        # an absolute path is no option, whatever the file is called
        answer = self._run("push", str(copy.source.absolute()), f"{FOLDER}/{copy.name}")
        if answer.code:
            raise UserError(f"{copy.source} could not be pushed to the phone{answer.last_line}.")

    def make_folder(self) -> None:
        """Make FOLDER if it is not there. Raises UserError where that fails."""
        made = self.shell(f"mkdir -p {FOLDER}")
        if made.code:
            raise UserError(f"{FOLDER} could not be created on the phone{made.last_line}.")

    def missing(self, copies: Sequence[Copy]) -> set[Copy]:
        """Those of `copies` that are not in FOLDER with the same size and SHA-256. Raises UserError if the
        phone has no space for them."""
        missing, needed = set(), 0
        for copy in dict.fromkeys(copies):
            name = shlex.quote(copy.name)
            stat = self.shell(f"cd {FOLDER} && stat -c %s {name}")
            size = int(stat.out) if not stat.code and stat.out.strip().isdecimal() else 0
            if size == copy.size:
                digest = self.shell(f"cd {FOLDER} && sha256sum {name}")
                if digest.out.split()[:1] == [copy.sha256]:
                    continue
            missing.add(copy)
            needed += copy.size - size  # adb unlinks what it replaces
        # Available stands before Use%; where no number does, the push will tell
        free = re.search(r"(\d+)\s+\d+%", self.shell(f"df -k {FOLDER}").out) if missing else None
        if free and needed > int(free[1]) * 1024:
            raise UserError(f"The phone has {decimal_bytes(int(free[1]) * 1024)} of space left, but "
                            f"{decimal_bytes(needed)} are needed in {FOLDER}; delete something there.")
        return missing

    def celsius(self) -> float | None:
        """Temperature of the hottest CPU zone in °C; None where the phone shows none."""
        lines = (line.strip().rpartition(" ") for line in self.shell(_ZONES).out.splitlines())
        return hottest_cpu((zone, value) for zone, _, value in lines)

    def _run(self, *arguments: str) -> Answer:
        # adb shell would otherwise read what belongs to us
        done = subprocess.run([*self._command, *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                              encoding="utf-8", errors="replace", check=False)
        said = _ADB_SAYS.search(done.stderr) if done.returncode else None
        if said:
            for pattern, sentence in _CAUSES:
                if re.match(pattern, said[1]):
                    raise UserError(sentence)
            # programs on the phone begin their own errors like adb
            if "shell" not in arguments:
                raise UserError(
                    f"adb failed: {said[1].rstrip('.')}; `adb devices` says which phones it can use.")
        return Answer(done.returncode, done.stdout, done.stderr)


def phone_device(name: str) -> Device:
    """The device `name`, if it can be one that programs are sent to over adb. Raises UserError for an
    unknown name, for `host` and for x86-64."""
    device = load_device(name)
    if name == "host" or device.architecture != "aarch64":
        raise UserError(f"{name} is no 64-bit Arm device to send programs to; name one like pixel-8, or "
                        "generic-aarch64 for a phone that `skipcat-edge devices` does not list.")
    return device


def tools_folder(device: Device) -> Path:
    """Where the programs for `device` are built."""
    return Path("build") / "phone" / device.name


def record_march(tools: Path, march: str) -> None:
    """Write down beside the programs what they were compiled for."""
    (tools / _MARCH).write_text(march + "\n", encoding="utf-8")


def threads_and_cpus(device: Device, threads: int | None) -> tuple[int, tuple[int, ...]]:
    """How many threads to run on which CPUs: the device's own choice, or its fastest CPUs for `threads`.

    No CPUs where it does not say which it has. Raises UserError where `threads` cannot be chosen or
    served.
    """
    if device.threads is None:
        if threads is None:
            raise UserError(f"How many threads suit {device.name} is not known; give --threads.")
        return threads, ()
    chosen = device.threads.affinity
    if threads is None:
        return device.threads.recommended, chosen
    fast_first = [cpu for kind in device.cores for cpu in kind.cpus]
    if threads > len(fast_first):
        raise UserError(f"{device.name} has {len(fast_first)} CPUs, but {threads} --threads are asked for.")
    return threads, tuple(sorted(sorted(fast_first, key=lambda cpu: cpu not in chosen)[:threads]))


def bench_adb(files: Sequence[str], *, prompt_tokens: int, gen_tokens: int, repetitions: int, threads: int,
              cpus: Sequence[int], tools: Path, device: str = "...", serial: str | None = None,
              advance: Callable[[str], None] = lambda _: None) -> list[Result]:
    """Measure `files` on a phone as `bench` does here: one repetition of each in turn.

    `cpus`: numbers of the CPUs that the threads may use, none for all. `tools`: the folder with
    llama-bench, built for `device`. Each repetition is a process of its own, which warms itself up.
    `advance` hears the file before it is sent and before each repetition: (repetitions + 1) * len(files)
    times. Load times and memory are not known. Raises UserError for whatever goes wrong.
    """
    for file in files:
        require_gguf(Path(file))
    tool = tools / TOOL
    if not tool.is_file():
        raise UserError(f"{tools} holds no {TOOL}; run `make phone DEVICE={device}`, or say with "
                        "--phone-tools where it is.")
    adb = Adb(serial)
    adb.make_folder()  # before large files are read, so that a phone that is not there is noticed
    commands = [_command(Path(file), prompt_tokens, gen_tokens, threads, cpus) for file in files]
    program, *models = _copies(tool, [Path(file) for file in files])
    missing = adb.missing([program, *models])
    if program in missing:
        adb.push(program)
        adb.shell(f"chmod 755 {FOLDER}/{TOOL}")  # not every computer's file system says so
    for file, model in zip(files, models, strict=True):
        advance(file)
        if model in missing:
            adb.push(model)
            missing.remove(model)
    before = adb.celsius()
    speeds: list[list[tuple[float, float | None]]] = [[] for _ in files]
    for _ in range(repetitions):
        for file, model, command, measured in zip(files, models, commands, speeds, strict=True):
            advance(file)
            answer = adb.shell(f"cd {FOLDER} && {shlex.join(command)} -m {shlex.quote(model.name)}")
            if answer.code:
                raise _failure(file, answer, tools)
            measured.append(_speeds(file, answer.out, device))
    after = adb.celsius()
    around = Conditions(tuple(cpus), None, before, after, ())
    return [
        Result(file, threads, prompt_tokens, gen_tokens, repetitions, Spread.of(prompts),
               Spread.of(decodes) if decodes else None, around, steadiness(prompts, decodes),
               Path(file).stat().st_size)
        for file, measured in zip(files, speeds, strict=True)
        for prompts, decodes in [([prompt for prompt, _ in measured],
                                  [decode for _, decode in measured if decode is not None])]
    ]


def _copies(tool: Path, models: Sequence[Path]) -> list[Copy]:
    """With names that are safe in a shell and say so where they differ from the file's own."""
    names: dict[str, str] = {}
    copies = []
    for path in (tool, *models):
        digest = _sha256(path)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name).lstrip("-.")
        if name != path.name or names.get(name, digest) != digest:
            name = f"{digest[:8]}-{name[-100:]}"
        names[name] = digest
        copies.append(Copy(path, name, path.stat().st_size, digest))
    return copies


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _command(file: Path, prompt_tokens: int, gen_tokens: int, threads: int, cpus: Sequence[int]) -> list[str]:
    """One repetition by llama-bench, of all but the model's name."""
    # toybox's taskset, unlike others, takes no 0x
    pinned = ["taskset", f"{sum(1 << cpu for cpu in cpus):x}"] if cpus else []
    tokens = ["-p", str(prompt_tokens), "-n", str(gen_tokens)]
    if model_info(file).embedding:
        # all tokens at once, as an encoder needs them
        batch = str(prompt_tokens)
        tokens = ["-p", str(prompt_tokens), "-n", "0", "-embd", "1", "-b", batch, "-ub", batch]
    return [*pinned, f"./{TOOL}", *tokens, "-r", "1", "-t", str(threads), "-o", "json"]


def _speeds(file: str, output: str, device: str) -> tuple[float, float | None]:
    """Tokens per second of the prompt and of decoding in llama-bench's JSON."""
    try:
        tests = json.loads(output)
        prompt = [float(test["avg_ts"]) for test in tests if test["n_prompt"] > 0]
        decode = [float(test["avg_ts"]) for test in tests if test["n_gen"] > 0]
        if len(prompt) != 1 or len(decode) > 1 or not all(0 < x < math.inf for x in prompt + decode):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: {TOOL} on the phone printed no measurement; build it again with "
                        f"`make phone DEVICE={device}`.") from None
    return prompt[0], decode[0] if decode else None


def _failure(file: str, answer: Answer, tools: Path) -> UserError:
    if answer.code == 128 + _SIGILL or "Illegal instruction" in answer.err:
        try:
            march = f"is built with -march={(tools / _MARCH).read_text('utf-8').strip()}"
        except OSError:
            march = "is built for another CPU"
        return UserError(f"{file}: {TOOL} {march} and died on the phone of an illegal instruction; build for "
                         "the phone's own device, or with `make phone DEVICE=generic-aarch64` for any.")
    if answer.code == 128 + _SIGKILL or answer.err.strip().endswith("Killed"):
        return UserError(f"{file}: the phone killed {TOOL}, as it does when memory is short; close its apps "
                         "or take a smaller model.")
    return UserError(f"{file}: {TOOL} failed on the phone with exit code {answer.code}{answer.last_line}; "
                     "`skipcat-edge bench` without --adb shows whether the file is sound.")
