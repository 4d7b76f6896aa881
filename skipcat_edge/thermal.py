"""Temperature of a machine's CPU, from Linux's thermal zones: of this machine, or of a phone over adb."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# Tensor and Exynos name the zones for their clusters, Qualcomm cpu-0-0 and so on, MediaTek mtktscpu, Intel
# x86_pkg_temp.
_CPU_ZONE = re.compile(r"(?i)cpu|^(big|mid|little)\d*$|^x86_pkg_temp$")


def hottest_cpu(zones: Iterable[tuple[str, str]]) -> float | None:
    """°C of the hottest CPU zone, of (type, temp) as the kernel gives them; None where there is none."""
    found = [
        degrees for zone, value in zones
        if _CPU_ZONE.search(zone) and re.fullmatch(r"-?\d+", value)
        # the kernel's documented unit; some old drivers have another
        and 1 < (degrees := int(value) / 1000) < 150
    ]
    return max(found, default=None)


def this_machines_zones(system: Path = Path("/")) -> list[tuple[str, str]]:
    """(type, temp) of each zone of this machine, whose /sys is below `system`; none where it shows none."""
    zones = []
    for folder in sorted((system / "sys/class/thermal").glob("thermal_zone*")):
        try:
            zones.append(((folder / "type").read_text().strip(), (folder / "temp").read_text().strip()))
        except (OSError, ValueError):  # a sensor may be off
            continue
    return zones
