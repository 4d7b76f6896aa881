"""Instructions of an aarch64 core for one decoded token, counted by emulation: `make bench-instructions`.

The static programs of some devices (`make phone`) run under qemu as a core of theirs, with one thread, and a
plugin counts. Generating two tokens less generating one is one token, whatever loading took. A low-rank
file should need no larger share of the dense one's instructions than of its bytes: then decoding stays as
bound by memory as it was. Counts, unlike seconds, are the same in every run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from bench_models import ROOT, Test, cached, ideal, planned_models, written
from bench_report import Report

from skipcat_edge.device import load_device
from skipcat_edge.runtime.native_tools import build_phone_tools
from skipcat_edge.runtime.target import Target
from skipcat_edge.synth_plan import Plan
from skipcat_edge.terminal import new_progress, new_table

LIMIT = 1.03
"""Of the share of instructions over the share of bytes."""
BUILD = ROOT / "build" / "instructions"
EMULATOR = "qemu-aarch64"
PLUGIN_VERSIONS = range(1, 9)
# qemu's name of the core that is most like the device's fast ones
CORES = {"rpi4": "cortex-a72", "rpi5": "neoverse-n1", "pixel-8": "max,sve=off,sme=off,pauth-impdef=on"}
FORMS = {"fused": "1", "composed": "0"}
"""SKIPCAT_FUSED of each form of the graph."""
ONE_TOKEN = Test(0, 1, 0)
EXPLANATION = """\
Executed by one core for the second generated token, counted by qemu's plugin interface, for random \
weights of the model's dimensions. *over bytes*: the share of the dense file's instructions over the share \
of its bytes. Cores: \
""" + ", ".join(f"{device} as {core.partition(',')[0]}" for device, core in CORES.items()) + "."


@dataclass(frozen=True)
class Counter:
    """qemu as a core, with the plugin."""

    core: str
    plugin: Path

    def count(self, program: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> int:
        """Instructions that `program`, of one thread, executes. Raises ClickException where it fails."""
        command = [EMULATOR, "-cpu", self.core, "-plugin", str(self.plugin), str(program), *arguments]
        variables = {**os.environ, **(environment or {})}
        run = subprocess.run(command, capture_output=True, text=True, env=variables)
        found = re.search(r"^instructions: (\d+)$", run.stderr, re.MULTILINE)
        if run.returncode or not found:
            raise click.ClickException(f"{' '.join(command)} failed: {run.stderr[-500:]}")
        return int(found[1])


def new_counter(core: str, directory: Path, program: Path) -> Counter:
    """Builds the plugin in `directory`, for the version of the interface that the emulator has: the one with
    which it runs `program`. Raises ClickException where there is none.
    """
    counter = Counter(core, directory / "count_instructions.so")
    for version in PLUGIN_VERSIONS:
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={version}",
                        str(ROOT / "tests" / "cpp" / "count_instructions.c"), "-o", str(counter.plugin)],
                       check=True)
        with contextlib.suppress(click.ClickException):
            counter.count(program, "--help")
            return counter
    raise click.ClickException(f"{EMULATOR} takes no plugin; sudo apt install qemu-user (not -static).")


@dataclass(frozen=True)
class Emulated:
    """A device's llama-bench, on a core of the device's kind."""

    device: str
    program: Path
    counter: Counter

    def instructions(self, model: Path, n_tokens: int, form: str) -> int:
        """Executed to load `model` and generate `n_tokens`."""
        test = ("-m", str(model), "-p", "0", "-n", str(n_tokens), "-r", "1", "-t", "1", "--no-warmup")
        return self.counter.count(self.program, *test, environment={"SKIPCAT_FUSED": FORMS[form]})


def emulated(device: str) -> Emulated:
    """Builds what is needed. Raises ClickException where the emulator takes no plugin."""
    if shutil.which(EMULATOR) is None:
        raise click.ClickException(f"{EMULATOR} is missing; sudo apt install qemu-user.")
    preset = load_device(device)
    tools = build_phone_tools(BUILD / device, Target(preset.architecture), preset.build.march)
    program = tools / "llama-bench"
    return Emulated(device, program, new_counter(CORES[device], BUILD, program))


def per_token(on: Emulated, model: Plan, form: str) -> int:
    """Instructions of the second generated token."""
    one, two = (on.instructions(cached(model), n_tokens, form) for n_tokens in (1, 2))
    return two - one


def rows(on: Emulated, plans: Sequence[Plan]) -> Iterator[tuple[str, ...]]:
    """Of the dense model, the first of `plans`, and of each low-rank one in both forms."""
    dense, *low_rank = plans
    base = per_token(on, dense, "fused")
    first = (on.device, dense.model.name, dense.type.name)
    yield (*first, "1", "", f"{base / 1e6:.1f}", "", "", "", "")
    for model in low_rank:
        share_of_bytes = 1 / ideal(model, dense, ONE_TOKEN)
        for form in FORMS:
            count = per_token(on, model, form)
            excess = count / base / share_of_bytes
            verdict = "" if form == "composed" else "met" if excess <= LIMIT else "not met"
            yield (*first, f"{model.ratio:g}", form, f"{count / 1e6:.1f}", f"{count / base:.3f}",
                   f"{share_of_bytes:.3f}", f"{excess:.3f}", verdict)


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=("llama-3.2-1b",), show_default=True)
@click.option("--types", default="Q4_0,Q8_0,F16,Q4_K", show_default=True, help="Separated by commas.")
@click.option("--ratios", default="0.8,0.6", show_default=True)
@click.option("--devices", default=",".join(CORES), show_default=True)
@click.option("--source", help="Pinned source archive or directory, for skipcat-edge synth.")
@click.option("--keep", is_flag=True, help="Keep the models in build/bench/ for the next run.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as Markdown.")
def main(models: tuple[str, ...], types: str, ratios: str, devices: str, source: str | None,
         keep: bool, out: Path | None) -> None:
    if unknown := set(devices.split(",")) - CORES.keys():
        raise click.BadParameter(f"no core is known for {', '.join(unknown)}; use {', '.join(CORES)}.")
    targets = [emulated(device) for device in devices.split(",")]
    table = new_table("device", "model", "type", "ratio", "graph", "million instructions", "of dense",
                      "bytes of dense", "over bytes", "", left=5)
    found: list[tuple[str, ...]] = []
    cells = [(model, type_) for model in models for type_ in types.split(",")]
    with new_progress() as progress:
        for model, type_ in cells:
            plans = planned_models(model, type_, ratios)
            if not plans:
                continue
            task = progress.add_task(f"{model} {type_}", total=len(targets) * (2 * len(plans) - 1))
            with written(plans, source, keep):
                for row in (row for target in targets for row in rows(target, plans)):
                    found.append(row)
                    progress.advance(task)
    for row in found:
        table.add_row(*row)
    report = Report("Instructions of an Arm core per token", "make bench-instructions")
    report.text(EXPLANATION)
    report.table(table)
    for form in FORMS:
        excess = [float(row[8]) for row in found if row[4] == form]
        if not excess:
            continue
        mean = statistics.geometric_mean(excess)
        report.text(f"{form.capitalize()} graph: {mean:.3f} in the geometric mean, {max(excess):.3f} at most "
                    f"(limit {LIMIT}).")
    if out:
        report.save(out)


if __name__ == "__main__":
    main()
