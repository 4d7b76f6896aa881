"""What runtime is installed, and what it can do."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from skipcat_edge.errors import UserError
from skipcat_edge.runtime.pin import read_pin

BUILD_COMMAND = "skipcat-edge runtime build --install"


@dataclass(frozen=True)
class RuntimeStatus:
    """The llama_cpp that this Python imports. Fields are None or empty where there is none."""

    wanted: str
    """Version that the pin and the patches make, for example `0.3.36+skipcat.1`."""
    error: str | None = None
    """Why llama_cpp cannot be imported."""
    path: str | None = None
    version: str | None = None
    patched: str | None = None
    """What the library calls its patches, for example `skipcat.1`; None for a stock one."""
    format_version: int | None = None
    """The highest version of the file format that it reads."""
    cpu_features: tuple[str, ...] = ()
    cpu_variant: str | None = None
    """Which of a wheel's CPU backends was chosen, for example `armv8.2_2`; None where there is only one."""
    cpu_backend: bool = True
    """There is one that this CPU can run."""
    rpc: bool = False

    @property
    def problem(self) -> str | None:
        """One clause on what is wrong, or None if the wanted runtime is installed."""
        if self.error is not None:
            return f"llama_cpp cannot be imported ({self.error})"
        if self.patched is None:
            return f"llama_cpp {self.version} is not patched"
        if self.version != self.wanted:
            return f"llama_cpp is {self.version}, not {self.wanted}"
        if not self.cpu_backend:
            return "llama_cpp brings no CPU backend that runs on this processor"
        return None


def runtime_status() -> RuntimeStatus:
    """Import llama_cpp and ask its library; never raises for one that is missing or broken."""
    wanted = read_pin().wheel_version
    try:
        package = import_module("llama_cpp")
        library: Any = import_module("llama_cpp.llama_cpp")
    except Exception as error:  # an ImportError, or whatever loading the library raises
        return RuntimeStatus(wanted, error=str(error).splitlines()[0] if str(error) else repr(error))
    name = _call(library._lib, "skipcat_runtime_version", ctypes.c_char_p)
    rpc = _load_backends(library)
    features = library.llama_print_system_info().decode("utf-8", "replace")
    return RuntimeStatus(
        wanted,
        path=str(package.__path__[0]),
        version=str(getattr(package, "__version__", "unknown")),
        patched=None if name is None else name.decode("utf-8", "replace"),
        format_version=_call(library._lib, "skipcat_format_version", ctypes.c_int32),
        cpu_features=tuple(re.findall(r"(\w+) = 1\b", features)),
        cpu_variant=loaded_cpu_variant(),
        cpu_backend="CPU :" in features,
        rpc=rpc,
    )


def require_patched() -> None:
    """Raise UserError, with the command to run, unless the imported llama_cpp is patched."""
    status = runtime_status()
    if status.patched is None:
        raise UserError(f"The runtime is missing: {status.problem}; run `{BUILD_COMMAND}`.")


def _load_backends(library: Any) -> bool:
    """Load the backends, where they are libraries of their own, without a word; whether RPC is one."""
    log, data = library.llama_log_callback(0), ctypes.c_void_p()
    if hasattr(library, "llama_log_get"):  # not in every llama_cpp that may be installed
        library.llama_log_get(ctypes.byref(log), ctypes.byref(data))
    silent = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(silent, None)
    try:
        return bool(library.llama_supports_rpc())
    finally:
        library.llama_log_set(log, data)


def loaded_cpu_variant() -> str | None:
    """Which CPU backend of several this process has loaded, from the libraries that it has mapped."""
    try:
        maps = Path("/proc/self/maps").read_text("utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"/libggml-cpu-([\w.]+)\.so$", maps, re.MULTILINE)
    return found[1] if found else None


def _call(library: ctypes.CDLL, function: str, result: Any) -> Any:
    """Call a function without arguments, or None if the library has none of that name."""
    try:
        pointer = getattr(library, function)
    except AttributeError:
        return None
    pointer.restype, pointer.argtypes = result, []
    return pointer()
