"""What a measurement on this machine depends on besides the file: heat, clocks and where threads may run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from skipcat_edge.thermal import hottest_cpu, this_machines_zones

# Bits of the Raspberry Pi firmware's answer; 16 higher: it has happened since the start.
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
_PI_STATES = ("under-voltage", "clock capped", "throttled", "soft temperature limit")


@dataclass(frozen=True)
class Moment:
    """The machine as it was once."""

    celsius: float | None
    """Of the hottest CPU zone; None where the machine shows none."""
    throttle_events: int | None
    """How often x86 cores have throttled since the start; None where that is not counted."""
    states: tuple[str, ...]
    """What holds a Raspberry Pi back just now."""


@dataclass(frozen=True)
class Conditions:
    """Of a measurement, from before the first repetition to after the last."""

    cpus: tuple[int, ...]
    """That the threads may use; empty for all."""
    governor: str | None
    """Of the CPUs' clocks, as Linux calls it; several are joined by +."""
    celsius_before: float | None
    celsius_after: float | None
    throttled: tuple[str, ...]
    """Why the machine slowed itself down during the measurement, where it tells."""


def look(system: Path = Path("/")) -> Moment:
    """The state of this machine, whose /sys is below `system`."""
    counts = [int(text) for file in (system / "sys/devices/system/cpu").glob(
        "cpu[0-9]*/thermal_throttle/core_throttle_count") if (text := _read(file)).isdecimal()]
    return Moment(hottest_cpu(this_machines_zones(system)), sum(counts) if counts else None, _pi_states())


def conditions(before: Moment, after: Moment, system: Path = Path("/")) -> Conditions:
    """What lay between two looks at this machine."""
    throttled = [state for state in _PI_STATES if state in before.states + after.states]
    if before.throttle_events is not None and after.throttle_events is not None:
        events = after.throttle_events - before.throttle_events
        if events > 0:
            throttled.append(f"{events} times too hot")
    return Conditions(_affinity(), _governor(system), before.celsius, after.celsius, tuple(throttled))


def _pi_states() -> tuple[str, ...]:
    program = shutil.which("vcgencmd")
    if program is None:
        return ()
    try:
        said = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"throttled=0x([0-9a-fA-F]+)", said.stdout)
    bits = int(found[1], 16) if found else 0
    return tuple(state for index, state in enumerate(_PI_STATES) if bits >> index & 1)


def _affinity() -> tuple[int, ...]:
    if not hasattr(os, "sched_getaffinity"):
        return ()
    usable = os.sched_getaffinity(0)
    return () if len(usable) == os.cpu_count() else tuple(sorted(usable))


def _governor(system: Path) -> str | None:
    files = (system / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return "+".join(sorted({_read(file) for file in files} - {""})) or None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
