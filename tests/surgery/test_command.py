"""`moe-ops prune` in a process of its own, its result in plain transformers in another."""

from __future__ import annotations

import json

import pytest
import torch
from tests.helpers.fresh_python import run_python
from tests.helpers.moe import build_moe

pytest.importorskip("transformers")
pytest.importorskip("typer")

_LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([tokenizer(open(sys.argv[2]).read())["input_ids"][-100:]])
with torch.no_grad():
    losses = [float(model(p, labels=p).loss) * (p.shape[1] - 1) for p in ids.split(40, dim=1)]
assert "moe_ops" not in sys.modules
print(json.dumps([sum(losses) / 97, model.config.num_local_experts]))
"""


@pytest.fixture
def checkpoint(tmp_path):
    from tests.hf import models
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder, text = tmp_path / "whole", tmp_path / "text.txt"
    models.build("mixtral").save_pretrained(folder)
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, models.VOCAB)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    ids = torch.randint(1, models.VOCAB, (300,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return folder, text


def test_pruned_by_the_command_and_loaded_without_it(checkpoint, tmp_path):
    folder, text = checkpoint
    out = tmp_path / "pruned"
    line = ["-m", "moe_ops.cli", "prune", str(folder), "--keep", "4", "--by", "reap"]
    line += ["--text", str(text), "--out", str(out), "--tokens", "100", "--context", "40", "--json"]
    done = run_python(*line, transformers=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "moe_ops_pruning.json").read_text())
    assert [len(ids) for ids in report["kept"].values()] == [4, 4]
    assert report["model_bytes_after"] < report["model_bytes_before"]
    loaded = run_python("-c", _LOAD, str(out), str(text), transformers=True)
    assert loaded.returncode == 0, loaded.stderr
    loss, num_experts = json.loads(loaded.stdout.strip().splitlines()[-1])
    assert num_experts == 4
    # The end of the text was not looked at before; both judge by it.
    assert torch.tensor(loss).exp().item() == pytest.approx(report["perplexity_after"], rel=1e-3)


@pytest.mark.parametrize("by", ["uncurl", "hc_smoe"])
def test_merging_and_tuning(checkpoint, tmp_path, by):
    pytest.importorskip("scipy")
    from rich.console import Console

    from moe_ops.cli.prune import PruneOptions, run

    folder, text = checkpoint
    options = PruneOptions(folder, tmp_path / by, text, 0.5, by=by, tokens=100, context=20, tune=3)
    report = run(options, Console(quiet=True))
    assert [len(groups) for groups in report["kept"].values()] == [3, 3]
    assert report["tuning_steps"] == 3
    assert report["perplexity_tuned"] != report["perplexity_after"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep", "all"], "--keep must be a number, got all"),
        (["--keep", "9"], "prune: --keep must be in [2, 6]"),
        (["--keep", "1.5"], "prune: --keep must be a part in (0, 1]"),
        (["--by", "size"], "--by must be one of frequency"),
        (["--groups", "some"], "groups must be 'drop' or 'keep'"),
        (["--text", "nowhere.txt"], "--text must be a file, got nowhere.txt"),
    ],
)
def test_says_what_is_wrong(checkpoint, tmp_path, extra, message):
    from typer.testing import CliRunner

    from moe_ops.cli.app import app

    folder, text = checkpoint
    line = ["prune", str(folder), "--keep", "4", "--text", str(text), "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(app, [*line, *extra])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert ("Looking at" in result.output) == ("--groups" in extra)  # Others are found before.
    assert not (tmp_path / "x").exists()


def test_inspect(checkpoint, tmp_path):
    """The numbers of the page are those of transformers' own router."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moe_ops.cli.inspect import run

    folder, text = checkpoint
    page = tmp_path / "page.html"
    found = run(folder, text, page, folder, 100, 40, Console(quiet=True))
    content = page.read_text()
    start = content.index('type="application/json">') + len('type="application/json">')
    data = json.loads(content[start : content.index("</script>", start)])
    first, second = data["models"]
    assert first["layers"] == second["layers"] and first["name"] != second["name"]
    assert list(found) == [first["name"], second["name"]]

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"][:100]
    assert data["tokens"] == [f"w{i}" for i in ids]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        pieces = [
            model(p[None], output_router_logits=True).router_logits
            for p in torch.tensor(ids).split(40)
        ]
    for index, layer in enumerate(first["layers"]):
        logits = torch.cat([piece[index] for piece in pieces])
        p = logits.double().softmax(-1)
        chosen = p.topk(layer["top_k"]).indices
        assert [sorted(row) for row in layer["ids"]] == chosen.sort().values.tolist()
        count = chosen.flatten().bincount(minlength=layer["num_experts"])
        assert layer["load"] == count.tolist()
        assert [row[e] for e, row in enumerate(layer["together"])] == layer["load"]
        assert layer["tokens"] == 100
        assert layer["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)


def test_inspect_refuses_models_that_do_not_fit(tmp_path):
    from moe_ops.surgery.page import routing_data, routing_page

    pages = {n: routing_data(build_moe(8, 8, n, 2), [torch.randn(5, 8)]) for n in (4, 6)}
    with pytest.raises(ValueError, match="got 4 experts in a and 6 in b, in layer"):
        routing_page({"a": pages[4], "b": pages[6]}, [], tmp_path / "page.html")
    with pytest.raises(ValueError, match="must be one or two, got 0"):
        routing_page({}, [], tmp_path / "page.html")
    routing_page({"a": pages[4]}, ["</script>"] * 5, tmp_path / "page.html")
    assert "\\u003c/script>" in (tmp_path / "page.html").read_text()
