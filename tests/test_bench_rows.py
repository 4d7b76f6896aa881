"""Measurements as rows: kept, read again, and compared."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from skipcat_edge import bench_rows
from skipcat_edge.bench_print import change_table, sentences, table_of
from skipcat_edge.benchmark import Result, Spread, sweep
from skipcat_edge.conditions import Conditions
from skipcat_edge.errors import UserError
from skipcat_edge.terminal import as_markdown

SETTING = bench_rows.Setting("0.3.36+skipcat.4", "rpi5", "cortex-a76", "armv8.2_2", ("NEON", "DOTPROD"))
CALM = Conditions((), "performance", 50.0, 52.0, ())


def result(file: str = "a.gguf", threads: int = 4, prompt: float = 80.0, decode: float | None = 8.0,
           conditions: Conditions = CALM, **values: Any) -> Result:
    decoding = None if decode is None else Spread(decode, decode, decode)
    return Result(file, threads, 128, 64, 5, Spread(prompt, prompt - 4, prompt + 4), decoding, conditions,
                  1.0, 10**9, **values)


def test_time_to_first_token_and_bandwidth() -> None:
    found = result(bytes_per_token=1.25e9, buffers={"model CPU_Mapped": 7, "KV CPU": 3})
    assert found.first_token_s == Spread(128 / 80, 128 / 84, 128 / 76)
    assert found.achieved_bandwidth == 10e9
    assert found.allocated_bytes == 10
    encoder = result(decode=None, bytes_per_token=None)
    assert (encoder.achieved_bandwidth, encoder.allocated_bytes) == (None, None)


@pytest.mark.parametrize("format_", [bench_rows.as_json, bench_rows.as_json_lines])
def test_rows_are_read_as_they_were_written(format_: Any, tmp_path: Path) -> None:
    rows = bench_rows.rows_of([result(), result("b.gguf", decode=None)], SETTING)
    (tmp_path / "old").write_text(format_(rows), encoding="utf-8")
    assert bench_rows.read_rows(tmp_path / "old") == rows
    assert rows[0]["device"] == "rpi5" and rows[0]["llama_cpp"] == "0.3.36+skipcat.4"
    assert (rows[0]["prompt_tokens"], rows[0]["gen_tokens"], rows[0]["repetitions"]) == (128, 64, 5)


def test_csv_has_the_same_figures() -> None:
    rows = bench_rows.rows_of([result(buffers={"KV CPU": 3}), result("b, c.gguf", decode=None)], SETTING)
    found = list(csv.DictReader(io.StringIO(bench_rows.as_csv(rows))))
    assert [row["file"] for row in found] == ["a.gguf", "b, c.gguf"]
    assert list(found[0]) == list(rows[0])
    assert float(found[0]["decode_tps"]) == 8.0 and found[1]["decode_tps"] == ""
    assert json.loads(found[0]["buffers"]) == {"KV CPU": 3}


def test_changes_name_what_is_not_as_it_was() -> None:
    then = bench_rows.rows_of([result("old/a.gguf"), result("b.gguf", threads=2)], SETTING)
    other = bench_rows.Setting("0.3.36+skipcat.5", "rpi5", "cortex-a76", "armv8.2_2", ())
    now = bench_rows.rows_of([result("new/a.gguf", prompt=100.0, decode=10.0), result("b.gguf")], other)
    first, second = bench_rows.changes(now, then)
    assert (first.prompt, first.decode) == (1.25, 1.25)
    assert first.differences == ("llama_cpp: 0.3.36+skipcat.4, now 0.3.36+skipcat.5",)
    assert (second.prompt, second.decode, second.differences) == (None, None, ())
    markdown = as_markdown(change_table([first, second]))
    assert "| 1.25 |" in " ".join(markdown.split()) and "not measured then" in markdown


@pytest.mark.parametrize("text", ["", "[1]", '{"file": "a"}', "not json", '[{"file": "a", "prompt_tps": 1}]'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="--output json"):
        bench_rows.read_rows(tmp_path / "old")
    refused = run("bench", "x.gguf", "--against", tmp_path / "missing.json")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1


def test_sentences() -> None:
    hot = Conditions((4, 5, 6), "powersave", 50.0, 85.5, ("throttled",))
    lines = "\n".join(sentences([
        result(threads=2, prompt=60.0, decode=9.0, conditions=hot, bytes_per_token=1e9, read_bandwidth=10e9),
        result(threads=4, conditions=hot, bytes_per_token=1e9, read_bandwidth=12e9),
    ]))
    assert "2, 4 threads on CPUs 4-6; prompt of 128 tokens, 64 tokens decoded" in lines
    assert "a.gguf is fastest with 4 threads in the prompt, and with 2 threads in decoding." in lines
    assert "2 threads read 10.0 GB/s from memory; decoding reaches 90% of that." in lines
    assert "CPU temperature: 50.0 °C before, 85.5 °C after" in lines
    assert "governor is powersave" in lines and "slowed itself down (throttled)" in lines
    calm = "\n".join(sentences([result()]))
    assert "governor" not in calm and "fastest" not in calm and "busy" not in calm


def test_markdown_is_a_table() -> None:
    lines = as_markdown(table_of([result(), result("b|c.gguf", threads=1)])).splitlines()
    assert len(lines) == 4 and all(line.startswith("|") and line.endswith("|") for line in lines)


@pytest.mark.parametrize(("cores", "counts"), [
    (1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (8, [1, 2, 3, 4, 6, 8]), (20, [1, 2, 3, 4, 6, 8, 12, 16, 20]),
])  # fmt: skip
def test_threads_of_a_sweep(cores: int, counts: list[int]) -> None:
    assert sweep(cores) == counts


@pytest.mark.parametrize("threads", ["0", "-1", "1,", "x", "1,0", ""])
def test_threads_that_are_none(threads: str) -> None:
    refused = run("bench", "x.gguf", "--threads", threads)
    assert refused.exit_code == 2 and "neither auto nor numbers" in refused.stderr


@pytest.mark.runtime
def test_several_threads_are_several_rows(demo_dense_gguf: Path) -> None:
    done = run("bench", demo_dense_gguf, "--threads", "2,1", "--prompt-tokens", "8", "--gen-tokens", "2",
               "--repetitions", "2", "--output", "jsonl")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["threads"] for row in rows] == [2, 1]
    assert all(row["read_bandwidth"] > 1e8 for row in rows)
