"""The command line: numbers, flags, one-line errors, and its three commands."""

import argparse
import dataclasses
import json
import os
import sys

import pytest

from torch_pd.cli import add_config_flags, build_parser, config_from, main, parse_bool, parse_int
from torch_pd.config import EngineConfig


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("8k", 8192), ("8K", 8192), ("1.5k", 1536), ("2m", 2 << 20), ("1_000", 1000)],
)
def test_numbers(text, value):
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "0.3k", "8kb", "eight"])
def test_bad_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_int(text)


def test_booleans():
    assert parse_bool("TRUE")
    assert not parse_bool("no")
    with pytest.raises(argparse.ArgumentTypeError):
        parse_bool("maybe")


def test_every_config_field_is_a_flag():
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    assert config_from(parser.parse_args([])) == {}
    flags = {action.dest.removeprefix("config_") for action in parser._actions} - {"help"}
    assert flags == {field.name for field in dataclasses.fields(EngineConfig)}
    args = parser.parse_args(
        "--max-model-len 8k --kv-cache-gib 0.5 --enforce-eager --enable-prefix-caching false "
        "--param-ranks 0,1 --dtype float16 --seed 3".split()
    )
    assert config_from(args) == {
        "max_model_len": 8192,
        "kv_cache_gib": 0.5,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "param_ranks": (0, 1),
        "dtype": "float16",
        "seed": 3,
    }


def one_error_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate /nowhere --prompt a", "does not exist"),
        ("generate {tiny}", "no prompt"),
        ("generate {tiny} --prompt a --temperature -1", "temperature"),
        ("generate {tiny} --prompt a --gpu-memory-utilization 0.5 --device cpu", "no meaning"),
        ("generate {tiny} --prompt a --weights pooled", "data_parallel_size=2 or more"),
        ("bench throughput {tiny} --num-prompts 0", "--num-prompts must be >= 1, got 0"),
        ("bench throughput {tiny} --input-len 0", "--input-len must be >= 1, got 0"),
        ("info /nowhere", "does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_2(tiny, capsys, line, message):
    assert main(line.format(tiny=tiny).split()) == 2
    assert message in one_error_line(capsys)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate x --block-size 10", "block-size"),
        ("generate x --max-model-len many", "many"),
        ("generate x --no-such-flag", "no-such-flag"),
        ("nonsense", "nonsense"),
        ("", "required"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(capsys, line, message):
    with pytest.raises(SystemExit) as info:
        main(line.split())
    assert info.value.code == 2
    assert message in one_error_line(capsys)


def test_generate(tiny, capsys):
    common = ["generate", str(tiny), "--max-tokens", "5", "--kv-cache-gib", "0.01"]
    assert main([*common, "--prompt", "The sea"]) == 0
    text = capsys.readouterr().out.rstrip("\n")
    assert main([*common, "--json", "--prompt", "The sea", "--prompt", "A house"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["The sea", "A house"]
    assert rows[0]["texts"] == [text]
    assert main([*common, "--chat", "--prompt", "Hi"]) == 0


def test_prompt_file(tiny, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    line = ["generate", str(tiny), "--max-tokens", "2", "--kv-cache-gib", "0.01", "--json"]
    assert main([*line, "--prompt-file", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch_pd", "transformers", "CPU", "CUDA ops", "GPU"):
        assert word in out


def test_info_of_a_model_lists_every_layer(tiny, capsys):
    assert main(["info", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert "weights: read straight to their place" in out
    assert "model.layers.0" in out
    assert "model.layers.1" in out
    assert "fused" in out


def test_bench_throughput(tiny, capsys):
    line = f"bench throughput {tiny} --num-prompts 3 --input-len 8 --output-len 4 --json"
    assert main([*line.split(), "--kv-cache-gib", "0.01"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output_tokens"] == 12
    assert result["output_tokens_per_second"] > 0


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "--help"])
    assert "default: 8192" in capsys.readouterr().out


def test_errors_of_the_system_are_told_without_an_output(monkeypatch, capsys):
    def fail(args):
        raise PermissionError("not yours")

    monkeypatch.setattr("torch_pd.cli._info", fail)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info"]) == 1
    assert "not yours" in one_error_line(capsys)


def test_output_that_cannot_be_written(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 1
    assert "No space left" in one_error_line(capsys)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["info"]) == 1
    assert capsys.readouterr().err == ""
