"""Devices: what their cores and memory are, how many threads to use and how to build for them.

One TOML file each in the repository's `devices/`. A figure without a source is refused, and what
is not known is absent. `host.toml` says `detect = true`: `device_host` fills in the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipcat_edge.errors import UserError, first_line
from skipcat_edge.packages import package_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FEATURES: dict[str, tuple[str, ...]] = {
    "aarch64": ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
    "x86_64": ("sse2", "ssse3", "sse4_2", "avx", "avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f",
               "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_int8"),
}
"""Architecture -> CPU features that llama.cpp has kernels for, by their names in /proc/cpuinfo."""


@dataclass(frozen=True)
class Cores:
    """Cores of one kind."""

    kind: str
    """For example `cortex-a76`; `any` where only the architecture is known."""
    features: tuple[str, ...]
    """Of FEATURES; empty where they are not known."""
    source: str
    count: int | None = None
    """Physical cores."""
    cpus: tuple[int, ...] = ()
    """As Linux numbers them; more than `count` where a core runs two threads."""
    max_mhz: int | None = None


@dataclass(frozen=True)
class Threads:
    """How to run llama.cpp."""

    recommended: int
    affinity: tuple[int, ...]
    """A CPU number for each thread."""
    reason: str


@dataclass(frozen=True)
class Memory:
    """Main memory; a figure and its source are there together or not at all."""

    ram_bytes: tuple[int, ...] = ()
    """Every size sold."""
    ram_source: str | None = None
    theoretical_bandwidth: int | None = None
    """Bytes per second: width of the bus times transfers per second."""
    theoretical_source: str | None = None
    measured_bandwidth: int | None = None
    """Bytes per second that the CPU reaches; the source says how it was measured."""
    measured_source: str | None = None


@dataclass(frozen=True)
class Rates:
    """How fast llama.cpp runs one ggml type, all recommended threads together."""

    type: str
    prompt: int
    """Multiplications per second of a prompt."""
    decode: int
    """Bytes of weights per second of decoding."""
    source: str


@dataclass(frozen=True)
class Build:
    """How to compile for the device."""

    march: str
    """GCC's `-march` of programs for this device alone; wheels hold code for many."""
    android: bool
    """It has no glibc: only static programs run (`make phone`), and no wheel does."""


@dataclass(frozen=True)
class Device:
    """One file of `devices/`."""

    name: str
    title: str
    description: str
    architecture: str
    """A key of FEATURES."""
    cores: tuple[Cores, ...]
    """Fast kinds first."""
    threads: Threads | None
    """None where the cores are not known."""
    memory: Memory
    build: Build
    rates: tuple[Rates, ...] = ()
    """Of some types; empty where nobody published them."""

    @property
    def features(self) -> tuple[str, ...]:
        """What every core has."""
        return tuple(feature for feature in FEATURES[self.architecture]
                     if all(feature in cores.features for cores in self.cores))

    def to_json(self) -> dict[str, Any]:
        """The fields above as plain values."""
        return asdict(self)


def devices_dir() -> Path:
    """Directory with the TOML files. Raises UserError if it is not installed."""
    return package_dir("skipcat_devices")


def device_names(directory: Path | None = None) -> list[str]:
    """Names of the devices in `directory` (default: the installed one), sorted."""
    return sorted(path.stem for path in (directory or devices_dir()).glob("*.toml"))


def load_device(name: str, directory: Path | None = None, system: Path = Path("/")) -> Device:
    """The device `name` of `directory` (default: the installed one).

    `system` is where the /proc and /sys of a detected device are. Raises UserError for an unknown
    name, and for a file that does not follow the schema, naming the file and the key.
    """
    directory = directory or devices_dir()
    names = device_names(directory)
    if name not in names:
        raise UserError(f"There is no device {name}; the known ones are {', '.join(names)}.")
    path = directory / f"{name}.toml"
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({first_line(error)}).") from None
    if "detect" in values:
        values = _detected(_Table(path, values), system)
    device = _device(_Table(path, values))
    if device.name != name:
        raise UserError(f"{path}: `name` is {device.name}, but the file is called {name}.toml.")
    return device


class _Table:
    """A TOML table that is read key by key; every complaint names the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any], where: str = "") -> None:
        self._path = path
        self._values = values
        self._where = where
        self._known: dict[str, None] = {}  # in the order of asking

    def error(self, key: str, what: str) -> UserError:
        """A complaint about `key`."""
        return UserError(f"{self._path}: `{self._where}{key}` {what}.")

    def has(self, key: str) -> bool:
        """Whether the optional `key` is there."""
        self._known[key] = None
        return key in self._values

    def text(self, key: str) -> str:
        """A string that says something."""
        value = self._value(key, str, "a string")
        if not value.strip():
            raise self.error(key, "is empty")
        return str(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        return bool(self._value(key, bool, "true or false"))

    def positive(self, key: str) -> int:
        """A positive whole number."""
        value = self._value(key, int, "a whole number")
        if value <= 0:
            raise self.error(key, f"is {value}; it must be positive")
        return int(value)

    def optional_text(self, key: str) -> str | None:
        """`text`, or None where `key` is absent."""
        return self.text(key) if self.has(key) else None

    def optional_positive(self, key: str) -> int | None:
        """`positive`, or None where `key` is absent."""
        return self.positive(key) if self.has(key) else None

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of different strings."""
        return self._list(key, str, "strings")

    def numbers(self, key: str, least: int) -> tuple[int, ...]:
        """A list of different whole numbers, none below `least`; not empty."""
        values = self._list(key, int, "whole numbers")
        if not values:
            raise self.error(key, "is empty")
        if min(values) < least:
            raise self.error(key, f"holds {min(values)}; no number may be below {least}")
        return values

    def table(self, key: str) -> _Table:
        """A table below this one."""
        return _Table(self._path, self._value(key, dict, "a table"), f"{self._where}{key}.")

    def tables(self, key: str) -> list[_Table]:
        """A list of tables; not empty."""
        values = self._value(key, list, "a list of tables")
        if not values or not all(type(value) is dict for value in values):
            raise self.error(key, "must be a list of one table or more")
        return [_Table(self._path, value, f"{self._where}{key}[{index}].")
                for index, value in enumerate(values)]

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        unknown = [key for key in self._values if key not in self._known]
        if unknown:
            raise self.error(unknown[0], f"is not a known key; known are {', '.join(self._known)}")

    def _value(self, key: str, type_: type, what: str) -> Any:
        self._known[key] = None
        if key not in self._values:
            raise self.error(key, "is missing")
        value = self._values[key]
        if type(value) is not type_:  # a bool is no number
            raise self.error(key, f"must be {what}, not {value!r}")
        return value

    def _list(self, key: str, type_: type, what: str) -> tuple[Any, ...]:
        values = self._value(key, list, f"a list of {what}")
        if not all(type(value) is type_ for value in values):
            raise self.error(key, f"must be a list of {what}, not {values!r}")
        if len(set(values)) < len(values):
            raise self.error(key, "names something twice")
        return tuple(values)


def _detected(fixed: _Table, system: Path) -> dict[str, Any]:
    """A whole table from a file that leaves the machine to detection."""
    if not fixed.flag("detect"):
        raise fixed.error("detect", "can only be true; leave it out where the file says everything")
    values = {key: fixed.text(key) for key in ("name", "title", "description")}
    fixed.finish()
    from skipcat_edge.device_host import detect

    return {**values, **detect(system)}


def _device(table: _Table) -> Device:
    name, title, description = table.text("name"), table.text("title"), table.text("description")
    architecture = table.text("architecture")
    if architecture not in FEATURES:
        raise table.error("architecture", f"is {architecture}; it must be one of {', '.join(FEATURES)}")
    cores = tuple(_cores(entry, architecture) for entry in table.tables("cores"))
    cpus = [cpu for kind in cores for cpu in kind.cpus]
    if len(set(cpus)) < len(cpus):
        raise table.error("cores", "give a CPU number to two kinds")
    counted = all(kind.count is not None for kind in cores)
    if table.has("threads") and not counted:
        raise table.error("threads", "is there, but not every kind of `cores` has a `count`")
    threads = _threads(table.table("threads"), cpus) if counted else None
    memory = _memory(table.table("memory")) if table.has("memory") else Memory()
    build = _build(table.table("build"))
    rates = tuple(_rates(entry) for entry in table.tables("rates")) if table.has("rates") else ()
    if len({each.type for each in rates}) < len(rates):
        raise table.error("rates", "give a type twice")
    table.finish()
    return Device(name, title, description, architecture, cores, threads, memory, build, rates)


def _rates(table: _Table) -> Rates:
    from skipcat_edge.weight_types import weight_type

    try:
        type_ = weight_type(table.text("type")).name
    except UserError as error:
        raise table.error("type", f"is wrong: {error}") from None
    rates = Rates(type_, table.positive("prompt"), table.positive("decode"), table.text("source"))
    table.finish()
    return rates


def _cores(table: _Table, architecture: str) -> Cores:
    kind, features, source = table.text("kind"), table.texts("features"), table.text("source")
    for feature in features:
        if feature not in FEATURES[architecture]:
            known = ", ".join(FEATURES[architecture])
            raise table.error("features", f"holds {feature}; known on {architecture} are {known}")
    count = table.optional_positive("count")
    cpus = table.numbers("cpus", least=0) if table.has("cpus") or count is not None else ()
    if cpus and count is None:
        raise table.error("count", "is missing, though `cpus` is there")
    if count is not None and len(cpus) < count:
        raise table.error("cpus", f"has {len(cpus)} numbers for {count} cores")
    max_mhz = table.optional_positive("max_mhz")
    table.finish()
    return Cores(kind, features, source, count, cpus, max_mhz)


def _threads(table: _Table, cpus: list[int]) -> Threads:
    recommended, affinity = table.positive("recommended"), table.numbers("affinity", least=0)
    reason = table.text("reason")
    unknown = [cpu for cpu in affinity if cpu not in cpus]
    if unknown:
        raise table.error("affinity", f"holds CPU {unknown[0]}, which is in no `cores`")
    if len(affinity) != recommended:
        raise table.error("affinity", f"has {len(affinity)} CPUs for {recommended} recommended threads")
    table.finish()
    return Threads(recommended, affinity, reason)


def _memory(table: _Table) -> Memory:
    for figure, source in (("ram_bytes", "ram_source"), ("theoretical_bandwidth", "theoretical_source"),
                           ("measured_bandwidth", "measured_source")):
        if table.has(figure) and not table.has(source):
            raise table.error(figure, f"has no `{source}`")
        if table.has(source) and not table.has(figure):
            raise table.error(source, f"is the source of no `{figure}`")
    memory = Memory(
        ram_bytes=table.numbers("ram_bytes", least=1) if table.has("ram_bytes") else (),
        ram_source=table.optional_text("ram_source"),
        theoretical_bandwidth=table.optional_positive("theoretical_bandwidth"),
        theoretical_source=table.optional_text("theoretical_source"),
        measured_bandwidth=table.optional_positive("measured_bandwidth"),
        measured_source=table.optional_text("measured_source"),
    )
    table.finish()
    return memory


def _build(table: _Table) -> Build:
    build = Build(table.text("march"), table.flag("android"))
    table.finish()
    return build
