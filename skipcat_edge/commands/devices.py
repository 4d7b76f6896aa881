"""`skipcat-edge devices`: the devices whose cores, memory and build settings are known."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from skipcat_edge.device import Cores, Device

_GIB = 1 << 30


@click.command(short_help="Show known devices: cores, threads, memory, build settings.",
               epilog=example("devices rpi5"))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, or with NAME one object.")
def command(name: str | None, as_json: bool) -> None:
    """List the known devices, or show all about the device NAME, with the source of each figure.

    `host` is this machine. Bandwidth is the memory's, in GB/s: by its width and clock, and as measured.
    """
    from skipcat_edge.device import device_names, load_device

    if name is not None:
        device = load_device(name)
        if as_json:
            click.echo(json.dumps(device.to_json(), indent=2))
        else:
            _print_one(device)
        return
    devices = []
    for each in device_names():
        try:
            devices.append(load_device(each))
        except UserError as error:
            if each != "host":
                raise
            click.echo(f"host is left out: {error}", err=True)
    if as_json:
        click.echo(json.dumps([device.to_json() for device in devices], indent=2))
    else:
        _print_all(devices)


def _print_all(devices: list[Device]) -> None:
    from rich.markup import escape

    from skipcat_edge.terminal import new_table, stdout_console

    table = new_table("name", "title", "cores", "threads", "RAM", "bandwidth", "measured", left=3)
    for device in devices:
        memory = device.memory
        table.add_row(
            escape(device.name), escape(device.title), escape(_all_cores(device.cores)),
            str(device.threads.recommended) if device.threads else "-",
            _ram(memory.ram_bytes), _bandwidth(memory.theoretical_bandwidth),
            _bandwidth(memory.measured_bandwidth),
        )
    stdout_console().print(table)


def _print_one(device: Device) -> None:
    from rich.markup import escape

    from skipcat_edge.terminal import new_table, ranges, stdout_console

    console = stdout_console()
    console.print(escape(f"{device.name}: {device.title}, {device.architecture}"))
    console.print(escape(device.description))
    console.print()
    table = new_table("cores", "CPUs", "features", "count", "max. clock", left=3)
    for cores in device.cores:
        table.add_row(
            escape(cores.kind), ranges(cores.cpus) or "-", " ".join(cores.features) or "-",
            str(cores.count or "-"), f"{cores.max_mhz} MHz" if cores.max_mhz else "-",
        )
    console.print(table)
    for core_source in dict.fromkeys(cores.source for cores in device.cores):
        _print_source(console, core_source)
    console.print()
    threads, memory, build = device.threads, device.memory, device.build
    if threads is not None:
        console.print(f"threads: {threads.recommended}, on {'CPUs' if threads.recommended > 1 else 'CPU'} "
                      f"{ranges(threads.affinity)}")
        console.print(escape(f"    {threads.reason}"))
    for what, figure, source in (
        ("RAM", _ram(memory.ram_bytes), memory.ram_source),
        ("theoretical bandwidth", _bandwidth(memory.theoretical_bandwidth), memory.theoretical_source),
        ("measured bandwidth", _bandwidth(memory.measured_bandwidth), memory.measured_source),
    ):
        console.print(f"{what}: {figure if source else 'not known'}")
        if source:
            _print_source(console, source)
    for rates in device.rates:
        console.print(escape(f"{rates.type}: {rates.prompt / 1e9:.1f} billion multiplications per second of "
                             f"a prompt, {rates.decode / 1e9:.1f} GB/s of decoding"))
        _print_source(console, rates.source)
    console.print(escape(f"code for it alone: -march={build.march}"
                         f"{', in static programs only' if build.android else ''}"))


def _print_source(console: Console, source: str) -> None:
    from rich.markup import escape

    console.print(escape(f"    source: {source}"))


def _all_cores(kinds: Sequence[Cores]) -> str:
    return ", ".join(f"{cores.count} x {cores.kind}" if cores.count else cores.kind for cores in kinds)


def _ram(sizes: Sequence[int]) -> str:
    return f"{', '.join(f'{size / _GIB:.3g}' for size in sizes)} GiB" if sizes else "-"


def _bandwidth(bytes_per_second: int | None) -> str:
    return "-" if bytes_per_second is None else f"{bytes_per_second / 1e9:.1f} GB/s"
