"""`skipcat-edge push`: share files and their model cards on the hub."""

from __future__ import annotations

from pathlib import Path

import click

from skipcat_edge.commands.examples import example
from skipcat_edge.errors import UserError


@click.command(short_help="Upload GGUF files with their model cards to the Hugging Face hub.",
               epilog=example("push me/llama-skipcat llama.gguf --create --private"))
@click.argument("repository", metavar="REPO")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--create", is_flag=True, help="Make the repository where it does not exist.")
@click.option("--private", is_flag=True, help="A repository that --create makes is seen by its owner only.")
@click.option("--message", help="Of the commit.  [default: the files' names]")
@click.option("--force", is_flag=True,
              help="Replace the README.md of a repository that holds other files.")
def command(repository: str, files: tuple[Path, ...], create: bool, private: bool, message: str | None,
            force: bool) -> None:
    """Upload each FILE and its model card to REPO, owner/name, on the Hugging Face hub, in one commit.

    The card, which `convert` writes beside the file, becomes the repository's README.md. With more than
    one FILE the cards keep their names, and the README.md lists them. What the card says of the source's
    licence is shown first where it does not clearly allow sharing; whether it does is for you to say.
    """
    from skipcat_edge.card_source import UNKNOWN, require_hub

    require_hub()
    from skipcat_edge.push import check_repository, prepare, push

    if private and not create:
        raise UserError("--private is for a new repository; add --create, or change it on the hub.")
    check_repository(repository)
    upload = prepare(repository, files)
    for card, licence in upload.doubtful.items():
        said = "does not know the licence of the source" if licence == UNKNOWN else (
            f"names the licence {licence} of the source")
        click.echo(f"Warning: {card} {said}; make sure that it allows sharing.", err=True)
    names = ", ".join(file.name for file in files)
    url = push(repository, upload, create=create, private=private, force=force,
               message=message or f"Upload {names}")
    click.echo(f"{names}: {url}")
