"""Train the demo model: a 5M-parameter Llama that tells short stories.

    python converter/demo/train.py TEXT --out DIR [--steps N] [--device cpu|cuda]

TEXT holds stories with a blank line between two. The last ones are held out to choose
the checkpoint. The set is small (under a million tokens), so three regularisers keep the
model from learning it by heart: BPE dropout (each epoch reads other segmentations,
arXiv 1910.13267), residual dropout and weight decay.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import sentencepiece as spm
import torch
from torch.nn.functional import dropout
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


@dataclass(frozen=True)
class TrainArgs:
    vocab_size: int = 2048
    n_embd: int = 256
    n_ff: int = 768
    n_layer: int = 6
    n_head: int = 8
    n_head_kv: int = 4
    seq_len: int = 288
    batch_size: int = 24
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    residual_dropout: float = 0.1
    bpe_dropout: float = 0.1
    warmup_steps: int = 100
    held_out: int = 100


def train_tokenizer(stories: list[str], args: TrainArgs, out: Path) -> spm.SentencePieceProcessor:
    """Train a byte-fallback BPE SentencePiece model on `stories`; write `out`/tokenizer.model."""
    with tempfile.TemporaryDirectory() as tmp:
        corpus = Path(tmp) / "corpus.txt"
        corpus.write_text("\n".join(s.replace("\n", " ") for s in stories), encoding="utf-8")
        spm.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(tmp) / "tokenizer"),
            vocab_size=args.vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
        (out / "tokenizer.model").write_bytes((Path(tmp) / "tokenizer.model").read_bytes())
    return spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def encode_epoch(
    sp: spm.SentencePieceProcessor, stories: list[str], dropout: float, order: torch.Tensor
) -> torch.Tensor:
    """Tokens of all stories in `order`, each as BOS, story, EOS, in one row: [n_tokens]."""
    ids: list[int] = []
    for i in order.tolist():
        if dropout > 0:
            story = sp.encode(stories[i], enable_sampling=True, alpha=dropout, nbest_size=-1)
        else:
            story = sp.encode(stories[i])
        ids += [sp.bos_id(), *story, sp.eos_id()]
    return torch.tensor(ids, dtype=torch.long)


def add_residual_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Drop elements of what attention and feed-forward add to the residual stream."""

    def drop(module: torch.nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (dropout(output[0], p, module.training), *output[1:])
        return dropout(output, p, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, seq_len: int) -> float:
    """Mean loss (nats per token) of `tokens` ([n_tokens]) over windows of `seq_len`."""
    model.eval()
    rows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    losses = [float(model(input_ids=row, labels=row).loss) * len(row) for row in torch.split(rows, 16)]
    model.train()
    return sum(losses) / len(rows)


def learning_rate(step: int, steps: int, args: TrainArgs) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    t = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    return args.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * t)))


def train(stories: list[str], out: Path, steps: int, device: str, seed: int, args: TrainArgs) -> float:
    """Train on `stories` and write a Hugging Face directory; returns the held-out loss."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    training, validation = stories[: -args.held_out], stories[-args.held_out :]
    sp = train_tokenizer(training, args, out)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.n_embd,
        intermediate_size=args.n_ff,
        num_hidden_layers=args.n_layer,
        num_attention_heads=args.n_head,
        num_key_value_heads=args.n_head_kv,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(device)
    add_residual_dropout(model, args.residual_dropout)
    # Muon needs fewer tokens than AdamW for the matrices inside the layers; the rest is AdamW's.
    inner = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inner, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "weight_decay": args.weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        ),
    ]
    valid_tokens = encode_epoch(sp, validation, 0.0, torch.arange(len(validation))).to(device)
    per_step = args.batch_size * args.seq_len
    buffer = torch.empty(0, dtype=torch.long)
    best = float("inf")
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        if len(buffer) < per_step:
            order = torch.randperm(len(training))
            buffer = torch.cat([buffer, encode_epoch(sp, training, args.bpe_dropout, order)])
        batch, buffer = buffer[:per_step].view(args.batch_size, args.seq_len).to(device), buffer[per_step:]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            valid = held_out_loss(model, valid_tokens, args.seq_len)
            progress.write(f"step {step + 1}: training {float(loss.detach()):.3f}, held out {valid:.3f}")
            if valid < best:
                best = valid
                save(model, out)
    return best


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write weights (BF16), config and tokenizer to `out`, which holds tokenizer.model already."""
    # The head is the embedding: stored once.
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(out, state_dict=state)
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(out)


def save_tokenizer(out: Path) -> None:
    """Write the settings and the fast form of `out`/tokenizer.model."""
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    fast = AutoTokenizer.from_pretrained(out, local_files_only=True)
    (out / "tokenizer.json").write_text(fast.backend_tokenizer.to_str(pretty=False))
    path.write_text(json.dumps(settings, indent=2) + "\n")


@click.command()
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--steps", default=2400, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(text: Path, out: Path, steps: int, device: str, seed: int) -> None:
    """Train the demo model on TEXT and write its Hugging Face directory."""
    stories = [s.strip() for s in text.read_text(encoding="utf-8").split("\n\n") if s.strip()]
    loss = train(stories, out, steps, device, seed, TrainArgs())
    click.echo(f"held-out loss {loss:.3f} nats per token; wrote {out}")


if __name__ == "__main__":
    main()
