"""moe-ops serve: transformers' server with an optimized model in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available
from typer.testing import CliRunner

import moe_ops
from moe_ops.cli import serve
from moe_ops.cli.app import app

needs_server = pytest.mark.skipif(
    not is_serve_available(),
    reason='the server of transformers is not installed: pip install "transformers[serving]"',
)


@contextlib.contextmanager
def serving(*options):
    """Starts a server; yields the address of its API, and the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_ops", "serve", *map(str, options), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    try:
        while (found := re.search(r"at (http://\S+/v1)\n", seen)) is None:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        yield found[1], process
    finally:
        process.kill()
        process.wait()


def ask(address, path, **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


@needs_server
def test_answers_of_the_server_are_those_of_the_model(talker):
    model = AutoModelForCausalLM.from_pretrained(talker)
    moe_ops.hf.optimize(model, quantization=moe_ops.Int8WeightConfig())
    tokenizer = AutoTokenizer.from_pretrained(talker)
    ids = tokenizer("user w9 w8 assistant", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(out[0, 4:])
    body = {
        "messages": [{"role": "user", "content": "w9 w8"}],
        "max_tokens": 6,
        "temperature": 0,
    }
    with serving(talker, "--quantize", "int8") as (address, process):
        (listed,) = json.loads(ask(address, "/models"))["data"]
        assert listed["id"] == str(talker)
        assert listed.get("status", {"value": "loaded"}) == {"value": "loaded"}
        whole = json.loads(ask(address, "/chat/completions", model=str(talker), **body))
        assert whole["choices"][0]["message"]["content"] == expected
        lines = ask(address, "/chat/completions", stream=True, **body).split("\n\n")
        chunks = [json.loads(s.removeprefix("data: ")) for s in lines if s.startswith("data: {")]
        deltas = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
        assert "".join(deltas).split() == expected.split() and len(deltas) > 6
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert "Traceback" not in rest


@needs_server
def test_weights_that_cannot_be_read(talker, tmp_path):
    shutil.copytree(talker, tmp_path / "model")
    os.truncate(tmp_path / "model" / "model.safetensors", 5000)
    command = [sys.executable, "-m", "moe_ops", "serve", str(tmp_path / "model"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: serve: MODEL must be" in done.stderr


@needs_server
def test_requests_that_run_together(talker):
    model = AutoModelForCausalLM.from_pretrained(talker)
    tokenizer = AutoTokenizer.from_pretrained(talker)
    texts = ["w9 w8", "w7", "w6 w5 w4", "w30"]
    expected = []
    for text in texts:
        ids = tokenizer(f"user {text} assistant", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=20, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))

    with serving(talker, "--cache-tokens", "1000") as (address, _), ThreadPoolExecutor() as pool:

        def answer(text):
            messages = [{"role": "user", "content": text}]
            body = {"messages": messages, "max_tokens": 20, "temperature": 0}
            whole = json.loads(ask(address, "/chat/completions", **body))
            return whole["choices"][0]["message"]["content"]

        assert list(pool.map(answer, texts)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "sglang"], "serve: --engine must be transformers or vllm, got 'sglang'"),
        (["--engine", "vllm"], "moe-ops serve --engine vllm needs vLLM"),
    ],
)
def test_what_it_refuses(talker, monkeypatch, options, message):
    monkeypatch.setattr(serve.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["serve", str(talker), *options])
    assert done.exit_code == 1 and message in done.stderr


def test_without_the_server_of_transformers(talker, monkeypatch):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    done = CliRunner().invoke(app, ["serve", str(talker)])
    assert done.exit_code == 1 and 'pip install "transformers[serving]"' in done.stderr


def test_an_older_transformers(talker, monkeypatch):
    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    monkeypatch.delitem(sys.modules, "moe_ops.cli.server", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.model_manager", None)
    done = CliRunner().invoke(app, ["serve", str(talker)])
    assert done.exit_code == 1
    assert "serve: --engine transformers needs the server of transformers 5.25" in done.stderr


def test_options_of_vllm(talker, monkeypatch):
    monkeypatch.setattr(serve.util, "find_spec", lambda name: object())
    started = []
    monkeypatch.setattr(serve.os, "execv", lambda *words: started.append(words) or sys.exit(0))
    line = ["serve", str(talker), "--engine", "vllm", "--port", "81"]
    done = CliRunner().invoke(app, [*line, "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    words = started[0][1][1:]
    assert words[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(talker)]
    assert words[4:] == ["--host", "localhost", "--port", "81", "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, [*line, "--quantize", "int4"])
    assert "serve: --quantize must come with --engine transformers, got vllm" in done.stderr
