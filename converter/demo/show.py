"""What `make demo` shows: the files' sizes, and one prompt answered by each through llama_cpp.

    python converter/demo/show.py DENSE.gguf COMPRESSED.gguf
"""

from __future__ import annotations

from pathlib import Path

import click
from llama_cpp import Llama

from skipcat_edge.inspection import inspect
from skipcat_edge.terminal import decimal_bytes, new_table, stdout_console

PROMPT = "Once upon a time, there was a little fox who"


def size_row(path: Path, dense_size: int) -> tuple[str, ...]:
    """File, kept parameters of the linear layers, size, size beside the dense file's."""
    found = inspect(path)
    size = found.file_bytes
    return path.name, f"{found.totals.ratio:.2f}", decimal_bytes(size), f"{size / dense_size:.2f}"


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Show sizes and one answer of each of FILES; the first is the dense one."""
    table = new_table("file", "parameters kept", "size", "of dense")
    for path in files:
        table.add_row(*size_row(path, files[0].stat().st_size))
    stdout_console().print(table)
    for path in files:
        click.secho(f"\n{path.name} continues: {PROMPT}", bold=True)
        llama = Llama(str(path), n_ctx=512, verbose=False)
        messages = [{"role": "user", "content": PROMPT}]
        for chunk in llama.create_chat_completion(messages, max_tokens=80, temperature=0.0, stream=True):
            click.echo(chunk["choices"][0]["delta"].get("content", ""), nl=False)
        click.echo()
        llama.close()


if __name__ == "__main__":
    main()
