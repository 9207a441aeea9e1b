"""Experts of domains against the dense encoder and against one network a sentence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from bench.studies.sentence.tokens import ByteTokens
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

from moe_ops import zoo
from moe_ops.zoo.sentence import (
    DomainExperts,
    SentenceConfig,
    SentenceExperts,
    layers_of,
    ranking_loss,
)

DOMAINS = ("a", "b", "c")
TEXTS = ["one", "a longer sentence", "x", "two words"]


def bert(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "domains": DOMAINS}
    return zoo.create_model("sentence", **{**sizes, **changes})


def modern_bert(moe_layers):
    torch.manual_seed(0)
    encoder = ModernBertModel(
        ModernBertConfig(
            vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=1,
        )
    )  # fmt: skip
    config = SentenceConfig(DOMAINS, moe_layers=moe_layers)
    torch.manual_seed(1)
    return SentenceExperts(config, encoder).eval()


@pytest.mark.parametrize("make", [lambda layers: bert(moe_layers=layers).eval(), modern_bert])
def test_copies_equal_the_dense_encoder(make):
    dense = make(())
    ids, mask = ByteTokens()(TEXTS)
    domains = torch.tensor([0, 1, 2, 1])
    wanted = dense(ids, mask, domains)
    for layers in (None, (1,)):
        model = dense.with_experts(layers).eval()
        torch.testing.assert_close(model(ids, mask, domains), wanted, atol=1e-5, rtol=1e-5)
        banks = [m for m in model.modules() if isinstance(m, DomainExperts)]
        assert len(banks) == (2 if layers is None else 1)
    # The domain token starts as CLS, so that domains do not differ yet.
    torch.testing.assert_close(wanted, dense(ids, mask, torch.zeros(4).long()))
    with pytest.raises(ValueError, match="must be dense, got one with experts"):
        model.with_experts()


@pytest.mark.parametrize("act", ["relu", "silu", "gelu_new"])
def test_experts_have_the_encoders_activation(act):
    def dense(act):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=64, hidden_act=act,
        )  # fmt: skip
        encoder = BertModel(config, add_pooling_layer=False)
        return SentenceExperts(SentenceConfig(DOMAINS, moe_layers=(), head="mean"), encoder).eval()

    ids, mask = ByteTokens()(TEXTS)
    domains = torch.tensor([0, 1, 2, 1])
    model = dense(act)
    wanted = model(ids, mask, domains)
    found = model.with_experts()(ids, mask, domains)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="must be one that Experts has, got MishActivation"):
        dense("mish").with_experts()


def test_a_sentence_goes_to_its_expert_whole():
    model = bert().double().eval()
    experts = layers_of(model.encoder)[0].output.mlp.experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    x, domains = torch.randn(4, 5, 16).double(), torch.tensor([2, 0, 2, 1])
    model.given.domains = domains
    y = layers_of(model.encoder)[0].output.mlp(x)
    for sentence, domain, found in zip(x, domains.tolist(), y, strict=True):
        h = F.gelu(sentence @ experts.w_gate_up[domain].T + experts.b_gate_up[domain])
        torch.testing.assert_close(found, h @ experts.w_down[domain].T + experts.b_down[domain])


def test_gradients_reach_the_experts_of_the_batch_alone():
    model = bert()
    ids, mask = ByteTokens()(TEXTS[:2])
    model(ids, mask, torch.tensor([0, 2])).sum().backward()
    for layer in layers_of(model.encoder):
        grad = layer.output.mlp.experts.w_down.grad
        assert grad[0].any() and grad[2].any() and not grad[1].any()
    tokens = model.encoder.get_input_embeddings().weight.grad[model.first_domain_id :]
    assert tokens[0].any() and tokens[2].any() and not tokens[1].any()
    assert not model.encoder.get_input_embeddings().weight.grad[1].any()  # CLS is replaced.


@pytest.mark.parametrize("head", ["mlp", "mean"])
def test_padding_changes_nothing(head):
    model = bert(head=head, embedding_size=6).eval()
    tokenize = ByteTokens()
    domains = torch.tensor([0, 1, 2, 1])
    together = model(*tokenize(TEXTS), domains)
    assert together.shape == (4, 6 if head == "mlp" else 16)
    for i, text in enumerate(TEXTS):
        alone = model(*tokenize([text]), domains[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bert(domains=("a", "a")), "different names"),
        (lambda: bert(moe_layers=(2,)), r"moe_layers must be in \[0, 2\), got 2"),
        (lambda: bert(head="max"), "head must be one of mlp, mean"),
        (lambda: SentenceExperts(SentenceConfig(DOMAINS), _Other()), "got _Other"),
        (lambda: bert().domain_ids(["d"]), "domain must be one of a, b, c, got 'd'"),
        (lambda: _embed(torch.tensor([0])), r"domains must be \[2\]"),
        (lambda: _embed(torch.tensor([0, 3])), r"domains must be in \[0, 3\)"),
        (lambda: bert().encoder(torch.ones(1, 3).long()), "call the SentenceExperts"),
    ],
)
def test_bad_calls(call, words):
    with pytest.raises(ValueError, match=words):
        call()


class _Other(torch.nn.Module):
    class config:
        vocab_size, hidden_size = 9, 4

    def resize_token_embeddings(self, count, mean_resizing):
        self.embeddings = torch.nn.Embedding(count, 4)

    def get_input_embeddings(self):
        return self.embeddings


def _embed(domains):
    return bert()(*ByteTokens()(["x", "y"]), domains)


def test_ranking_loss_is_written_out():
    left, right = torch.randn(2, 3, 4).double()
    for similarity in ("cosine", "dot"):
        total = 0.0
        for i in range(3):
            for a, b in ((left, right), (right, left)):
                scores = [
                    20 * F.cosine_similarity(a[i], b[j], dim=0) if similarity == "cosine"
                    else a[i] @ b[j] for j in range(3)
                ]  # fmt: skip
                total = total - torch.stack(scores).log_softmax(0)[i] / 6
        torch.testing.assert_close(ranking_loss(left, right, similarity=similarity), total)


def test_meta_tensors_are_named():
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="SentenceExperts: input_ids and domains must have values"):
        bert()(tokens, torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
