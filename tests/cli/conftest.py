"""A tiny model that one can talk to."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

VOCAB = 64
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """Returns the folder of a float model with a tokenizer of the words w4 to w63."""
    folder = tmp_path_factory.mktemp("talker")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    words = ["<unk>", "user", "assistant", "system", *(f"w{i}" for i in range(4, VOCAB))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder
