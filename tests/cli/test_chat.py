"""moe-ops chat: a conversation through a pipe, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, T5Config
from typer.testing import CliRunner

import moe_ops
from moe_ops.cli import chat
from moe_ops.cli.app import app

GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


def answers(model, tokenizer, *texts, system=None):
    """Returns what the model says to each of these messages, each read from the beginning."""
    messages = [{"role": "system", "content": system}] if system else []
    found = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        found.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def invoke(folder, *options, text=""):
    return CliRunner().invoke(app, ["chat", str(folder), *GREEDY, *options], input=text)


def test_a_conversation_through_a_pipe(talker):
    done = subprocess.run(
        [sys.executable, "-m", "moe_ops", "chat", str(talker), *GREEDY],
        input="w9 w8\n\nw7\n/clear\nw7\n/exit\nw6\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    parts = loaded(talker)
    expected = [*answers(*parts, "w9 w8", "w7"), *answers(*parts, "w7")]
    assert done.stdout.splitlines() == expected
    assert "Loading weights" in done.stderr and "Warning" not in done.stderr
    assert "deprecated" not in done.stderr
    assert done.stderr.count("[6 tokens in ") == 3 and "All answers: 18 tokens in" in done.stderr


@pytest.mark.parametrize("saved", [False, True])
def test_quantized_models(talker, tmp_path, saved):
    model, tokenizer = loaded(talker)
    config = moe_ops.Int8WeightConfig()
    if saved:
        shutil.copytree(talker, tmp_path, dirs_exist_ok=True)
        moe_ops.quantize(model, config).save_pretrained(tmp_path)
        model = loaded(tmp_path)[0]
    moe_ops.hf.optimize(model, quantization=config)
    folder = tmp_path if saved else talker
    done = invoke(folder, "--quantize", "int8", "--system", "w5", text="w9 w8\nw7\n")
    assert done.exit_code == 0, done.output
    expected = answers(model, tokenizer, "w9 w8", "w7", system="w5")
    assert done.stdout.splitlines() == expected
    if saved:
        done = invoke(folder, "--quantize", "int4")
        assert (
            "--quantize must be left out for a checkpoint that is quantized, got int4 for one "
            "of int8" in done.stderr
        )


def test_only_new_tokens_are_read(talker):
    model, tokenizer = loaded(talker)
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    talk = chat._Chat(model, tokenizer, {"max_new_tokens": 6, "do_sample": False}, [])
    assert [talk.answer("w9 w8"), talk.answer("w7 w6")] == [6, 6]
    # The second prompt also has the last token of the first answer.
    assert read == [4, *[1] * 5, 5, *[1] * 5]


def test_an_interrupted_answer_stays(talker, monkeypatch):
    put = chat._Answer.put

    def put_three(self, value):
        if len(self.tokens) == 3 and interrupts.pop():
            raise KeyboardInterrupt
        put(self, value)

    interrupts = [False, True]
    monkeypatch.setattr(chat._Answer, "put", put_three)
    done = invoke(talker, text="w9 w8\nw7\n")
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    model, tokenizer = loaded(talker)
    assert first.split() == answers(model, tokenizer, "w9 w8")[0].split()[:3]
    ids = tokenizer(f"user w9 w8 assistant {first} user w7 assistant", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert second == tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert "[3 tokens in " in done.stderr


def test_a_temperature_draws(talker):
    drawn = []
    for temperature in ("5", "0"):
        options = ["--temperature", temperature, "--max-new-tokens", "20"]
        done = CliRunner().invoke(app, ["chat", str(talker), *options], input="w9\n")
        assert done.exit_code == 0 and "[20 tokens in " in done.stderr
        drawn.append(done.stdout)
    assert drawn[0] != drawn[1]


def copy_without(talker, folder, *names):
    shutil.copytree(talker, folder, dirs_exist_ok=True)
    for name in names:
        (folder / name).unlink()
    return folder


def test_without_a_tokenizer(talker, tmp_path):
    qwen = copy_without(talker, tmp_path / "qwen", "tokenizer.json", "tokenizer_config.json")
    GptOssConfig().save_pretrained(tmp_path / "other")
    for folder in (qwen, tmp_path / "other"):
        done = invoke(folder)
        assert done.exit_code == 1
        assert done.stderr.startswith("error: chat: MODEL must hold a tokenizer (tokenizer.json)")


def test_without_a_template(talker, tmp_path):
    folder = copy_without(talker, tmp_path, "chat_template.jinja")
    done = invoke(folder)
    assert done.exit_code == 1 and "chat: MODEL must have a chat template" in done.stderr


def test_a_template_that_refuses(talker, tmp_path):
    folder = copy_without(talker, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('No system messages') }}")
    done = invoke(folder, text="w9\n")
    assert done.exit_code == 1
    assert "chat: the chat template must take the messages, got: No system mess" in done.stderr


def test_other_models_and_options(talker, tmp_path):
    T5Config().save_pretrained(tmp_path)
    for folder, options, message in [
        (tmp_path, [], "chat: MODEL must be a causal language model, got t5"),
        (tmp_path / "none", [], "chat: MODEL must be a folder with a config.json or an id of"),
        (talker, ["--quantize", "int5"], "chat: --quantize must be int4, int8 or fp8, got 'int5'"),
        (talker, ["--dtype", "int8"], "chat: --dtype must be auto, bfloat16, float16 or float32"),
    ]:
        done = invoke(folder, *options)
        assert done.exit_code == 1 and message in done.stderr, done.output
        assert "Traceback" not in done.output
