"""Model cards: what convert and eval write, read back by YAML's and GGUF's own readers."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run, run_json
from conversion import DEMO, convert_model
from gguf import GGUFReader, GGUFWriter
from huggingface_hub import ModelCard

from skipcat_edge.card import Figure, add_figures, card_path, new_card
from skipcat_edge.card_source import UNKNOWN, Source, source_of_directory, source_of_gguf

F16 = "--quant", "F16"
CALIBRATION = DEMO / "calibration.txt"
MIT = "MIT License\n\nCopyright (c) 2026 Somebody\n\nPermission is hereby granted, free of charge, to any\n" \
      "person obtaining a copy of this software\n"


def front_matter(card: str) -> dict[str, Any]:
    """The card's metadata, which must be its first lines."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    found = yaml.safe_load(match[1])
    assert isinstance(found, dict)
    return found


def table(card: str, heading: str) -> dict[str, str]:
    """First cell -> second cell of the table below `heading`."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in section.splitlines()
            if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if row[0]}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, demo_dense_gguf: Path) -> Path:
    """The demo model, skipcat at ratio 0.8, by the command."""
    out = tmp_path_factory.mktemp("card") / "small.v1.gguf"
    result = run("convert", DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--method", "skipcat",
                 "--ratio", "0.8", "--quant", "F16", "--calibration", CALIBRATION)
    assert result.exit_code == 0, result.output
    assert "small.v1.md" in result.stdout
    return out


def test_convert_writes_a_card_beside_the_file(converted: Path) -> None:
    assert sorted(path.name for path in converted.parent.iterdir()) == ["small.v1.gguf", "small.v1.md"]
    card = (converted.parent / "small.v1.md").read_text("utf-8")
    assert front_matter(card) == {"library_name": "gguf", "license": "mit", "pipeline_tag": "text-generation",
                                  "tags": ["gguf", "skipcat-edge", "low-rank"]}
    facts, fields = table(card, "How it was made"), GGUFReader(converted).fields
    assert facts["source"] == "`model`"
    assert facts["method"] == "`skipcat`" == f"`{fields['skipcat.method'].contents()}`"
    kept, asked = re.findall(r"[\d.]+", facts["parameters kept"])
    assert float(asked) == pytest.approx(fields["skipcat.ratio"].contents())
    assert 0.7 < float(kept) < 0.8
    sha256 = hashlib.sha256(CALIBRATION.read_bytes()).hexdigest()
    tokens = fields["skipcat.calibration.tokens"].contents()
    assert facts["calibration"] == f"{tokens:,} tokens of a text with SHA-256 `{sha256}`"
    assert facts["types of the linear layers"] == "F16"
    assert "rounding" not in facts
    assert f"{converted.stat().st_size:,} bytes" in facts["size"]
    ranks = [int(tensor.shape[1]) for tensor in GGUFReader(converted).tensors if "lr_a" in tensor.name]
    assert facts["ranks"].startswith(f"{min(ranks)} to {max(ranks)}, median ")
    assert f"of {len(ranks)} projections" in facts["ranks"]
    assert "stock llama.cpp does not know the architecture `skipcat-llama`" in card
    assert "skipcat-edge chat small.v1.gguf" in card
    assert "Nothing yet." in card
    assert "The source's: mit, says its README.md." in card


@pytest.mark.slow
def test_a_dense_files_card_knows_its_calibration_and_that_stock_llama_cpp_runs_it(
    tmp_path: Path, demo_dense_gguf: Path,
) -> None:
    out = tmp_path / "dense.gguf"
    result = run("convert", DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--ratio", 1,
                 "--quant", "Q4_0", "--calibration", CALIBRATION, "--calib-tokens", 2000,
                 "--no-compensation")
    assert result.exit_code == 0, result.output
    card = (tmp_path / "dense.md").read_text("utf-8")
    facts = table(card, "How it was made")
    assert (facts["parameters kept"], facts["types of the linear layers"]) == ("all", "Q4_0")
    assert facts["calibration"].endswith(f"`{hashlib.sha256(CALIBRATION.read_bytes()).hexdigest()}`")
    assert facts["rounding"].startswith("each number's error is passed on")
    # the file alone knows as well, but for the rounding
    again = table(new_card(out, source_of_gguf(out)), "How it was made")
    assert (again["calibration"], again["rounding"]) == (facts["calibration"], UNKNOWN)
    assert "low-rank" not in front_matter(card)["tags"]
    assert "Stock llama.cpp runs it" in card
    assert "llama-cli -m dense.gguf" in card


def test_a_model_of_the_hub_is_named_as_what_this_one_was_made_from(
    tmp_path: Path, demo_dense_gguf: Path,
) -> None:
    card = tmp_path / "x.md"
    convert_model(DEMO / "model", tmp_path / "x.gguf", base=demo_dense_gguf, ratio=1.0, card=card,
                  source_name="somebody/stories")
    data = front_matter(card.read_text("utf-8"))
    assert data["base_model"] == "somebody/stories"
    assert data["base_model_relation"] == "quantized"
    assert "https://huggingface.co/somebody/stories" in card.read_text("utf-8")
    assert table(card.read_text("utf-8"), "How it was made")["calibration"] == "none"
    # a directory's name is none of the hub's
    assert "base_model" not in front_matter(new_card(demo_dense_gguf, Source("stories")))


@pytest.mark.parametrize(("files", "expected"), [
    ({"README.md": "---\nlicense: llama3.2\nlanguage: [en, de]\npipeline_tag: text-generation\n---\n"},
     {"license": "llama3.2", "language": ["en", "de"], "pipeline_tag": "text-generation"}),
    ({"README.md": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: en\n---\n"},
     {"license": "other", "license_name": "mine", "language": "en"}),
    ({"README.md": "---\nlicense: other\nlicense_name: Mine 1.0 (b)\nlicense_link: https://x.org/l\n---\n"},
     {"license": "other", "license_name": "mine-1.0-b", "license_link": "https://x.org/l"}),
    ({"README.md": "---\nlicense: Apache 2.0\nlanguage: 'no'\n---\n"},
     {"license": "apache-2.0", "language": "no"}),
    ({"README.md": "# No metadata\n", "LICENSE": MIT}, {"license": "mit"}),
    ({"LICENSE.txt": "   Apache License\n   Version 2.0, January 2004\n"}, {"license": "apache-2.0"}),
    ({"COPYING": "\n# The Licence of Somebody\n\nUse it on Sundays."},
     {"license": "other", "license_name": "the-licence-of-somebody"}),
    ({"README.md": "---\nlicense: [\n---\nbroken"}, {"license": "unknown"}),
    ({"README.md": "---\n- a\n- list\n---\n", "licensing.py": MIT}, {"license": "unknown"}),
    ({}, {"license": "unknown"}),
])
def test_the_licence_is_the_sources_and_never_invented(
    tmp_path: Path, demo_dense_gguf: Path, files: dict[str, str], expected: dict[str, Any],
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
    card = new_card(demo_dense_gguf, source_of_directory(tmp_path, None))
    data = front_matter(card)
    assert data == {"library_name": "gguf", "tags": ["gguf", "skipcat-edge"],
                    "pipeline_tag": "text-generation", **expected}
    assert ModelCard(card).data.to_dict() == data
    assert ("licence of the source is unknown" in card) == (expected["license"] == "unknown")


def test_a_file_alone_tells_what_its_metadata_says(converted: Path, demo_dense_gguf: Path) -> None:
    source = source_of_gguf(converted)
    assert (source.name, source.on_hub, source.licence) == ("model", False, "mit")
    facts = table(new_card(demo_dense_gguf, source_of_gguf(demo_dense_gguf)), "How it was made")
    assert (facts["calibration"], facts["parameters kept"]) == (UNKNOWN, "all")
    assert "made with" not in facts


def test_an_encoders_card_says_how_to_embed(tmp_path: Path) -> None:
    file = tmp_path / "encoder.gguf"
    writer = GGUFWriter(file, "bert")
    writer.add_causal_attention(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    card = new_card(file, source_of_gguf(file))
    assert front_matter(card)["pipeline_tag"] == "feature-extraction"
    assert "embedding=True" in card
    assert "skipcat-edge chat" not in card
    assert "mean cosine" in card
    assert front_matter(card)["license"] == "unknown"


def test_odd_names_stay_one_cell_and_one_word(tmp_path: Path, demo_dense_gguf: Path) -> None:
    name = "it's a | \"model\" #1.gguf"
    source = Source("a|b: [c]", licence="other", licence_name="x: y")
    card = new_card(demo_dense_gguf, source, name=name)
    assert table(card, "How it was made")["source"] == "`a\\|b: [c]`"
    assert ModelCard(card).data.license_name == "x-y"
    stock, chat, *_ = card.split("```console\n")[1].splitlines()
    assert shlex.split(stock) == ["llama-cli", "-m", name]
    assert shlex.split(chat) == ["skipcat-edge", "chat", name]


def test_a_licence_beside_the_source_is_linked_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: ./LICENSE\n---\n", "utf-8")
    assert source_of_directory(tmp_path, "owner/name").licence_link == (
        "https://huggingface.co/owner/name/blob/main/LICENSE")
    assert source_of_directory(tmp_path, None).licence_link is None  # no one else has it


def test_a_local_sources_folders_are_nowhere(tmp_path: Path, demo_dense_gguf: Path) -> None:
    private = tmp_path / "alice" / "secret-project"
    shutil.copytree(DEMO / "model", private / "small")
    out = private / "out.gguf"
    convert_model(private / "small", out, ratio=1.0, card=private / "out.md")
    for file in (out, private / "out.md"):
        content = file.read_bytes()
        assert b"alice" not in content and b"secret-project" not in content
    assert "`small`" in (private / "out.md").read_text("utf-8")


def test_a_card_is_replaced_by_force_only(tmp_path: Path, demo_dense_gguf: Path) -> None:
    out, card = tmp_path / "x.gguf", tmp_path / "x.md"
    card.write_text("mine", "utf-8")
    command = ["convert", DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--ratio", 1, *F16]
    result = run(*command)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "x.md exists already" in result.stderr
    assert not out.exists()
    assert card.read_text("utf-8") == "mine"
    assert run(*command, "--force").exit_code == 0
    assert front_matter(card.read_text("utf-8"))["license"] == "mit"


@pytest.mark.parametrize("where", ["writing the card", "placing the file"])
def test_file_and_card_appear_together_or_not_at_all(tmp_path: Path, demo_dense_gguf: Path, where: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.gguf"
    replace = Path.replace

    def full(*arguments: Any, **_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "somewhere"))

    if where == "writing the card":
        monkeypatch.setattr("skipcat_converter.pipeline.new_card", full)
    else:
        monkeypatch.setattr(Path, "replace", lambda path, to: (full if to == out else replace)(path, to))
    result = run("convert", DEMO / "model", "-o", out, "--base", demo_dense_gguf, "--ratio", 1, *F16)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
    assert "No space left" in result.stderr
    # the job, from which the same command goes on
    assert [path.name for path in tmp_path.iterdir()] == [".x.gguf.job"]


@pytest.mark.runtime
def test_eval_puts_what_it_measured_into_the_card(converted: Path, demo_dense_gguf: Path,
                                                  tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    shutil.copy(converted, file)
    shutil.copy(card_path(converted), tmp_path / "x.md")
    edited = (tmp_path / "x.md").read_text("utf-8")
    edited = edited.replace("## Licence", "## My words\n\nKept | as is.\n\n## Licence")
    (tmp_path / "x.md").write_text(edited, "utf-8")
    story = tmp_path / "story.txt"
    story.write_text(CALIBRATION.read_text("utf-8")[:3000], "utf-8")

    def measure(text: Path, *more: object) -> Any:
        return run_json("eval", file, "--text", text, "--window", 64, "--threads", 1, "--card", *more)

    first = measure(story, "--reference", demo_dense_gguf)
    card = (tmp_path / "x.md").read_text("utf-8")
    rows = table(card, "Measured")
    assert rows["perplexity"] == f"{first['ppl']:.4f} ± {first['ppl_se']:.4f}"
    assert rows["KL divergence from `dense.gguf`, nats per token"].startswith(f"{first['kl']:.6f} ± ")
    assert rows["top-1 agreement with `dense.gguf`"].startswith(f"{100 * first['top1']:.2f} ± ")
    assert hashlib.sha256(story.read_bytes()).hexdigest() in card
    assert f"{first['tokens']:,} tokens, windows of 64" in card
    assert "Nothing yet." not in card
    assert "calibration text" not in card

    measure(CALIBRATION, "--max-tokens", 640)  # another text: a row more; the same again: none more
    measure(CALIBRATION, "--max-tokens", 640)
    card = (tmp_path / "x.md").read_text("utf-8")
    assert len(re.findall(r"^\| perplexity ", card, re.MULTILINE)) == 2
    assert "`calibration.txt`, the calibration text" in card
    section = re.compile(r"<!-- skipcat-edge eval: figures -->.*<!-- skipcat-edge eval: end -->", re.DOTALL)
    assert section.sub("", card) == section.sub("", edited)


@pytest.mark.runtime
def test_eval_makes_a_card_where_there_is_none(demo_dense_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    shutil.copy(demo_dense_gguf, file)
    result = run("eval", file, "--text", CALIBRATION, "--max-tokens", 300, "--threads", 1, "--card", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 255
    card = (tmp_path / "mine.md").read_text("utf-8")
    assert front_matter(card)["license"] == "mit"
    assert "perplexity" in table(card, "Measured")


def test_figures_survive_what_people_do_to_cards(demo_dense_gguf: Path) -> None:
    one = Figure("a | b", "1.5", "`x|y.txt`, 3 tokens", "2026-01-02")
    card = add_figures("# Only this\n", demo_dense_gguf, [one])
    assert card.startswith("# Only this\n\n## Measured\n")
    assert table(card, "Measured")["a \\| b"] == "1.5"
    newer = add_figures(card, demo_dense_gguf, [Figure("a | b", "2.5", "`x|y.txt`, 3 tokens", "2026-01-03")])
    assert newer == card.replace("1.5", "2.5").replace("2026-01-02", "2026-01-03")
    assert add_figures(newer, demo_dense_gguf, []) == newer


def test_cosines_and_tasks_are_figures_as_well(demo_dense_gguf: Path, tmp_path: Path) -> None:
    from skipcat_edge.card_figures import similarity_figures, task_figures
    from skipcat_edge.embedding_eval import EmbeddingSimilarity
    from skipcat_edge.task_eval import TaskResult

    text = tmp_path / "lines.txt"
    text.write_text("one\ntwo\n")
    cosines = similarity_figures(EmbeddingSimilarity(0.98765, 0.5, 2, 0.00123),
                                 demo_dense_gguf, text, Path("/far/big.gguf"))
    pytest.importorskip("lm_eval")
    results = [TaskResult("arc_easy", "acc", "none", 0.25, 0.125, 1200, 0.5, 0.25),
               TaskResult("gsm8k", "exact_match", "strict", 0.75, None, 3)]
    tasks = task_figures(results, Path("/far/big.gguf"), 1024)
    rows = table(add_figures("", demo_dense_gguf, [*cosines, *tasks]), "Measured")
    assert rows == {
        "figure": "value",
        "mean cosine to `big.gguf`": "0.9877 ± 0.0012", "lowest cosine to `big.gguf`": "0.5000",
        "arc_easy, acc": "0.2500 ± 0.1250 (`big.gguf`: 0.5000 ± 0.2500)",
        "gsm8k, exact_match (strict)": "0.7500",
    }


def test_an_unwritable_card_is_refused_before_measuring(demo_dense_gguf: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.gguf"
    shutil.copy(demo_dense_gguf, file)
    (tmp_path / "x.md").mkdir()
    result = run("eval", file, "--text", tmp_path / "not there", "--card")
    assert result.exit_code == 2
    assert "x.md is a directory" in result.stderr
    monkeypatch.setattr("skipcat_edge.extra.find_spec", lambda _: None)
    result = run("eval", file, "--text", tmp_path / "not there", "--card")
    assert "pip install 'skipcat-edge[push]'" in result.stderr
