"""Let the demo model tell stories: its own calibration text, free of anybody's licence.

    python converter/demo/tell.py MODEL --out calibration.txt [--stories N]
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_BATCH = 32


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--stories", default=96, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(model: Path, out: Path, stories: int, seed: int) -> None:
    """Sample stories from MODEL at temperature 0.8 and write them with a blank line between two."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    told: list[str] = []
    while len(told) < stories:
        start = torch.full((min(_BATCH, stories - len(told)), 1), tokenizer.bos_token_id)
        ids = llama.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, temperature=0.8, top_k=0,
            max_new_tokens=400, pad_token_id=tokenizer.eos_token_id,
        )
        told += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
        click.echo(f"{len(told)} of {stories} stories", err=True)
    out.write_text("\n\n".join(told) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
