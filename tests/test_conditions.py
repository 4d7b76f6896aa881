"""What surrounds a measurement, read from a system of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skipcat_edge import conditions


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """A Linux machine of two CPUs."""
    thermal, cpus = tmp_path / "sys/class/thermal", tmp_path / "sys/devices/system/cpu"
    zones = [("acpitz", "99000"), ("x86_pkg_temp", "51500"), ("cpu-thermal", "48000"),
             ("cpu-broken", "-274000")]
    for index, (zone, value) in enumerate(zones):
        write(thermal / f"thermal_zone{index}/type", zone)
        write(thermal / f"thermal_zone{index}/temp", value)
    for cpu, governor in enumerate(["powersave", "performance"]):
        write(cpus / f"cpu{cpu}/cpufreq/scaling_governor", governor)
        write(cpus / f"cpu{cpu}/thermal_throttle/core_throttle_count", "3")
    return tmp_path


def pi_says(folder: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Raspberry Pi's vcgencmd, alone on the path."""
    program = folder / "bin" / "vcgencmd"
    write(program, f'#!/bin/sh\n[ "$1" = get_throttled ] && echo "{answer}"')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_heat_throttling_and_governor(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    before = conditions.look(system)
    assert before == conditions.Moment(51.5, 6, ())
    write(system / "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "10")
    write(system / "sys/class/thermal/thermal_zone2/temp", "83000")
    found = conditions.conditions(before, conditions.look(system), system)
    assert (found.celsius_before, found.celsius_after) == (51.5, 83.0)
    assert found.governor == "performance+powersave"
    assert found.throttled == ("7 times too hot",)


def test_a_machine_that_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    moment = conditions.look(tmp_path)
    assert moment == conditions.Moment(None, None, ())
    found = conditions.conditions(moment, moment, tmp_path)
    assert (found.governor, found.celsius_after, found.throttled) == (None, None, ())


@pytest.mark.parametrize(("answer", "states"), [
    ("throttled=0x0", ()),
    ("throttled=0x50000", ()),  # it was so, before
    ("throttled=0x50005", ("under-voltage", "throttled")),
    ("throttled=0xa", ("clock capped", "soft temperature limit")),
    ("VCHI initialization failed", ()),
])  # fmt: skip
def test_a_raspberry_pi_tells(answer: str, states: tuple[str, ...], tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    pi_says(tmp_path, answer, monkeypatch)
    moment = conditions.look(tmp_path)
    assert moment.states == states
    calm = conditions.Moment(None, None, ())
    assert conditions.conditions(calm, moment, tmp_path).throttled == states
    assert conditions.conditions(moment, calm, tmp_path).throttled == states


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cpus_that_a_process_is_kept_on(tmp_path: Path) -> None:
    usable = os.sched_getaffinity(0)
    moment = conditions.look(tmp_path)
    if len(usable) == os.cpu_count():
        assert conditions.conditions(moment, moment).cpus == ()
    if len(usable) < 2:
        pytest.skip("this process may use one CPU only")
    os.sched_setaffinity(0, {min(usable)})
    try:
        assert conditions.conditions(moment, moment).cpus == (min(usable),)
    finally:
        os.sched_setaffinity(0, usable)
