"""QLoRA beside other packages: attention that they quantized, trainers of theirs."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_ops
import moe_ops.hf
from moe_ops.hf import MoeOpsConfig
from moe_ops.hf.checkpoints.quantizer import ExpertsQuantizer

from .models import build

IDS = torch.randint(1, 64, (8, 12), generator=torch.Generator().manual_seed(1))


def saved(folder):
    # bitsandbytes wants rows in multiples of 32 on the CPU.
    build("qwen3_moe", hidden_size=64, moe_intermediate_size=32, head_dim=16).save_pretrained(
        folder
    )


def settings():
    peft = pytest.importorskip("peft")
    importlib.import_module("moe_ops.hf.lora")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    names = {"target_modules": ["q_proj", "v_proj"], "target_parameters": targets}
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **names)


def quantized(folder, **options):
    saved(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return moe_ops.quantize(model, moe_ops.Int4WeightConfig(32))


def config_of(package):
    transformers = importlib.import_module("transformers")
    if package == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_4bit=True)
    return transformers.TorchAoConfig(
        importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    )


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_attention_of_another_package(package, tmp_path):
    pytest.importorskip(package)
    peft = pytest.importorskip("peft")
    model = quantized(tmp_path, quantization_config=config_of(package))
    assert set(moe_ops.hf.status(model).values()) == {"moe_ops (int4 g32)"}
    tuned = peft.get_peft_model(model, settings())
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        losses.append(tuned(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert tuned.eval().generate(input_ids=IDS[:1], **options).shape == (1, 16)
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"by one method, got {package} and moe_ops"):
        model.save_pretrained(tmp_path / "model")


def test_two_methods_are_not_saved(tmp_path):
    model = build("mixtral")
    model.quantization_method = "another"
    model.hf_quantizer = ExpertsQuantizer(
        MoeOpsConfig(moe_ops.Int8WeightConfig()), pre_quantized=True
    )
    moe_ops.quantize(model, moe_ops.Int8WeightConfig())
    with pytest.raises(ValueError, match="by one method, got another and moe_ops; save its adap"):
        copy.deepcopy(model).save_pretrained(tmp_path)


def arguments(folder):
    return {
        "output_dir": str(folder / "runs"),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
    }


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(quantized(tmp_path), settings())
    rows = [{"input_ids": row, "labels": row} for row in IDS[:4]]
    options = transformers.TrainingArguments(**arguments(tmp_path), gradient_checkpointing=True)
    trainer = transformers.Trainer(tuned, options, train_dataset=rows)
    trainer.train()
    first, *_, last = losses_of(trainer)
    assert last < 0.95 * first
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(tmp_path), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, tuned.eval()(IDS).logits)


def test_sft_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "<eos>": 1, "<pad>": 2, **{f"w{i}": 3 + i for i in range(20)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    (tmp_path / "text.jsonl").write_text('{"text": "w3 w1 w4 w1 w5 w9 w2 w6"}\n' * 8)
    text = datasets.Dataset.from_json(str(tmp_path / "text.jsonl"), cache_dir=str(tmp_path))
    trainer = trl.SFTTrainer(
        quantized(tmp_path),
        args=trl.SFTConfig(**arguments(tmp_path), max_length=16, bf16=False),
        train_dataset=text,
        processing_class=tokenizer,
        peft_config=settings(),
    )
    trainer.train()
    first, *_, last = losses_of(trainer)
    assert last < 0.9 * first
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert sum(".experts." in name for name in trained) == 8
