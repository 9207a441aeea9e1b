"""The table of efficiency claims: published figures, sizes, arms and baselines.

A claim's arms are lists of runs, (count, module): JetMoE-8B runs its block 24 times and its head
once. Ratios are arm / baseline; below 1 the arm is cheaper.

Letters: H hidden size, I intermediate size, E experts, K experts per token.

The file is long because it is one table, whose rows state sizes and sources.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from bench.studies.mofme.rivals import Restoration, RivalConfig
from bench.studies.queue import RESULTS
from bench.studies.widenet.controls import ControlConfig, ControlViT
from moe_ops.zoo.bam import BAM, BAMConfig
from moe_ops.zoo.coe import CoE, CoEConfig
from moe_ops.zoo.deepseek import DeepSeek, DeepSeekConfig
from moe_ops.zoo.factorllm import FactorLLM, FactorLLMConfig
from moe_ops.zoo.jetmoe import JetMoE, JetMoEConfig
from moe_ops.zoo.llama import Llama, LlamaConfig
from moe_ops.zoo.moduleformer import ModuleFormer, ModuleFormerConfig
from moe_ops.zoo.mofme import MoFMEConfig, RestorationTransformer
from moe_ops.zoo.topp import TopP, TopPConfig
from moe_ops.zoo.widenet import WideNetConfig, WideNetViT

from .models import (
    LLAMA2_7B,
    MIXTRAL_8X7B,
    Blocks,
    BothMixtralBlock,
    Embedding,
    Head,
    Images,
    MixtralBlock,
    MoELayer,
    NeoXBlock,
    OffloadedLayer,
    TokenByToken,
    WeakMixtralBlock,
    block,
)

Run = tuple[float, str]
Runs = tuple[Run, ...]
Modules = dict[str, Any]
PREFILL, DECODE = "prompt", "1 token"
FLOPS, PARAMETERS, TIME, WEIGHTS = "FLOPs", "parameters", "time", "bytes of weights"
QUANTITIES = (FLOPS, PARAMETERS, TIME, WEIGHTS)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        runs: the modules that a forward pass runs, by name, and how often.
        holds: the modules that memory holds; None: `runs`.
        counted: the runs whose FLOPs count instead of those of `runs`, with fractions as weights.
        published: published ratio to the baseline of the claim's quantity, if there is one.
    """

    runs: Runs
    holds: Runs | None = None
    counted: Runs | None = None
    published: float | None = None


@dataclass(frozen=True)
class Claim:
    """An efficiency claim of a paper.

    Attributes:
        name: key in the results.
        system: stem of the page in docs/zoo.
        published: the claim and its figure, in words.
        source: where the figure is published.
        quantity: what the published ratio is about, one of `QUANTITIES`.
        counted_by: the counted quantity that stands beside it.
        counted_scene: the scene whose FLOPs stand in the table.
        sizes: sizes of both sides, in words.
        baseline: name of the arm that all others are compared with.
        arms: the arms, by name.
        build: makes the modules, by name, under `torch.device("meta")`.
        why: why counted, measured and published ratios differ, or which trained quantity is
            assumed; sentences.
        scenes: leading dimensions of inputs that are measured, by name.
        counted_scenes: further scenes that are only counted.
        dtype: of weights and inputs.
        training: True: forward and backward are measured; False: forward without gradients.
        whole: True: peak memory is that of whole models; False: of each module once.
        prepare: changes materialized modules before they run; with a folder, experts are offloaded
            to a file in it.
        needs: modules that `prepare` reads, besides those that run.
        peak_arms: arms whose peak memory is measured; None: all.
    """

    name: str
    system: str
    published: str
    source: str
    quantity: str
    counted_by: str
    counted_scene: str
    sizes: str
    baseline: str
    arms: Mapping[str, Arm]
    build: Callable[[], Modules]
    why: str
    scenes: Mapping[str, tuple[int, ...]]
    counted_scenes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    whole: bool = False
    prepare: Callable[[Modules, Path | None], Modules] = lambda modules, folder: modules
    needs: tuple[str, ...] = ()
    peak_arms: tuple[str, ...] | None = None

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.arms if name != self.baseline)


LM_SCENES = {PREFILL: (1, 256), DECODE: (1, 1)}
CONTEXT = {"4,096 tokens": (1, 4096)}


def arxiv(number: str, place: str = "abstract") -> str:
    return f"[{place}](https://arxiv.org/abs/{number})"


def language_model(blocks: Runs, name: str, published: float | None = None) -> Arm:
    """Returns the arm of blocks with the modules "NAME head" and "NAME embedding"."""
    runs = (*blocks, (1, f"{name} head"))
    return Arm(runs, (*runs, (1, f"{name} embedding")), published=published)


def ends(name: str, config: Any) -> Modules:
    return {f"{name} head": Head(config), f"{name} embedding": Embedding(config)}


# ------------------------------------------------------------------------ language models, dense


def jetmoe() -> Claim:
    config = JetMoEConfig.jetmoe_8b()
    return Claim(
        name="jetmoe",
        system="jetmoe",
        published="about 70 % less inference compute than Llama 2 7B",
        source=arxiv("2404.07413"),
        quantity=FLOPS,
        counted_by=FLOPS,
        counted_scene=DECODE,
        sizes="24 blocks of 8 experts, K 2; 32 blocks of H 4096",
        baseline="Llama 2 7B",
        arms={
            # The embedding is also the head's weight.
            "JetMoE-8B": Arm(((24, "JetMoE block"), (1, "JetMoE head")), published=0.30),
            "Llama 2 7B": language_model(((32, "Llama block"),), "Llama"),
        },
        build=lambda: {
            "JetMoE block": block(JetMoE, config),
            "JetMoE head": Head(config),
            "Llama block": block(Llama, LLAMA2_7B),
            **ends("Llama", LLAMA2_7B),
        },
        scenes=LM_SCENES,
        counted_scenes=CONTEXT,
        why="A token multiplies with 2.33 billion weights, of 6.61 billion in Llama 2 7B: "
        "65 % less, not 70 %. With a context of 4,096 tokens it is 59 % less, because "
        "JetMoE has as many query features as Llama 2 in three quarters of the blocks. "
        "The prompt is slower than its count, likely because each expert has only 64 of"
        " its 256 tokens; the decode step is faster, likely because packed experts are "
        "read at a higher bandwidth than dense weights.",
    )


def moduleformer() -> Claim:
    small = ModuleFormerConfig.molm_350m_4b()
    large = ModuleFormerConfig.molm_700m_4b()
    pythia = LlamaConfig(vocab_size=50_304, hidden_size=2048)
    return Claim(
        name="moduleformer",
        system="moduleformer",
        published="the quality of dense models at more than twice the throughput: 71,017 and "
        "39,931 tokens per second against 35,559",
        source="[README](https://github.com/IBM/ModuleFormer)",
        quantity=TIME,
        counted_by=FLOPS,
        counted_scene=PREFILL,
        sizes="24 blocks of 16 attention and 32 feed-forward experts, K 2 or 4; 24 of H 2048",
        baseline="Pythia-1.4B",
        arms={
            "MoLM-350M-4B": language_model(((24, "K 2 block"),), "MoLM", 35_559 / 71_017),
            "MoLM-700M-4B": language_model(((24, "K 4 block"),), "MoLM", 35_559 / 39_931),
            "Pythia-1.4B": language_model(((24, "Pythia block"),), "Pythia"),
        },
        build=lambda: {
            "K 2 block": block(ModuleFormer, small),
            "K 4 block": block(ModuleFormer, large),
            "Pythia block": NeoXBlock(2048, 16, 8192),
            **ends("MoLM", small),
            **ends("Pythia", pythia),
        },
        scenes={PREFILL: (1, 512), DECODE: (1, 1)},
        why="By count, throughput is 3.7 and 2.1 times that of the dense model, nearly "
        "twice what was published for a GPU and other kernels; the measured prompt is "
        "between the two. Stick-breaking attention costs more than its FLOPs, since its"
        " exponentials and logarithms are not counted.",
    )


def deepseek() -> Claim:
    config = DeepSeekConfig.deepseek_moe_16b()
    return Claim(
        name="deepseek",
        system="deepseek",
        published="about 40 % of the compute of Llama 2 7B: 74.4 against 187.9 TFLOPs per 4,096 "
        "tokens, in training",
        source=arxiv("2401.06066", "paper"),
        quantity=FLOPS,
        counted_by=FLOPS,
        counted_scene="4,096 tokens",
        sizes="28 blocks of 64 experts, K 6, and 2 shared; 32 blocks of H 4096",
        baseline="Llama 2 7B",
        arms={
            "DeepSeekMoE 16B": language_model(
                ((1, "dense block"), (27, "MoE block")), "DeepSeek", 74.4 / 187.9
            ),
            "Llama 2 7B": language_model(((32, "Llama block"),), "Llama"),
        },
        build=lambda: {
            "dense block": block(DeepSeek, config, num_dense_layers=1),
            "MoE block": block(DeepSeek, config, num_dense_layers=0),
            "Llama block": block(Llama, LLAMA2_7B),
            **ends("DeepSeek", config),
            **ends("Llama", LLAMA2_7B),
        },
        scenes=LM_SCENES,
        counted_scenes=CONTEXT,
        why="Three times the counted FLOPs, for forward and backward, are 75.9 and 188.8 "
        "TFLOPs per 4,096 tokens, 2 % and 0.5 % above the published values. On the "
        "CPU, a prompt of 256 tokens gives each of 64 experts 24 tokens, for which "
        "weights are read but little is computed.",
    )


def factorllm() -> Claim:
    config = FactorLLMConfig.tinyllama_1b()

    def sliced(top_k: int) -> Blocks:
        return block(FactorLLM, config, top_k=top_k)

    return Claim(
        name="factorllm",
        system="factorllm",
        published="over 30 % more inference speed at 85 % of the quality",
        source=arxiv("2408.11855"),
        quantity=TIME,
        counted_by=FLOPS,
        counted_scene=PREFILL,
        sizes="TinyLlama-1.1B, 22 blocks; 4 slices of I 1408, K 1 or 2",
        baseline="dense",
        arms={
            "1 of 4 slices": language_model(((22, "1 of 4"),), "TinyLlama", 1 / 1.3),
            "2 of 4 slices": language_model(((22, "2 of 4"),), "TinyLlama", 1 / 1.3),
            "dense": language_model(((22, "dense block"),), "TinyLlama"),
        },
        build=lambda: {
            "1 of 4": sliced(1),
            "2 of 4": sliced(2),
            "dense block": block(Llama, LlamaConfig.tinyllama_1b()),
            **ends("TinyLlama", config),
        },
        scenes=LM_SCENES,
        whole=True,
        why="One slice of four removes three quarters of the FLOPs of the feed-forward "
        "networks, and 54 % of those of the model. Time does not depend on the trained "
        "router; the 85 % of the quality are the paper's ([own studies](factorllm.md))."
        " The abstract does not say for which K the 30 % hold; both rows have it as 1 /"
        " 1.3. No weights are dropped, so memory is equal.",
    )


# ----------------------------------------------------------------------- language models, routed


def coe_arm(blocks: int, name: str, published: float | None = None) -> Arm:
    return language_model(((blocks, name),), "CoE", published)


def coe_modules(*shapes: tuple[int, int, int]) -> Modules:
    """Returns blocks "CC KK EE": C iterations, K routed experts, E experts and the shared one."""
    config = CoEConfig.c2k4()
    made: Modules = {
        f"C{c} K{k} E{e}": block(CoE, config, num_iterations=c, top_k=k, num_experts=e - 1)
        for c, k, e in shapes
    }
    return {**made, **ends("CoE", config)}


COE_SIZES = "4 blocks of H 1024, experts of I 704, one of them shared"
COE_README = "[README](https://github.com/ZihanWang314/CoE)"
TRAINING = {"512 tokens": (1, 512)}


def coe_compute() -> Claim:
    return Claim(
        name="coe-compute",
        system="coe",
        published="loss 1.20 to 1.12 with similar compute: two iterations of 4 experts against one "
        "of 8",
        source=COE_README,
        quantity=FLOPS,
        counted_by=FLOPS,
        counted_scene="512 tokens",
        sizes=COE_SIZES,
        baseline="MoE(8/64)",
        arms={
            "CoE-2(4/64)": coe_arm(4, "C2 K4 E64", 1.0),
            "MoE(8/64)": coe_arm(4, "C1 K8 E64"),
        },
        build=lambda: coe_modules((2, 4, 64), (1, 8, 64)),
        scenes=TRAINING,
        training=True,
        whole=True,
        why="Two iterations of 4 and the shared expert are 10 expert calls per token, one "
        "of 8 is 9: the shared expert runs twice. The authors report that training time"
        " slightly increases, because fewer tokens reach an expert per iteration.",
    )


def coe_width() -> Claim:
    return Claim(
        name="coe-width",
        system="coe",
        published="two iterations of 8 experts reach the loss of 24 experts, at equal compute and "
        "memory",
        source=COE_README,
        quantity=FLOPS,
        counted_by=FLOPS,
        counted_scene="512 tokens",
        sizes=COE_SIZES,
        baseline="MoE(24/64)",
        arms={
            "CoE-2(8/64)": coe_arm(4, "C2 K8 E64", 1.0),
            "MoE(24/64)": coe_arm(4, "C1 K24 E64"),
        },
        build=lambda: coe_modules((2, 8, 64), (1, 24, 64)),
        scenes=TRAINING,
        training=True,
        whole=True,
        why="The published statement is that compute is consistent; by count, 18 expert "
        "calls per token are less than 25. At equal loss, which is the paper's finding "
        "and is not tested here, the difference is a saving.",
    )


def coe_experts() -> Claim:
    return Claim(
        name="coe-experts",
        system="coe",
        published="17.6 % less memory at equal loss, with 48 experts instead of 64",
        source=COE_README,
        quantity=WEIGHTS,
        counted_by=WEIGHTS,
        counted_scene="512 tokens",
        sizes=COE_SIZES,
        baseline="MoE(8/64)",
        arms={
            "CoE-2(4/48)": coe_arm(4, "C2 K4 E48", 1 - 0.176),
            "MoE(8/64)": coe_arm(4, "C1 K8 E64"),
        },
        build=lambda: coe_modules((2, 4, 48), (1, 8, 64)),
        scenes=TRAINING,
        training=True,
        whole=True,
        why="The count agrees with the published memory, embedding and head included. The "
        "measured peak also has activations and temporary buffers of the backward pass,"
        " which do not depend on the number of experts.",
    )


def coe_layers() -> Claim:
    return Claim(
        name="coe-layers",
        system="coe",
        published="42 % less memory at equal loss, with 4 blocks instead of 8",
        source=arxiv("2506.18945"),
        quantity=WEIGHTS,
        counted_by=WEIGHTS,
        counted_scene="512 tokens",
        sizes=COE_SIZES.replace("4 blocks", "4 or 8 blocks"),
        baseline="MoE(8/64), 8 blocks",
        arms={
            "CoE-2(8/64), 4 blocks": coe_arm(4, "C2 K8 E64", 1 - 0.42),
            "MoE(8/64), 8 blocks": coe_arm(8, "C1 K8 E64"),
        },
        build=lambda: coe_modules((2, 8, 64), (1, 8, 64)),
        scenes=TRAINING,
        training=True,
        whole=True,
        why="The count agrees with the published memory, embedding and head included. The "
        "measured peak also has activations.",
    )


# The sizes of the paper are not in its published config; these are ours.
TOPP = TopPConfig(
    vocab_size=32_000,
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    intermediate_size=2816,
    num_experts=16,
)
TOPP_STUDY = "topp-wide"


def stored_experts_per_token() -> float:
    """Returns the mean number of experts per token of the largest study of top-p routing."""
    runs = json.loads((RESULTS / f"{TOPP_STUDY}.json").read_text("utf-8"))["runs"]["top-p"]
    return fmean(run["rows"]["top-p"]["experts a token"] for run in runs.values())


def fixed_k(top_k: int) -> Blocks:
    """Returns a block that routes each token to K experts with top-p's weights."""
    return block(TopP, TOPP, top_p=1.0, max_experts=top_k)


def set_top_p(modules: Modules, folder: Path | None) -> Modules:
    """Sets p so that random tokens use `stored_experts_per_token` experts."""
    found = modules["top-p block"]
    router = found.model.layers[0].mlp.router
    used: list[float] = []

    def record(module: nn.Module, args: Any, routing: Any) -> None:
        used.append(float((routing.topk_ids >= 0).sum(-1).float().mean()))

    x = torch.randn(1, 2048, *found.features, dtype=next(found.parameters()).dtype)
    target, low, high = stored_experts_per_token(), 0.0, 1.0
    handle = router.register_forward_hook(record)
    try:
        with torch.no_grad():
            for _ in range(16):
                router.top_p = (low + high) / 2
                found(x)
                low, high = (router.top_p, high) if used[-1] < target else (low, router.top_p)
    finally:
        handle.remove()
    if abs(used[-1] - target) > 0.02 * target:
        raise ValueError(f"set_top_p: experts per token must be near {target}, got {used[-1]}.")
    return modules


def topp() -> Claim:
    k = stored_experts_per_token()
    ends_of = ((1, "TopP head"),)
    # Activated parameters of a token without experts, and of one expert in all blocks.
    rest, expert = 24 * (4 * 1024**2 + 16 * 1024) + 32_000 * 1024, 24 * 3 * 1024 * 2816
    bound = 0.9 * 2 - 0.1 * rest / expert
    mixed = ((24 * (2 - k), "1 expert"), (24 * (k - 1), "2 experts"), *ends_of)
    held = ((24, "2 experts"), *ends_of, (1, "TopP embedding"))
    return Claim(
        name="topp",
        system="topp",
        published="less than 90 % of the activated parameters of top-2",
        source=arxiv("2403.07652"),
        quantity=PARAMETERS,
        counted_by=FLOPS,
        counted_scene=DECODE,
        sizes="24 blocks of H 1024, 16 experts of I 2816, our choice",
        baseline="top-2",
        arms={
            "top-p": Arm(((24, "top-p block"), *ends_of), held, mixed, published=0.9),
            "top-2": Arm(((24, "2 experts"), *ends_of), held),
        },
        build=lambda: {
            "top-p block": block(TopP, TOPP),
            "1 expert": fixed_k(1),
            "2 experts": fixed_k(2),
            **ends("TopP", TOPP),
        },
        scenes=LM_SCENES,
        prepare=set_top_p,
        needs=("top-p block",),
        why=f"The number of experts per token is trained: the rows assume the {k:.2f} of "
        "study `topp-wide`, where a controller holds it near 1.8. At the sizes used "
        "here, which are ours because the paper's could not be checked, the claim holds"
        f" below {bound:.2f} experts per token. For measuring, p is set so that random "
        f"tokens use {k:.2f} experts. The FLOPs of one token are twice its activated "
        "parameters without the embedding. The measured decode step is that of the "
        "median token, which uses two experts. In the prompt all experts are read in "
        "both arms, so that fewer tokens per expert save less than their FLOPs.",
    )


# The paper's 590 million and its 776 million for the mixture follow with I 2048.
BAM_590M = dataclasses.replace(BAMConfig.bam_590m(), intermediate_size=2048)


def bam() -> Claim:
    def made(attention: str) -> Blocks:
        return block(BAM, BAM_590M, attention=attention)

    return Claim(
        name="bam",
        system="bam",
        published="inference latency 6.17 s (5.96 s with shared keys and values) against 4.81 s",
        source=arxiv("2408.08274", "paper"),
        quantity=TIME,
        counted_by=FLOPS,
        counted_scene=DECODE,
        sizes="6 blocks of H 1024, 4 attention and 4 feed-forward experts of I 2048",
        baseline="BTX",
        arms={
            "own keys and values": language_model(((6, "expert_kv"),), "BAM", 6.17 / 4.81),
            "shared keys and values": language_model(((6, "shared_kv"),), "BAM", 5.96 / 4.81),
            "BTX": language_model(((6, "dense"),), "BAM"),
        },
        build=lambda: {
            **{name: made(name) for name in ("expert_kv", "shared_kv", "dense")},
            **ends("BAM", BAM_590M),
        },
        scenes=LM_SCENES,
        whole=True,
        why="With I 2048, parameters are the paper's 776 million (the preset `bam_590m` has"
        " twice that I). Attention experts are soft, so all four run. Own keys and "
        "values also multiply the cache by four. The head, with a vocabulary of "
        "256,000, has two thirds of the weights that a token reads and is equal in all "
        "arms. Published latency is that of generation on a GPU.",
    )


def scmoe() -> Claim:
    def modules() -> Modules:
        strong = MixtralBlock()
        return {
            "strong": strong,
            "weak": WeakMixtralBlock(strong),
            "both": BothMixtralBlock(strong),
            "both head": TwoRows(MIXTRAL_8X7B),
            **ends("Mixtral", MIXTRAL_8X7B),
        }

    held = ((32, "strong"), (1, "Mixtral head"), (1, "Mixtral embedding"))
    return Claim(
        name="scmoe",
        system="scmoe",
        published="minimal extra latency: 1.30 times that of greedy decoding",
        source=arxiv("2405.14507", "paper"),
        quantity=TIME,
        counted_by=FLOPS,
        counted_scene=DECODE,
        sizes="Mixtral 8x7B, 32 blocks",
        baseline="greedy",
        arms={
            "two passes": Arm(
                ((32, "strong"), (32, "weak"), (2, "Mixtral head")), held, published=1.30
            ),
            "one pass of two rows": Arm(
                ((32, "both"), (1, "both head")), held, BOTH_COUNTED, published=1.30
            ),
            "greedy": Arm(((32, "strong"), (1, "Mixtral head")), held),
        },
        build=modules,
        scenes={DECODE: (1, 1)},
        why="The weak pass repeats attention and head and runs one expert, the second of "
        "the strong pass: 1.56 times the FLOPs, and more of the time if the passes run "
        "one after the other. As two rows of one call, attention weights and the head "
        "are read once, and the measured ratio is near the published one. The paper's "
        "implementation was not run.",
    )


# A slot without an expert costs nothing, but the counter counts every slot.
BOTH_COUNTED = ((32, "strong"), (32, "weak"), (2, "Mixtral head"))


class TwoRows(Head):
    rows = 2


# ---------------------------------------------------------------------------- memory of experts

SWITCH = {"hidden_size": 768, "intermediate_size": 3072, "activation": "relu"}
SWITCH_EXPERTS, SWITCH_LAYERS = 128, 12
SLOTS = 6
TOKENS = "64 tokens, one at a time"
HITS, LRU_HITS = 0.9190, 0.7661


class SwitchRest(nn.Module):
    """Weights of Switch-Base without its experts: embedding, 36 attentions, 12 dense networks."""

    def __init__(self) -> None:
        super().__init__()
        hidden, width = 768, 3072
        self.embedding = nn.Embedding(32_128, hidden)
        self.attention = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(4 * 36))
        self.up = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(12))
        self.down = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(12))


def offload(modules: Modules, folder: Path | None) -> Modules:
    """Adds the offloaded layers; with a folder, one whose experts are only in a file."""
    layer = modules["in memory"]
    if folder is not None:
        return {**modules, "predicted": OffloadedLayer(layer, SLOTS, HITS, folder / "experts")}
    hits = {"predicted": HITS, "LRU": LRU_HITS, "on demand": 0.0}
    return {**modules, **{n: OffloadedLayer(layer, SLOTS, h, None) for n, h in hits.items()}}


def expertflow() -> Claim:
    share = SWITCH_LAYERS * SLOTS / SWITCH_EXPERTS
    cached: Runs = ((share, "in memory"), (1, "rest"))

    def arm(name: str) -> Arm:
        return Arm(((SWITCH_LAYERS, name),), cached, ((SWITCH_LAYERS, "in memory"),))

    return Claim(
        name="expertflow",
        system="expertflow",
        published="up to 93.72 % less GPU memory, and 2 to 10 times the speed of other offloading",
        source=arxiv("2410.17954"),
        quantity=WEIGHTS,
        counted_by=WEIGHTS,
        counted_scene=TOKENS,
        sizes="Switch-Base with 128 experts in 12 layers; a cache of 6 experts per layer",
        baseline="in memory",
        arms={
            "predicted": dataclasses.replace(arm("predicted"), published=1 - 0.9372),
            "LRU": arm("LRU"),
            "on demand": arm("on demand"),
            "in memory": Arm(
                ((SWITCH_LAYERS, "in memory"),), ((SWITCH_LAYERS, "in memory"), (1, "rest"))
            ),
        },
        build=lambda: {
            "in memory": TokenByToken(SWITCH_EXPERTS, **SWITCH),
            "rest": SwitchRest(),
        },
        scenes={TOKENS: (1, 64)},
        prepare=offload,
        needs=("in memory",),
        peak_arms=("predicted", "in memory"),
        why="The hit rates are trained quantities, taken as published: 91.90 % predicted "
        "and 76.61 % LRU; the zoo's own predictor has lower ones "
        "([expertflow](expertflow.md)). The published memory corresponds to a cache of "
        "6 of 128 experts per layer, which is why the row has it. Counted are weights; "
        "the published value also has activations. Copies are from CPU memory to CPU "
        "memory, so times show the order of the arms and not the published speed; an "
        "expert in a small cache is read faster than one of 1.2 GB in memory. No "
        "prefetch: a miss waits.",
    )


def uncurl() -> Claim:
    def layer(experts: int) -> MoELayer:
        return MoELayer(experts, 1024, 4096, "gelu")

    return Claim(
        name="uncurl",
        system="uncurl",
        published="memory by merging experts by 2, sometimes by 4; no figure",
        source=arxiv("2409.01483"),
        quantity=WEIGHTS,
        counted_by=WEIGHTS,
        counted_scene=PREFILL,
        sizes="12 layers of 128 experts of H 1024 and I 4096, K 1",
        baseline="128 experts",
        arms={f"{e} experts": Arm(((12, f"E {e}"),)) for e in (64, 32, 128)},
        build=lambda: {f"E {e}": layer(e) for e in (64, 32, 128)},
        scenes=LM_SCENES,
        why="The abstract has no figure of memory. The sizes follow from its 354 million "
        "parameters and 1 to 13 billion with 8 to 128 experts, with experts in every "
        "other block; K 1 is our choice. A prompt is faster with fewer experts, because"
        " each expert has more of its tokens; a decode step reads one expert in any "
        "case.",
    )


# -------------------------------------------------------------------------------------- images

IMAGE = {"1 image": (1,)}
MOFME_WHY = {
    4: "The abstract does not give the number of experts, so three sizes are shown.",
    8: "A FiLM expert has a quarter of the parameters of an FFN expert, but the "
    "network shared by all FiLM experts and the rest of the model do not shrink.",
    16: "With 16 experts the feed-forward parts alone have 0.33 of the parameters; no "
    "number of experts gives less than 0.25, and 0.28 takes about 40. FLOPs are "
    "nearly equal, since a token uses two experts either way and most FLOPs are "
    "convolutions; 39 % less time does not follow from them. A baseline that runs "
    "all experts on all tokens would be slower, but whether the paper's did could "
    "not be checked.",
}


def mofme(experts: int) -> Claim:
    config = dataclasses.replace(MoFMEConfig.e4(), num_experts=experts)
    rival = RivalConfig(**{**dataclasses.asdict(config), "experts": "ffn", "router": "plain"})
    return Claim(
        name=f"mofme-{experts}",
        system="mofme",
        published="72 % fewer parameters and 39 % less inference time than FFN experts",
        source=arxiv("2312.16610"),
        quantity=PARAMETERS,
        counted_by=PARAMETERS,
        counted_scene="1 image",
        sizes=f"2 blocks of H 384, {experts} experts, K 2; one image of 128 x 128",
        baseline="FFN experts",
        arms={
            f"FiLM, E {experts}": Arm(((1, "film"),), published=1 - 0.72),
            "FFN experts": Arm(((1, "ffn"),)),
        },
        build=lambda: {
            "film": Images(RestorationTransformer(config), 3, 128),
            "ffn": Images(Restoration(rival), 3, 128),
        },
        scenes=IMAGE,
        dtype=torch.float32,
        whole=True,
        why=MOFME_WHY[experts],
    )


def widenet() -> Claim:
    base = WideNetConfig.b()
    dense = ControlConfig(
        **{
            **dataclasses.asdict(base),
            "sharing": "none",
            "num_experts": 1,
            "top_k": 1,
            "intermediate_size": 3072,
            "representation": False,
            "capacity_factor": None,
        }
    )
    published = {"WideNet-B": None, "WideNet-L": 0.46, "WideNet-H": 0.72}
    configs = {
        "WideNet-B": base,
        "WideNet-L": WideNetConfig.l(),
        "WideNet-H": WideNetConfig.h(),
    }
    return Claim(
        name="widenet",
        system="widenet",
        published="1.5 points better than ViT-B with 0.72 of its parameters, 0.8 points with 0.46",
        source=arxiv("2107.11817"),
        quantity=PARAMETERS,
        counted_by=PARAMETERS,
        counted_scene="1 image",
        sizes="B, L and H: 12, 24 and 32 uses of one block of 4 experts, K 2; ViT-B/16",
        baseline="ViT-B",
        arms={
            **{name: Arm(((1, name),), published=published[name]) for name in configs},
            "ViT-B": Arm(((1, "ViT-B"),)),
        },
        build=lambda: {
            **{name: Images(WideNetViT(c), 3, 224) for name, c in configs.items()},
            "ViT-B": Images(ControlViT(dense), 3, 224),
        },
        scenes=IMAGE,
        dtype=torch.float32,
        whole=True,
        why="The published ratios are those of parameters, and the counts agree. Shared "
        "blocks save no compute: WideNet-H runs 32 wide blocks and costs 12 times the "
        "FLOPs of ViT-B.",
    )


CLAIMS = {
    claim.name: claim
    for claim in (
        jetmoe(),
        moduleformer(),
        deepseek(),
        coe_compute(),
        coe_width(),
        coe_experts(),
        coe_layers(),
        topp(),
        factorllm(),
        *(mofme(e) for e in (4, 8, 16)),
        scmoe(),
        expertflow(),
        widenet(),
        uncurl(),
        bam(),
    )
}
