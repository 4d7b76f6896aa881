"""What this machine is, from Linux's /proc and /sys; files that a container hides may be missing."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.device import FEATURES
from skipcat_edge.errors import UserError

_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}

_ARM = 0x41
# Part number in MIDR_EL1 -> core, as in Linux's arch/arm64/include/asm/cputype.h.
_ARM_PARTS = {
    0xD03: "cortex-a53", 0xD04: "cortex-a35", 0xD05: "cortex-a55", 0xD07: "cortex-a57", 0xD08: "cortex-a72",
    0xD09: "cortex-a73", 0xD0A: "cortex-a75", 0xD0B: "cortex-a76", 0xD0C: "neoverse-n1", 0xD0D: "cortex-a77",
    0xD40: "neoverse-v1", 0xD41: "cortex-a78", 0xD44: "cortex-x1", 0xD46: "cortex-a510",
    0xD47: "cortex-a710", 0xD48: "cortex-x2", 0xD49: "neoverse-n2", 0xD4B: "cortex-a78c",
    0xD4C: "cortex-x1c", 0xD4D: "cortex-a715", 0xD4E: "cortex-x3", 0xD4F: "neoverse-v2",
    0xD80: "cortex-a520", 0xD81: "cortex-a720", 0xD82: "cortex-x4", 0xD85: "cortex-x925",
    0xD87: "cortex-a725",
}
_IN_ORDER = {"cortex-a35", "cortex-a53", "cortex-a55", "cortex-a510", "cortex-a520"}

_CPU_INFO = "/proc/cpuinfo and /sys/devices/system/cpu of this machine"


@dataclass(frozen=True)
class _Cpu:
    """One CPU as Linux numbers them."""

    number: int
    kind: str
    efficient: bool
    """Of a kind that is made to save power, where that is known by its name."""
    core: tuple[str, ...]
    """The same for CPUs of one physical core."""
    max_mhz: int | None
    capacity: int | None
    """Speed relative to the fastest CPU's 1024."""
    features: tuple[str, ...]


def detect(system: Path) -> dict[str, Any]:
    """A device's table without `name`, `title` and `description`; /proc and /sys are below `system`.

    Raises UserError on an architecture that no device file can have.
    """
    machine = platform.machine()
    architecture = _ARCHITECTURES.get(machine.lower())
    if architecture is None:
        raise UserError(f"This machine is {machine}; devices are {' or '.join(FEATURES)}.")
    usable = _usable_cpus()
    kinds = _kinds(_cpus(system, architecture, usable or set()), architecture)
    affinity = _affinity(kinds, usable)
    table: dict[str, Any] = {
        "architecture": architecture,
        "cores": [_cores(kind) for kind in kinds],
        "threads": {
            "recommended": len(affinity), "affinity": affinity,
            "reason": "One for each fast physical core that this process may use.",
        },
        "build": {
            "march": "native", "android": hasattr(sys, "getandroidapilevel"),
        },
    }
    ram = _ram_bytes()
    if ram is not None:
        table["memory"] = {"ram_bytes": [ram], "ram_source": "psutil.virtual_memory() on this machine"}
    return table


def _cpus(system: Path, architecture: str, usable: set[int]) -> list[_Cpu]:
    """Every CPU that is switched on, of unknown kind where nothing can be read; those in `usable` are,
    whatever a container shows."""
    folder = system / "sys/devices/system/cpu"
    info = _cpuinfo(system / "proc/cpuinfo")
    numbers = _cpu_list(_read(folder / "online"))
    if not numbers:
        numbers = sorted(int(path.name[3:]) for path in folder.glob("cpu[0-9]*") if path.name[3:].isdigit())
    if not numbers and not usable:
        numbers = sorted(info) or list(range(os.cpu_count() or 1))
    atoms = set(_cpu_list(_read(system / "sys/devices/cpu_atom/cpus")))
    return [_cpu(number, folder / f"cpu{number}", info.get(number, {}), architecture, number in atoms)
            for number in sorted({*numbers, *usable})]


def _cpu(number: int, folder: Path, info: dict[str, str], architecture: str, atom: bool) -> _Cpu:
    if architecture == "aarch64":
        kind = _arm_kind(info, folder)
        flags = info.get("Features", "").split()
    else:
        kind = info.get("model name", "unknown") + (" (efficiency cores)" if atom else "")
        flags = info.get("flags", "").split()
    siblings = _read(folder / "topology/core_cpus_list") or _read(folder / "topology/thread_siblings_list")
    if siblings:
        core: tuple[str, ...] = (siblings,)
    elif "core id" in info:
        core = (info.get("physical id", ""), info["core id"])
    else:
        core = (str(number),)
    khz = _number(_read(folder / "cpufreq/cpuinfo_max_freq"))
    return _Cpu(
        number, kind, atom or kind in _IN_ORDER, core, round(khz / 1000) if khz else None,
        _number(_read(folder / "cpu_capacity")) or None,
        tuple(feature for feature in FEATURES[architecture] if feature in flags),
    )


def _arm_kind(info: dict[str, str], folder: Path) -> str:
    """The core's name by its identification register, which /proc/cpuinfo shows in parts."""
    implementer, part = (_number(info.get(key), 16) for key in ("CPU implementer", "CPU part"))
    if implementer is None or part is None:
        register = _number(_read(folder / "regs/identification/midr_el1"), 16)
        if register is None:
            return "unknown"
        implementer, part = register >> 24 & 0xFF, register >> 4 & 0xFFF
    if implementer == _ARM and part in _ARM_PARTS:
        return _ARM_PARTS[part]
    return f"implementer 0x{implementer:02x} part 0x{part:03x}"


def _kinds(cpus: list[_Cpu], architecture: str) -> list[list[_Cpu]]:
    """CPUs by kind, fast kinds first. On Arm the same core with another clock is another kind; on x86
    the clocks of equal cores differ a little from one to the next."""
    kinds: dict[tuple[str, int | None], list[_Cpu]] = {}
    for cpu in cpus:
        kinds.setdefault((cpu.kind, cpu.max_mhz if architecture == "aarch64" else None), []).append(cpu)
    return sorted(kinds.values(), key=lambda kind: (kind[0].efficient, -_capacity(kind), -_max_mhz(kind)))


def _cores(kind: list[_Cpu]) -> dict[str, Any]:
    table: dict[str, Any] = {
        "kind": kind[0].kind, "count": len({cpu.core for cpu in kind}), "cpus": [cpu.number for cpu in kind],
        "features": list(kind[0].features), "source": _CPU_INFO,
    }
    if _max_mhz(kind):
        table["max_mhz"] = _max_mhz(kind)
    return table


def _affinity(kinds: list[list[_Cpu]], usable: set[int] | None) -> list[int]:
    """One CPU of each fast physical core in `usable`, or of each slow one if no fast one is there."""
    def cores_of(kinds: list[list[_Cpu]]) -> list[int]:
        cores: dict[tuple[str, ...], int] = {}
        for cpu in sorted((cpu for kind in kinds for cpu in kind), key=lambda cpu: cpu.number):
            if usable is None or cpu.number in usable:
                cores.setdefault(cpu.core, cpu.number)
        return list(cores.values())

    return cores_of(_fast(kinds)) or cores_of(kinds)


def _fast(kinds: list[list[_Cpu]]) -> list[list[_Cpu]]:
    """The kinds that share work evenly: threads wait for the slowest of them after each layer."""
    fast = [kind for kind in kinds if not kind[0].efficient]
    if len(fast) > 1 and len(fast) == len(kinds):
        slowest = min(fast, key=_capacity)
        if 0 < _capacity(slowest) < max(map(_capacity, fast)) / 2:
            fast.remove(slowest)
    return fast or kinds


def _capacity(kind: list[_Cpu]) -> int:
    return max(cpu.capacity or 0 for cpu in kind)


def _max_mhz(kind: list[_Cpu]) -> int:
    return max(cpu.max_mhz or 0 for cpu in kind)


def _usable_cpus() -> set[int] | None:
    """CPUs that this process may use; None for all of them."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _ram_bytes() -> int | None:
    try:
        import psutil

        return int(psutil.virtual_memory().total) or None
    except (ImportError, OSError, RuntimeError):
        return None


def _cpuinfo(path: Path) -> dict[int, dict[str, str]]:
    """CPU number -> what /proc/cpuinfo says of it; old kernels say some things once for all."""
    cpus: dict[int, dict[str, str]] = {}
    common: dict[str, str] = {}
    for block in re.split(r"\n\s*\n", _read(path) or ""):
        values = {key.strip(): value.strip() for key, colon, value in
                  (line.partition(":") for line in block.splitlines()) if colon}
        number = _number(values.get("processor"))
        if number is None:
            common.update(values)
        else:
            cpus[number] = values
    return {number: {**common, **values} for number, values in cpus.items()}


def _cpu_list(text: str | None) -> list[int]:
    """`0-2,7` as numbers; nothing for what is no such list."""
    numbers: list[int] = []
    for part in (text or "").split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match:
            numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def _number(text: str | None, base: int = 10) -> int | None:
    try:
        return int(text or "", base)
    except ValueError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return None
