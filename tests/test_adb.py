"""`bench --adb` and `runtime phone`, with a transcript or this machine's shell for the phone."""

from __future__ import annotations

import json
import re
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_phone import Phone

from skipcat_edge.adb import FOLDER, Adb, Copy, _copies, phone_device, threads_and_cpus
from skipcat_edge.cli import main
from skipcat_edge.device import load_device
from skipcat_edge.errors import UserError
from skipcat_edge.runtime import native_tools
from skipcat_edge.runtime.pin import read_pin
from skipcat_edge.runtime.target import Target

LLAMA_BENCH = Path(__file__).resolve().parent.parent / "build" / "native" / "stock" / "bin" / "llama-bench"


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    return Phone(tmp_path, monkeypatch)


def shell(command: str, out: str = "", err: str = "", code: int = 0) -> dict[str, Any]:
    return {"argv": ["shell", command], "stdout": out, "stderr": err, "code": code}


def there(file: Path, name: str, digest: str | None = None) -> list[dict[str, Any]]:
    """The answers about a file that is on the phone."""
    digest = digest or sha256(file.read_bytes()).hexdigest()
    return [shell(f"cd {FOLDER} && stat -c %s {name}", f"{file.stat().st_size}\n"),
            shell(f"cd {FOLDER} && sha256sum {name}", f"{digest}  {name}\n")]


def absent(name: str) -> dict[str, Any]:
    return shell(f"cd {FOLDER} && stat -c %s {name}", "", f"stat: '{name}': No such file or directory\n", 1)


def space(kilobytes: int) -> dict[str, Any]:
    return shell(f"df -k {FOLDER}", "Filesystem     1K-blocks     Used Available Use% Mounted on\n"
                                    f"/dev/block/dm-52 114345836 61820964 {kilobytes}  55% /data\n")


FOLDER_MADE = shell(f"mkdir -p {FOLDER}")


def refusal(result: Result) -> str:
    """The one sentence that a failed command printed."""
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"Error: .*\.\n", result.stderr)
    return result.stderr


def test_two_files_take_turns(phone: Phone) -> None:
    phone.play(*phone.recorded())
    result = phone.bench(phone.dense, phone.skipcat)
    assert result.exit_code == 0, result.output
    _, _, dense, skipcat, _, *notes = result.stdout.splitlines()
    assert [re.split(r"  +", line.strip())[2:] for line in (dense, skipcat)] == [
        ["-", "-", "-", "96.0 (95.0-100.0)", "1.00", "1.33 s", "19.0 (17.0-20.0)", "1.00", "-"],
        ["-", "-", "-", "150.0 (147.0-156.0)", "1.56", "853 ms", "25.0 (24.0-26.0)", "1.32", "-"],
    ]
    assert notes == [
        "5 threads on CPUs 4-8; prompt of 128 tokens, 64 tokens decoded",
        "CPU temperature: 41.0 °C before, 73.5 °C after",
        f"{phone.dense}: 15% slower in the last repetition than in the first; the machine may throttle or be "
        "busy.",
    ]


@pytest.mark.runtime
def test_json_has_the_local_fields(phone: Phone, demo_dense_gguf: Path) -> None:
    phone.play(*phone.recorded())
    result = phone.bench(phone.dense, phone.skipcat, options=["--device", "pixel-8", "--json"])
    dense, skipcat = json.loads(result.stdout)
    expected = {
        "file": str(phone.skipcat), "file_bytes": phone.skipcat.stat().st_size, "threads": 5,
        "load_s": None, "peak_rss_bytes": None, "allocated_bytes": None, "bytes_per_token": None,
        "prompt_tps": pytest.approx(150), "prompt_tps_min": pytest.approx(147),
        "prompt_tps_max": pytest.approx(156), "first_token_s": pytest.approx(128 / 150),
        "decode_tps": pytest.approx(25), "steadiness": pytest.approx(0.96),
        "cpus": [4, 5, 6, 7, 8], "celsius_before": 41.0, "celsius_after": 73.5, "device": "pixel-8",
        "llama_cpp": read_pin().wheel_version,
    }
    assert {key: skipcat[key] for key in expected} == expected
    (here,) = json.loads(CliRunner().invoke(main, [
        "bench", str(demo_dense_gguf), "--prompt-tokens", "4", "--gen-tokens", "2", "--repetitions", "1",
        "--no-bandwidth", "--json"]).stdout)
    assert list(dense) == list(here)


def test_only_what_is_not_there_is_pushed(phone: Phone) -> None:
    recorded = phone.recorded()
    other = sha256(b"an older file of the same size").hexdigest()
    (push,) = [entry for entry in recorded if entry["argv"][:2] == ["push", str(phone.dense)]]
    measured = [entry for entry in recorded if entry["argv"][-1].endswith("-m dense.gguf")]
    temperature = recorded[-1]
    phone.play(FOLDER_MADE, *there(phone.tool, "llama-bench"), *there(phone.dense, "dense.gguf", other),
               space(1), push, temperature, *measured, temperature)
    assert phone.bench(phone.dense).exit_code == 0
    everything = [*there(phone.tool, "llama-bench"), *there(phone.dense, "dense.gguf")]
    phone.play(FOLDER_MADE, *everything, temperature, *measured, temperature)
    assert phone.bench(phone.dense).exit_code == 0


@pytest.mark.parametrize(
    ("stderr", "part"),
    [
        ("error: no devices/emulators found\n", "USB debugging"),
        ("adb: no devices/emulators found\n", "USB debugging"),
        ("error: more than one device/emulator\n", "--serial"),
        ("adb: more than one device/emulator\n", "--serial"),
        ("error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\nTry 'adb kill-server' "
         "if that seems wrong.\nOtherwise check for a confirmation dialog on your device.\n",
         "does not trust"),
        ("adb: device still authorizing\n", "does not trust"),
        ("adb: device offline\n", "does not answer"),
        ("error: closed\n", "does not answer"),
        ("adb.exe: device 'R58' not found\n", "does not see that phone"),
        ("* daemon not running; starting now at tcp:5037\nadb: cannot connect to daemon\n",
         "cannot connect to daemon"),
        ("mkdir: '/data/local/tmp/skipcat-edge': Read-only file system\n", "Read-only file system"),
    ],
)
def test_phones_out_of_reach(stderr: str, part: str, phone: Phone) -> None:
    phone.play(FOLDER_MADE | {"stderr": stderr, "code": 1})
    assert part in refusal(phone.bench(phone.dense))


def test_the_serial_is_adbs(phone: Phone) -> None:
    phone.play({"argv": ["-s", "R58 x", *FOLDER_MADE["argv"]], "stderr": "error: closed\n", "code": 1})
    refusal(phone.bench(phone.dense, options=["--device", "pixel-8", "--serial", "R58 x"]))


def test_a_full_phone(phone: Phone) -> None:
    phone.play(FOLDER_MADE, *there(phone.tool, "llama-bench"), absent("dense.gguf"), space(0))
    assert "0 bytes of space left" in refusal(phone.bench(phone.dense))
    target = f"{FOLDER}/dense.gguf"
    error = f"failed to copy '{phone.dense}' to '{target}': remote write failed: No space left on device"
    unknown = space(1) | {"stdout": "?"}
    phone.play(FOLDER_MADE, *there(phone.tool, "llama-bench"), absent("dense.gguf"), unknown,
               {"argv": ["push", str(phone.dense), target], "stderr": f"adb: error: {error}\n", "code": 1})
    assert "no space left" in refusal(phone.bench(phone.dense))


@pytest.mark.parametrize("march", ["armv8.2-a+fp16+dotprod+i8mm", None])
@pytest.mark.parametrize("err", ["Illegal instruction \n", ""])
def test_illegal_instructions_name_the_march(march: str | None, err: str, phone: Phone) -> None:
    if march:
        (phone.tool.parent / "march.txt").write_text(march + "\n")
    sentence = refusal(failing(phone, 132, err))
    assert "illegal instruction" in sentence and "generic-aarch64" in sentence
    assert (f"-march={march}" in sentence) if march else ("-march" not in sentence)


@pytest.mark.parametrize(
    ("code", "err", "part"),
    [
        (137, "Killed \n", "memory is short"),
        (1, "llama_bench: error: failed to load model 'dense.gguf'\n", "exit code 1 (llama_bench: error: "),
        (127, "/system/bin/sh: taskset: inaccessible or not found\n", "taskset: inaccessible"),
        (1, "", "exit code 1;"),
        (0, "", "no measurement"),
    ],
)
def test_a_failing_llama_bench(code: int, err: str, part: str, phone: Phone) -> None:
    sentence = refusal(failing(phone, code, err))
    assert part in sentence and str(phone.dense) in sentence


def failing(phone: Phone, code: int, err: str) -> Result:
    """A first repetition that ends with `code`."""
    recorded = phone.recorded()
    (temperature,) = [entry for entry in recorded[:-1] if "thermal" in entry["argv"][-1]]
    first = next(entry for entry in recorded if entry["argv"][-1].endswith("-m dense.gguf"))
    phone.play(FOLDER_MADE, *there(phone.tool, "llama-bench"), *there(phone.dense, "dense.gguf"), temperature,
               shell(first["argv"][-1], "[\n", err, code))
    return phone.bench(phone.dense)


def measured(prompt: float, decode: float | None) -> str:
    tests = [{"n_prompt": 128, "n_gen": 0, "avg_ts": prompt}]
    return json.dumps(tests + ([] if decode is None else [{"n_prompt": 0, "n_gen": 64, "avg_ts": decode}]))


@pytest.mark.skipif(sys.platform != "linux", reason="the phone is a Linux")
@pytest.mark.parametrize("name", ["a b;touch PWNED;.gguf", "$(touch PWNED).gguf", "-rf.gguf", "a,b.gguf",
                                  "`touch PWNED`\n.gguf", "modèle.gguf", "...", "llama-bench"])
def test_hostile_file_names_are_harmless(name: str, phone: Phone) -> None:
    """All commands are run by a real shell."""
    phone.be_this_machine(f"#!/bin/sh\nfor last; do :; done\ntest -f \"$last\" && echo '{measured(2, 1)}'\n")
    file = phone.model(name)
    for _ in range(2):  # pushed, then found
        result = phone.bench(file, options=["--threads", "1", "--phone-tools", "build/phone/pixel-8"])
        assert result.exit_code == 0, result.output
    assert not list(phone.folder.rglob("PWNED"))
    safe = {path.name for path in (phone.bin / "phone").iterdir()} - {"llama-bench"}
    assert len(safe) == 1 and all(re.fullmatch(r"[0-9a-f]{8}-[A-Za-z0-9._-]*", each) for each in safe)
    pushes = [call for call in phone.done() if call[0] == "push"]
    assert [call[1] for call in pushes] == [str(phone.tool), str(file)]
    assert (phone.bin / "phone" / "llama-bench").read_bytes() == phone.tool.read_bytes()


def test_names_on_the_phone(phone: Phone) -> None:
    other, same = phone.model("b/dense.gguf", note="another"), phone.model("c/dense.gguf", note="dense.gguf")
    copies = _copies(phone.tool, [phone.dense, other, same, phone.dense])
    digest = sha256(other.read_bytes()).hexdigest()
    assert [copy.name for copy in copies] == ["llama-bench", "dense.gguf", f"{digest[:8]}-dense.gguf",
                                              "dense.gguf", "dense.gguf"]
    assert copies[2] == Copy(other, f"{digest[:8]}-dense.gguf", other.stat().st_size, digest)


@pytest.mark.skipif(sys.platform != "linux", reason="the phone is a Linux")
def test_an_encoder_has_only_a_prompt(phone: Phone) -> None:
    phone.be_this_machine(f"#!/bin/sh\necho '{measured(3, None)}'\n")
    result = phone.bench(phone.model("encoder.gguf", "bert"),
                         options=["--threads", "2", "--phone-tools", "build/phone/pixel-8"])
    assert result.exit_code == 0, result.output
    assert "encoder.gguf has no decoder" in result.stdout
    assert "2 threads; prompt of 128" in result.stdout
    (command,) = {call[1] for call in phone.done() if "./llama-bench" in call[1]}
    assert command.split(" && ")[1] == ("./llama-bench -p 128 -n 0 -embd 1 -b 128 -ub 128 -r 1 -t 2 -o json "
                                        "-m encoder.gguf")


@pytest.mark.native
@pytest.mark.skipif(not LLAMA_BENCH.is_file(), reason="no build/native/stock; run `make native-tools`")
def test_the_real_llama_bench(phone: Phone, demo_dense_gguf: Path) -> None:
    """Stock: the patched one differs in what it can load, which test_arm.py has it do."""
    phone.be_this_machine(f"#!/bin/sh\nexec '{LLAMA_BENCH}' \"$@\"\n")
    result = phone.bench(demo_dense_gguf,
                         options=["--threads", "1", "--phone-tools", "build/phone/pixel-8", "--json"])
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    assert min(entry["prompt_tps_min"], entry["decode_tps_min"]) > 0


@pytest.mark.parametrize(
    ("zones", "celsius"),
    [
        ("BIG 41000\nMID 43500\nG3D 90000\n", 43.5),
        ("cpu-0-0 51200\ncpuss-1 50900\ngpuss-0 99000\nbattery 30000\n", 51.2),
        ("mtktscpu 61000\nmtktsbattery 99000\n", 61.0),
        ("cpu-0-0 -40000\ncpu-0-1 45\ncpu-0-2 \n", None),
        ("BIG \n \nbattery 30000\n", None),
        ("", None),
    ],
)
def test_the_hottest_cpu_zone(zones: str, celsius: float | None, phone: Phone) -> None:
    phone.play(phone.recorded()[-1] | {"stdout": zones})
    assert Adb().celsius() == celsius


def test_an_unknown_temperature_is_none(phone: Phone) -> None:
    phone.play(*[entry | {"stdout": ""} if "thermal" in entry["argv"][-1] else entry
                 for entry in phone.recorded()])
    result = phone.bench(phone.dense, phone.skipcat, options=["--device", "pixel-8", "--json"])
    assert {row["celsius_before"] for row in json.loads(result.stdout)} == {None}


def test_missing_tools(phone: Phone) -> None:
    phone.tool.unlink()
    assert "make phone DEVICE=pixel-8" in refusal(phone.bench(phone.dense))
    assert "make phone" in refusal(phone.bench(phone.dense, options=["--threads", "1", "--phone-tools", "x"]))


def test_missing_adb(phone: Phone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(phone.folder))
    assert "adb was not found" in refusal(phone.bench(phone.dense))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "--device"),
        (["--phone-tools", "build/phone/pixel-8"], "--threads"),
        (["--device", "host"], "host"),
        (["--device", "nothing"], "nothing"),
        (["--device", "generic-aarch64"], "--threads"),
        (["--device", "pixel-8", "--threads", "10"], "has 9 CPUs"),
    ],
)
def test_what_is_not_known_of_the_phone_is_asked(options: list[str], part: str, phone: Phone) -> None:
    assert part in refusal(phone.bench(phone.dense, options=options))


@pytest.mark.parametrize("option", ["--serial", "--phone-tools"])
def test_options_of_a_phone_need_adb(option: str, phone: Phone) -> None:
    assert "--adb" in refusal(CliRunner().invoke(main, ["bench", str(phone.dense), option, "pixel-8"]))


def test_threads_go_to_the_fastest_cpus() -> None:
    pixel = load_device("pixel-8")
    assert threads_and_cpus(pixel, None) == (5, (4, 5, 6, 7, 8))
    assert threads_and_cpus(pixel, 1) == (1, (8,))
    assert threads_and_cpus(pixel, 6) == (6, (0, 4, 5, 6, 7, 8))
    assert threads_and_cpus(load_device("generic-aarch64"), 3) == (3, ())


@pytest.mark.parametrize("name", ["host", "generic-x86-64"])
def test_programs_are_for_arm_only(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is no 64-bit Arm device"):
        phone_device(name)
    assert refusal(CliRunner().invoke(main, ["runtime", "phone", "--device", name]))


@pytest.mark.parametrize("out", [None, "elsewhere"])
def test_runtime_phone(out: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built: list[Any] = []

    def build(out: Path, target: Target, march: str, source: Path | None = None) -> Path:
        built.append((target, march, source))
        out.mkdir(parents=True)
        return out

    monkeypatch.setattr(native_tools, "build_phone_tools", build)
    options = ["--device", "pixel-8", *(["--out", out] if out else [])]
    result = CliRunner().invoke(main, ["runtime", "phone", *options])
    assert result.exit_code == 0, result.output
    march = load_device("pixel-8").build.march
    assert built == [(Target("aarch64"), march, None)]
    folder = Path(out or "build/phone/pixel-8")
    assert result.stdout == f"{folder}\n"
    assert (folder / "march.txt").read_text() == march + "\n"
