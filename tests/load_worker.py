"""Load files named on the command line, one after another, and print what became of each as JSON.

A line {"start": FILE} comes before anything touches FILE, so that a crash has a culprit.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

LOG_ERROR, LOG_CONTINUED = 4, 5


def load_native(path: str) -> dict[str, Any]:
    """llama_model_load_from_file: was it loaded, and llama.cpp's error lines."""
    import llama_cpp

    errors: list[str] = []
    last_level = 0

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        nonlocal last_level
        last_level = last_level if level == LOG_CONTINUED else level
        if last_level == LOG_ERROR:
            errors.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if model:
        llama_cpp.llama_model_free(model)
    return {"loaded": bool(model), "message": "".join(errors)}


def load_cli(path: str) -> dict[str, Any]:
    """`skipcat-edge generate`, in this process: exit code and both outputs."""
    from click.testing import CliRunner

    from skipcat_edge.cli import main

    result = CliRunner().invoke(main, ["generate", path, "-p", "Once", "-n", "2", "--threads", "1"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}


def main() -> None:
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a failed assertion would start a debugger
    load = {"native": load_native, "cli": load_cli}[sys.argv[1]]
    for path in sys.argv[2:]:
        print(json.dumps({"start": path}), flush=True)
        print(json.dumps({"done": path, **load(path)}), flush=True)


if __name__ == "__main__":
    main()
