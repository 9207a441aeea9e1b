"""Trains a small mixture of experts with TRL's GRPOTrainer, with or without routing replay, on
rollouts of an engine: transformers with 8-bit or 4-bit experts, or vLLM on the CPU in bfloat16.

    python examples/grpo.py
    python examples/grpo.py --no-replay --bits 4
    python examples/grpo.py --engine vllm

The task: a prompt repeats a letter, and the reward is the share of this letter in the completion.
The log shows the reward, the divergence KL(engine || trainer) per sampled token, and with replay
the share of experts that the trainer alone would have replaced. Needs TRL 1.16; `--engine vllm`
needs vLLM 0.32 and the plugin `moe-ops-vllm`.
"""

from __future__ import annotations

import argparse
import os
import string
import tempfile
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

import moe_ops
import moe_ops.hf
from moe_ops.hf.routing.agreement import RoutingAgreement

QUANTIZED = {8: moe_ops.Int8WeightConfig(), 4: moe_ops.Int4WeightConfig(group_size=32)}
LETTERS = string.ascii_lowercase[:8]
PROMPT, COMPLETION = 4, 8


class Rollout(NamedTuple):
    """Sampled completions.

    completions, log_probs: a list of tokens and one of their log-probabilities for each prompt.
    routed_experts: [prompts, positions, layers, K], -1 where no expert is known.
    """

    completions: list[list[int]]
    log_probs: list[list[float]]
    routed_experts: torch.Tensor


class TransformersEngine:
    """Samples by `generate` of a copy of the model with quantized experts."""

    def __init__(self, bits: int) -> None:
        self.weights = QUANTIZED[bits]

    @torch.no_grad()
    def sample(self, model: PreTrainedModel, prompts: list[list[int]], end: int) -> Rollout:
        # Not a deep copy: TRL's forward of a copy calls the original.
        engine = type(model)(model.config)
        engine.load_state_dict(model.state_dict())
        engine = moe_ops.quantize(engine, self.weights).eval()
        ids = torch.tensor(prompts)  # The prompts of this task have one length.
        with moe_ops.hf.record(engine) as record:
            found = engine.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=COMPLETION,
                do_sample=True,
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = found.sequences[:, ids.shape[1] :]
        scores = torch.stack(found.scores, 1).float().log_softmax(-1)
        sampled = scores.gather(2, tokens[..., None])[..., 0]
        ends = tokens == end
        kept = ends.cumsum(1) - ends.long() == 0  # The first end is a sampled token too.
        completions = [t[k].tolist() for t, k in zip(tokens, kept, strict=True)]
        log_probs = [s[k].tolist() for s, k in zip(sampled, kept, strict=True)]
        return Rollout(completions, log_probs, torch.from_numpy(record.routed_experts()))


class VllmEngine:
    """Samples by vLLM on the CPU, which loads the model's weights before each rollout."""

    def __init__(self) -> None:
        # Its worker shares this process and its threads.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        try:
            import moe_ops_vllm  # noqa: F401
            import vllm
        except ImportError as error:
            raise SystemExit(
                f"grpo.py: --engine vllm must find vLLM and moe-ops-vllm, got: {error}; "
                "docs/serving.md says how to install them."
            ) from error
        self.vllm = vllm
        self.llm: Any = None

    def sample(self, model: PreTrainedModel, prompts: list[list[int]], end: int) -> Rollout:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if self.llm is None:
                self.llm = self.vllm.LLM(
                    folder,
                    skip_tokenizer_init=True,
                    dtype="bfloat16",
                    max_model_len=PROMPT + COMPLETION,
                    enforce_eager=True,
                    worker_cls="moe_ops_vllm.routed_experts.Worker",
                    scheduler_cls="moe_ops_vllm.routed_experts.Scheduler",
                )
            else:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                self.llm.reset_prefix_cache()
        sampling = self.vllm.SamplingParams(
            max_tokens=COMPLETION, logprobs=0, detokenize=False, stop_token_ids=[end]
        )
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        found = [
            request.outputs[0] for request in self.llm.generate(requests, sampling, use_tqdm=False)
        ]
        return Rollout(
            [list(out.token_ids) for out in found],
            [
                [
                    step[token].logprob
                    for token, step in zip(out.token_ids, out.logprobs, strict=True)
                ]
                for out in found
            ],
            pad_sequence(
                [torch.from_numpy(out.routed_experts.astype("int32")) for out in found],
                batch_first=True,
                padding_value=-1,
            ),
        )


class ReplayTrainer(GRPOTrainer):
    """A GRPOTrainer that samples by an engine.

    use_replay: the trainer takes the engine's experts.
    engine: a TransformersEngine or a VllmEngine.
    """

    def __init__(self, *args: Any, use_replay: bool, engine: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_replay = use_replay
        self.engine = engine
        self.replay = moe_ops.hf.replay(self.model, measure=True)
        self.routed: torch.Tensor | None = None
        self.sampled: torch.Tensor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.replay:
            return super().train(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns completions and their log-probabilities, and keeps the experts of each token."""
        model = self.accelerator.unwrap_model(self.model)
        end = self.processing_class.eos_token_id
        completions, log_probs, self.routed = self.engine.sample(model, prompt_ids, end)
        return completions, log_probs

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        # TRL shuffles and splits every tensor of the output with its batch.
        return {**output, "routed_experts": self.routed}

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.routed, self.sampled = inputs["routed_experts"], inputs["sampling_per_token_logps"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.use_replay:
            self.replay.set(self.routed, attention_mask=attention_mask)
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, *args, **kwargs
        )
        # Checkpointed layers repeat these experts in backward.
        self.replay.set(None)
        mask = attention_mask[:, -found[0].shape[1] :]
        self.replay.agreement.add_log_probs(self.sampled, found[0].detach(), mask)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        measured = self.replay.agreement.as_dict()
        if "loss" in logs:
            logs["policy_kl"] = measured["kl"]
            if self.use_replay:
                logs["replaced_choices"] = measured["choices"]
            self.replay.agreement = RoutingAgreement()
        super().log(logs, *args, **kwargs)


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    pairs = zip(prompts, completions, strict=True)
    return [text.count(prompt[0]) / COMPLETION for prompt, text in pairs]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per letter."""
    names = ["<pad>", "<eos>", *LETTERS]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(vocabulary: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-replay", dest="replay", action="store_false")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), default=8, help="of the experts in transformers"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    engine = VllmEngine() if options.engine == "vllm" else TransformersEngine(options.bits)
    set_seed(options.seed)
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=COMPLETION,
            max_steps=options.steps,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=options.seed,
        )
        trainer = ReplayTrainer(
            make_model(len(tokenizer)),
            reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": [letter * PROMPT for letter in LETTERS]}),
            processing_class=tokenizer,
            use_replay=options.replay,
            engine=engine,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    for entry in history:
        names = ("reward", "policy_kl", "replaced_choices")
        shown = "  ".join(f"{name} {entry[name]:.4g}" for name in names if name in entry)
        print(f"step {entry['step']}  {shown}")
    return history


if __name__ == "__main__":
    main()
