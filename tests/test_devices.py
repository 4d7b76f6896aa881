"""Device files and their schema, what is detected of a machine, and `devices`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner

from skipcat_edge.cli import main
from skipcat_edge.device import Device, Memory, device_names, devices_dir, load_device
from skipcat_edge.errors import UserError

NAMES = ["generic-aarch64", "generic-x86-64", "host", "pixel-8", "rpi4", "rpi5", "snapdragon-8-gen-3"]
FILES = [name for name in NAMES if name != "host"]

VALID = """\
name = "board"
title = "A board"
description = "Two fast cores and two slow ones."
architecture = "aarch64"
cores = [
    { kind = "a76", count = 2, cpus = [2, 3], max_mhz = 2400, features = ["asimd", "asimddp"], source = "A" },
    { kind = "a55", count = 2, cpus = [0, 1], features = ["asimd"], source = "A" },
]
threads = { recommended = 2, affinity = [2, 3], reason = "One for each fast core." }
build = { march = "armv8.2-a", android = false }

[memory]
ram_bytes = [1_000, 2_000]
ram_source = "the shop"
theoretical_bandwidth = 17_000
theoretical_source = "its manual"
measured_bandwidth = 9_000
measured_source = "a benchmark"
"""


def load(tmp_path: Path, text: str, name: str = "board") -> Device:
    (tmp_path / f"{name}.toml").write_text(text)
    return load_device(name, tmp_path)


def refusal(tmp_path: Path, text: str) -> str:
    """What is said of a file with `text`: one sentence that starts with the file."""
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    message = error.value.message
    path = f"{tmp_path / 'board.toml'}: "
    assert message.startswith(path)
    assert message.endswith(".") and "\n" not in message
    return message.removeprefix(path)


def sources(device: Device) -> list[str]:
    memory = device.memory
    found = [memory.ram_source, memory.theoretical_source, memory.measured_source]
    return [cores.source for cores in device.cores] + [source for source in found if source is not None]


def test_the_devices_are_those_of_the_repository() -> None:
    assert device_names() == NAMES
    assert devices_dir() == Path(__file__).parent.parent / "devices"


@pytest.mark.parametrize("name", FILES)
def test_every_file_agrees_with_itself(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    build, memory = device.build, device.memory
    assert build.android == (name in ("pixel-8", "snapdragon-8-gen-3"))
    # Code for the device needs nothing that one of its cores lacks, and leaves out no kernel of llama.cpp.
    for option, feature in (("dotprod", "asimddp"), ("fp16", "asimdhp"), ("i8mm", "i8mm"), ("bf16", "bf16")):
        assert (f"+{option}" in build.march) == (feature in device.features), option
    assert all("https://" in source for source in sources(device))
    if memory.theoretical_bandwidth is not None:
        factors = re.match(r"(?:(\d+) channels x )?(\d+) bit x (\d+) MT/s", memory.theoretical_source or "")
        assert factors is not None
        channels, bits, transfers = (int(factor or 1) for factor in factors.groups())
        assert memory.theoretical_bandwidth == channels * bits // 8 * transfers * 10**6
        assert (memory.measured_bandwidth or 0) < memory.theoretical_bandwidth


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("generic")])
def test_threads_run_on_every_core_but_slow_ones(name: str) -> None:
    device = load_device(name)
    slow = {cpu for cores in device.cores if re.search("a5[12]0", cores.kind) for cpu in cores.cpus}
    cpus = {cpu for cores in device.cores for cpu in cores.cpus}
    assert cpus == set(range(len(cpus)))
    assert device.threads is not None
    assert set(device.threads.affinity) == cpus - slow
    assert device.threads.recommended == len(cpus - slow)
    assert device.memory.ram_bytes


def test_generic_devices_claim_no_hardware() -> None:
    for device in map(load_device, ("generic-aarch64", "generic-x86-64")):
        assert (device.threads, device.memory) == (None, Memory())


def test_a_valid_file(tmp_path: Path) -> None:
    device = load(tmp_path, VALID)
    assert [cores.cpus for cores in device.cores] == [(2, 3), (0, 1)]
    assert [cores.max_mhz for cores in device.cores] == [2400, None]
    assert device.features == ("asimd",)  # of every core
    assert device.memory.ram_bytes == (1000, 2000)
    assert device.memory.measured_bandwidth == 9000
    assert json.loads(json.dumps(device.to_json()))["threads"]["affinity"] == [2, 3]


@pytest.mark.parametrize(("old", "new", "key", "said"), [
    ('title = "A board"\n', "", "title", "is missing"),
    ('title = "A board"', 'titel = "A board"', "title", "is missing"),
    ('name = "board"', 'name = "board"\ncolour = "red"', "colour", "is not a known key"),
    ("max_mhz = 2400", "max_ghz = 2", "cores[0].max_ghz", "is not a known key"),
    ('title = "A board"', "title = 7", "title", "must be a string, not 7"),
    ('title = "A board"', 'title = " "', "title", "is empty"),
    ("max_mhz = 2400", 'max_mhz = "2400"', "cores[0].max_mhz", "must be a whole number"),
    ("max_mhz = 2400", "max_mhz = 0", "cores[0].max_mhz", "must be positive"),
    ("max_mhz = 2400", "max_mhz = true", "cores[0].max_mhz", "must be a whole number"),
    ("android = false", "android = 0", "build.android", "must be true or false"),
    ("recommended = 2", "recommended = -2", "threads.recommended", "must be positive"),
    ("cpus = [0, 1]", "cpus = [0, 0]", "cores[1].cpus", "names something twice"),
    ("cpus = [0, 1]", "cpus = [-1, 1]", "cores[1].cpus", "holds -1"),
    ("cpus = [0, 1]", "cpus = [0, 2]", "cores", "give a CPU number to two kinds"),
    ("cpus = [0, 1]", "cpus = [0]", "cores[1].cpus", "has 1 numbers for 2 cores"),
    ("cpus = [0, 1], ", "", "cores[1].cpus", "is missing"),
    ("count = 2, cpus = [0, 1]", "cpus = [0, 1]", "cores[1].count", "is missing"),
    ("count = 2, cpus = [0, 1], ", "", "threads", "not every kind"),
    ('features = ["asimd"]', 'features = ["avx2"]', "cores[1].features", "holds avx2"),
    ('features = ["asimd"]', 'features = "asimd"', "cores[1].features", "must be a list of strings"),
    ('architecture = "aarch64"', 'architecture = "armv7l"', "architecture", "must be one of aarch64, x86_64"),
    ("affinity = [2, 3]", "affinity = [3, 4]", "threads.affinity", "holds CPU 4, which is in no `cores`"),
    ("affinity = [2, 3]", "affinity = [3]", "threads.affinity", "has 1 CPUs for 2 recommended threads"),
    ("ram_bytes = [1_000, 2_000]", "ram_bytes = []", "memory.ram_bytes", "is empty"),
    ("ram_bytes = [1_000, 2_000]", "ram_bytes = [0]", "memory.ram_bytes", "no number may be below 1"),
    (', source = "A" },\n]', " },\n]", "cores[1].source", "is missing"),
    ("build = {", "built = {", "build", "is missing"),
    ('name = "board"', 'name = "boat"', "name", "but the file is called board.toml"),
    ('name = "board"', "name = ", "", "cannot be read as TOML"),
    ('name = "board"', "detect = false", "detect", "can only be true"),
    ('name = "board"', 'name = "board"\ndetect = true', "architecture", "is not a known key"),
])
def test_a_file_against_the_schema(old: str, new: str, key: str, said: str, tmp_path: Path) -> None:
    assert VALID.count(old) == 1
    message = refusal(tmp_path, VALID.replace(old, new))
    assert message.startswith(f"`{key}` " if key else said) and said in message


@pytest.mark.parametrize("figure", ["ram_bytes", "theoretical_bandwidth", "measured_bandwidth"])
def test_a_figure_and_its_source_come_together(figure: str, tmp_path: Path) -> None:
    source = f"{figure.split('_')[0]}_source"

    def without(key: str) -> str:
        return re.sub(rf"^{key} = .*\n", "", VALID, flags=re.M)

    assert refusal(tmp_path, without(source)) == f"`memory.{figure}` has no `{source}`."
    assert refusal(tmp_path, without(figure)) == f"`memory.{source}` is the source of no `{figure}`."


# What is detected of a machine.

Machine = Callable[[str, set[int]], Path]
ArmCpu = tuple[int, int, "int | None", "int | None"]
"""Implementer, part, highest clock in kHz, capacity."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Pretends an architecture and usable CPUs; returns where to put /proc and /sys."""
    def pretend(architecture: str, usable: set[int]) -> Path:
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable, raising=False)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=4096))
        return tmp_path

    return pretend


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def arm_host(root: Path, cpus: Sequence[ArmCpu]) -> Device:
    """What is detected of `cpus`."""
    folder = root / "sys/devices/system/cpu"
    write(folder / "online", f"0-{len(cpus) - 1}")
    info = ""
    for number, (implementer, part, khz, capacity) in enumerate(cpus):
        info += (f"processor\t: {number}\nFeatures\t: fp asimd crc32 asimdhp asimddp\n"
                 f"CPU implementer\t: {implementer:#x}\nCPU part\t: {part:#x}\n\n")
        write(folder / f"cpu{number}/topology/core_cpus_list", number)
        if khz is not None:
            write(folder / f"cpu{number}/cpufreq/cpuinfo_max_freq", khz)
        if capacity is not None:
            write(folder / f"cpu{number}/cpu_capacity", capacity)
    write(root / "proc/cpuinfo", f"{info}Hardware\t: a phone")
    return host(root)


def host(root: Path) -> Device:
    return load_device("host", system=root)


def kinds(device: Device) -> list[tuple[str, tuple[int, ...], int | None]]:
    return [(cores.kind, cores.cpus, cores.max_mhz) for cores in device.cores]


def affinity(device: Device) -> tuple[int, ...]:
    assert device.threads is not None
    assert device.threads.recommended == len(device.threads.affinity)
    return device.threads.affinity


PHONE: list[ArmCpu] = [
    *[(0x41, 0xD80, 2265600, 380)] * 2, *[(0x41, 0xD81, 3148800, 900)] * 3,
    *[(0x41, 0xD81, 2956800, 850)] * 2, (0x41, 0xD82, 3302400, 1024)]
BIG, LITTLE = "implementer 0x51 part 0x804", "implementer 0x51 part 0x805"


def test_a_phone(machine: Machine) -> None:
    device = arm_host(machine("aarch64", set(range(8))), PHONE)
    assert kinds(device) == [("cortex-x4", (7,), 3302), ("cortex-a720", (2, 3, 4), 3149),
                             ("cortex-a720", (5, 6), 2957), ("cortex-a520", (0, 1), 2266)]
    assert [cores.count for cores in device.cores] == [1, 3, 2, 2]
    assert affinity(device) == (2, 3, 4, 5, 6, 7)
    assert device.features == ("asimd", "asimdhp", "asimddp")  # of those that llama.cpp knows
    assert (device.architecture, device.memory.ram_bytes) == ("aarch64", (4096,))
    assert device.build.march == "native"


@pytest.mark.parametrize(("usable", "expected"), [
    ({0, 1, 2, 3}, (2, 3)),
    ({0, 1}, (0, 1)),  # slow cores are better than none
])
def test_only_cpus_that_the_process_may_use(usable: set[int], expected: tuple[int, ...],
                                            machine: Machine) -> None:
    device = arm_host(machine("aarch64", usable), PHONE)
    assert affinity(device) == expected
    assert sum(cores.count or 0 for cores in device.cores) == 8


@pytest.mark.parametrize(("cpus", "names", "expected"), [
    # Of unknown make: told apart by capacity.
    ([(0x51, 0x805, 1785600, 400)] * 2 + [(0x51, 0x804, 2419200, 850), (0x51, 0x804, 2841600, 1024)],
     [BIG, BIG, LITTLE], (2, 3)),
    # Without capacity: known by name.
    ([(0x41, 0xD05, None, None)] * 2 + [(0x41, 0xD0B, None, None)] * 2, ["cortex-a76", "cortex-a55"], (2, 3)),
    # Slow cores alone are no slower than the others.
    ([(0x41, 0xD03, 1400000, 1024)] * 4, ["cortex-a53"], (0, 1, 2, 3)),
])
def test_which_cores_are_fast(cpus: list[ArmCpu], names: list[str], expected: tuple[int, ...],
                              machine: Machine) -> None:
    device = arm_host(machine("aarch64", set(range(4))), cpus)
    assert [cores.kind for cores in device.cores] == names
    assert affinity(device) == expected


def test_a_core_is_known_by_its_register_too(machine: Machine) -> None:
    root = machine("aarch64", {0})
    write(root / "sys/devices/system/cpu/cpu0/regs/identification/midr_el1", "0x00000000414fd0b1")
    assert kinds(host(root)) == [("cortex-a76", (0,), None)]


@pytest.mark.parametrize(("cores", "atoms", "usable", "expected", "counts"), [
    ([(0, 2), (1, 3)], "", {0, 1, 2, 3}, (0, 1), [2]),  # a core with two threads is one core
    ([(0, 2), (1, 3)], "", {1, 2, 3}, (1, 2), [2]),  # for which either thread may stand
    ([(0, 1), (2, 3), (4,), (5,)], "4-5", set(range(6)), (0, 2), [2, 2]),  # efficiency cores
])
def test_x86(cores: list[tuple[int, ...]], atoms: str, usable: set[int], expected: tuple[int, ...],
             counts: list[int], machine: Machine) -> None:
    root = machine("x86_64", usable)
    folder = root / "sys/devices/system/cpu"
    numbers = sorted(number for core in cores for number in core)
    write(folder / "online", f"0-{numbers[-1]}")
    write(root / "sys/devices/cpu_atom/cpus", atoms)
    write(root / "proc/cpuinfo", "\n".join(
        f"processor\t: {number}\nmodel name\t: Core i5\nflags\t\t: fpu sse2 avx2 fma hypervisor\n"
        for number in numbers))
    for core in cores:
        for number in core:
            write(folder / f"cpu{number}/topology/thread_siblings_list", ",".join(map(str, core)))
            # equal cores have unequal clocks
            write(folder / f"cpu{number}/cpufreq/cpuinfo_max_freq", 4600000 - 100000 * number)
    device = host(root)
    assert [kind.count for kind in device.cores] == counts
    assert kinds(device)[0] == ("Core i5", (0, 1, 2, 3), 4600)
    assert affinity(device) == expected
    assert device.features == ("sse2", "avx2", "fma")


@pytest.mark.parametrize("architecture", ["aarch64", "x86_64"])
def test_a_container_that_hides_everything(architecture: str, machine: Machine,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden() -> None:
        raise FileNotFoundError("/proc/meminfo")

    root = machine(architecture, {4, 5})
    monkeypatch.setattr(psutil, "virtual_memory", hidden)
    device = host(root)
    assert kinds(device) == [("unknown", (4, 5), None)]
    assert affinity(device) == (4, 5)
    assert (device.memory.ram_bytes, device.features) == ((), ())


def test_nonsense_in_proc_and_sys(machine: Machine) -> None:
    root = machine("aarch64", {0, 1})
    arm_host(root, [(0x41, 0xD0B, 2400000, 1024)] * 2)
    for file in ("online", "cpu0/cpu_capacity", "cpu0/cpufreq/cpuinfo_max_freq"):
        write(root / "sys/devices/system/cpu" / file, "?")
    device = host(root)
    assert kinds(device) == [("cortex-a76", (1,), 2400), ("cortex-a76", (0,), None)]
    assert affinity(device) == (0, 1)


def test_a_machine_of_another_architecture(machine: Machine) -> None:
    with pytest.raises(UserError, match="riscv64; devices are aarch64 or x86_64"):
        host(machine("riscv64", {0}))


def test_this_very_machine() -> None:
    device = load_device("host")
    assert device.memory.ram_bytes == (psutil.virtual_memory().total,)
    assert device.features
    assert set(affinity(device)) <= os.sched_getaffinity(0)


# The command.

def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["devices", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table() -> None:
    header, _, *lines = run().splitlines()
    assert header.split() == ["name", "title", "cores", "threads", "RAM", "bandwidth", "measured"]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert list(rows) == NAMES
    assert rows["rpi5"] == ("Raspberry Pi 5 4 x cortex-a76 4 "
                            "1, 2, 4, 8, 16 GiB 17.1 GB/s 11.6 GB/s")
    assert "1 x cortex-x3, 4 x cortex-a715, 4 x cortex-a510" in rows["pixel-8"]
    assert rows["generic-aarch64"].endswith("any - - - -")


def test_all_of_one() -> None:
    device = load_device("rpi5")
    text = run("rpi5")
    for said in (device.title, device.description, "threads: 4, on CPUs 0-3", "2400 MHz",
                 "RAM: 1, 2, 4, 8, 16 GiB", "theoretical bandwidth: 17.1 GB/s",
                 "measured bandwidth: 11.6 GB/s",
                 "code for it alone: -march=armv8.2-a+fp16+dotprod"):
        assert said in text
    for source in sources(device):
        assert f"    source: {source}\n" in text


def test_what_is_not_known_of_one() -> None:
    text = run("pixel-8")
    assert "measured bandwidth: not known\n" in text
    assert "in static programs only" in text
    assert text.count("    source: ") == 2  # one for all kinds of cores, one for the RAM
    assert "threads:" not in run("generic-x86-64")


def test_json() -> None:
    listed = json.loads(run("--json"))
    assert [device["name"] for device in listed] == NAMES
    one = json.loads(run("rpi4", "--json"))
    assert one == listed[NAMES.index("rpi4")]
    assert one["cores"][0]["cpus"] == one["threads"]["affinity"] == [0, 1, 2, 3]
    assert one["memory"]["theoretical_bandwidth"] == 12_800_000_000
    assert one["build"]["android"] is False


def test_an_unknown_name() -> None:
    result = CliRunner().invoke(main, ["devices", "../pyproject"])
    assert (result.exit_code, result.stdout) == (2, "")
    known = ", ".join(NAMES)
    assert result.stderr == f"Error: There is no device ../pyproject; the known ones are {known}.\n"


def test_the_command_loads_nothing_heavy_before_it_runs() -> None:
    code = ("import sys, skipcat_edge.commands.devices\n"
            "print({'rich', 'psutil', 'numpy', 'skipcat_edge.device'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
