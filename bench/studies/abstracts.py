"""The claims of each paper's abstract, with metric and baseline: the first rows of its page.

A claim is decided by the stored results of a study with its metric and its baseline. Other claims
state why no stored result decides them, and what would.
"""

from __future__ import annotations

from collections.abc import Mapping

from .inference import NOT_TESTABLE
from .study import NOT_MEASURED, Abstract

TASKS = "models of a few million parameters that are trained on bytes solve no such task; "

ABSTRACTS: Mapping[str, tuple[Abstract, ...]] = {
    "jetmoe": (
        Abstract(
            "higher mean score than Llama2-7B on language tasks", "53.0 against 51.0",
            state=NOT_TESTABLE,
            why=TASKS + "a dense model of three times the active parameters, both trained on a "
            "trillion tokens, would test it",
        ),
        Abstract(
            "about 70 % less compute at inference than Llama2-7B", "70 %", state=NOT_MEASURED,
            why="needs the FLOPs per token of both models; the studies' dense model has as many "
            "active parameters as the mixture",
        ),
    ),
    "deepseek": (
        Abstract(
            "loss of GShard (top-2) with 1.5 times the expert parameters and compute",
            "1.808 and 1.808", state=NOT_MEASURED, why="no variant has 1.5 times the experts",
        ),
        Abstract(
            "loss near that of a dense model with all parameters active", "1.808 and 1.806",
            state=NOT_MEASURED, why="no variant is dense with all parameters",
        ),
        Abstract(
            "16B: the quality of Llama2-7B at 40 % of its compute", "74.4 against 187.9 TFLOPs",
            state=NOT_TESTABLE, why=TASKS + "the published checkpoints would test it",
        ),
        Abstract(
            "loss-free balance: lower MaxVio than with a balance loss", "0.72 to 0.04",
            key="better",
        ),
        Abstract(
            "loss-free balance: lower loss than with a balance loss", "perplexity 9.56 to 9.50",
            key="free", bound=0.0,
        ),
    ),
    "moduleformer": (
        Abstract(
            "the quality of dense models at more than twice the throughput",
            "39,931 against 35,559 tokens/s, perplexity 13.20 against 14.71",
            state=NOT_MEASURED, why="needs a dense model of equal quality, and throughput",
        ),
        Abstract(
            "forgets less than a dense model that is tuned on new text", "–", state=NOT_MEASURED,
            why="the study's baseline is full tuning of the same mixture; a dense model is missing",
        ),
        Abstract("new modules learn new text: its loss falls", "–", key="added"),
        Abstract(
            "more modules can be removed after tuning with concentration, at 1 % of loss", "–",
            key="pruned",
        ),
    ),
    "coe": (
        Abstract(
            "two iterations of 4 experts have lower loss on mathematics than one of 8",
            "1.20 to 1.12", key="maths",
        ),
        Abstract(
            "two iterations equal one with three times as many experts per token",
            "1.12 against 1.18 at 24 experts", state=NOT_MEASURED,
            why="no variant uses three times the experts",
        ),
        Abstract(
            "17.6 to 42 % less memory at equal loss", "17.6 to 42 %", state=NOT_MEASURED,
            why="needs models of equal loss, whose memory can be counted",
        ),
    ),
    "topp": (
        Abstract(
            "more accurate than top-2 on language tasks", "0.7 % on average", state=NOT_TESTABLE,
            why=TASKS + "by loss, see below, top-p is better than top-2 by less than the interval",
        ),
        Abstract(
            "less than 90 % of top-2's active experts", "less than 90 %", key="fewer",
            state=NOT_TESTABLE,
            why="the study of H 128 holds the number at 1.8, so that it is a setting and no "
            "result; tasks that training does not see would test it",
        ),
        Abstract(
            "harder tasks use more experts; here kinds of text, by their loss",
            "more on BBH", key="domains",
        ),
    ),
    "home": (
        Abstract(
            "higher AUC than MMoE, with the same experts", "not at hand", key="MMoE",
        ),
        Abstract("higher AUC than PLE, with the same experts", "not at hand", key="PLE"),
        Abstract(
            "expert collapse: normalized Swish experts end the zeros of ReLU experts",
            "over 90 % zeros without", key="zeros",
        ),
        Abstract(
            "expert degradation and underfitting: no task owns a shared expert, none ignores its "
            "own", "–", state=NOT_MEASURED, why="needs the gate weights of each task by seed",
        ),
        Abstract(
            "longer watch time in a video service", "not at hand", state=NOT_TESTABLE,
            why="needs the users of such a service",
        ),
    ),
    "mowst": (
        Abstract(
            "higher accuracy than its experts on six benchmark graphs, with four graph networks",
            "GCN on Flickr 53.9 to 54.6", state=NOT_MEASURED,
            why="no package contains these graphs; the studies use generated graphs and films, "
            "where Mowst* chooses one of five gates on validation nodes and the baselines have no "
            "such choice",
        ),
        Abstract(
            "training compute like that of a single graph network", "–", state=NOT_MEASURED,
            why="only inference was counted",
        ),
    ),
    "t2mir": (
        Abstract("higher return than a dense transformer", "on all environments", key="dense"),
        Abstract(
            "the contrastive loss raises the information between task and routing", "–",
            key="tells",
        ),
    ),
    "premoe": (
        Abstract(
            "half of the experts, selected by TCESS, keep the accuracy on mathematics (here: cost "
            "at most 0.1 nats per byte)", "97.2 on MATH500 at 8/128", key="free by TCESS",
        ),
        Abstract(
            "an eighth of the experts keeps a part of it", "72.0 on MATH500 at 8/32",
            state=NOT_TESTABLE,
            why="an eighth of 16 experts is no more than the 2 that a token uses; a model of "
            "hundreds of experts would test it",
        ),
        Abstract(
            "memory of the model with a quarter of the experts", "390 GB", state=NOT_MEASURED,
            why="follows from the number of experts that are read; no model of this size is here",
        ),
    ),
    "uncurl": (
        Abstract(
            "the factor up to which pruning costs nothing grows with the number of experts before "
            "training", "–", state=NOT_MEASURED, why="the studies have one number of experts, 16",
        ),
        Abstract(
            "a reduced model is ahead of one of its size from scratch",
            "at factors of two, sometimes four", key="scratch",
        ),
    ),
    "super_experts": (
        Abstract(
            "language models have a few experts with extreme outputs",
            "3 of 6144 in Qwen3-30B-A3B", state=NOT_TESTABLE,
            why="models of 4 layers form none (below); a published checkpoint would test it",
        ),
        Abstract(
            "pruning these few experts breaks the model", "perplexity 8.7 to 59.9", key="damage",
            state=NOT_TESTABLE,
            why="the models have no super experts and no attention sinks; measured on a planted "
            "expert, as a multiple of its controls",
        ),
        Abstract(
            "pruning them ends attention sinks", "they decay by 0.9", key="sink",
            state=NOT_TESTABLE, why="no head has a sink; measured: the largest sink",
        ),
    ),
    "scmoe": (
        Abstract(
            "more problems solved than by greedy search", "61.8 to 66.9 % of GSM8K, Mixtral",
            key="contrast", state=NOT_TESTABLE,
            why="the weak pass solves 0 to 1 % of the problems; a model whose second expert solves "
            "a part of them would test it",
        ),
        Abstract(
            "more with self-consistency of 20 answers", "75.6 to 78.3 %", state=NOT_TESTABLE,
            why="as above",
        ),
        Abstract(
            "a small increase of latency over greedy search", "1.30 times", state=NOT_MEASURED,
            why="needs the time of both searches",
        ),
    ),
    "expertflow": (
        Abstract(
            "less GPU memory than the whole model", "93.72 % at most", state=NOT_MEASURED,
            why="a cache of a quarter of the experts was fixed; no GPU was used",
        ),
        Abstract(
            "2 to 10 times as fast as other offloading", "2 to 10 times", state=NOT_MEASURED,
            why="not on a GPU, and not against the published baselines; on one processor "
            "(see Time) prediction is 0.69 to 2.56 times as fast as LRU, 1.08 in the median",
        ),
    ),
    "bam": (
        Abstract(
            "lower perplexity than BTX at equal data", "9.70 against 10.72", key="btx",
        ),
        Abstract("lower perplexity than BTX at equal compute", "10.00 against 10.72",
                 key="compute"),
        Abstract(
            "better than BTX on language tasks", "34.02 against 32.71", state=NOT_TESTABLE,
            why=TASKS + "the published sizes would test it",
        ),
    ),
    "factorllm": (
        Abstract(
            "keeps 85 % of the quality of the dense model (here: accuracy of the next byte, one "
            "slice of four)", "85 %", key="kept",
            why="in the second study alone, whose tuning was lengthened after the first; routers "
            "with their initial values keep 92 % there and random slices 83 to 85 %, so that the "
            "router is not the cause",
        ),
        Abstract(
            "over 30 % faster", "30 %", state=NOT_MEASURED,
            why="the layer was timed (above), not a whole model",
        ),
    ),
    "composition": (
        Abstract(
            "high win rates at few active parameters",
            "Arena-Hard 59.4 at 31 B, MT-Bench 9.06 at 54 B", state=NOT_TESTABLE,
            why="needs models of billions of parameters that follow instructions, and a judge",
        ),
        Abstract(
            "two-step routing is ahead of a router by per-prompt labels (here: by loss)", "–",
            key="prompts",
        ),
    ),
    "adamoe": (
        Abstract(
            "more successful than the dense policy (here: in a generated environment)",
            "1.8 points on LIBERO", key="dense",
            why="the mixture has twice the compute of the dense policy in its feed-forward layers",
        ),
        Abstract(
            "more successful in RoboTwin's environments", "9.3 points", state=NOT_TESTABLE,
            why="needs its simulator and a pretrained policy",
        ),
        Abstract(
            "more successful with real robots", "21.5 points", state=NOT_TESTABLE,
            why="needs robots",
        ),
    ),
    "sentence": (
        Abstract(
            "one model with experts of given domains is ahead of one shared model",
            "F1 0.8875 against 0.8770", key="single",
        ),
        Abstract(
            "experts in one layer bring most of the gain (here: more than half)", "85 % of it",
            key="last",
        ),
    ),
    "dynamicdino": (
        Abstract(
            "ahead of Grounding DINO 1.5 Edge, trained on 1.56 million public pictures",
            "on COCO and LVIS", state=NOT_TESTABLE,
            why="neither the pictures nor the weights are in a package; the studies tune a "
            "detector of generated shapes",
        ),
        Abstract("sliced experts start at the detections of the dense model", "–", key="start"),
        Abstract(
            "experts of low layers work with many others, those of high layers with two or three",
            "–", state=NOT_MEASURED, why="needs the counts of experts that tokens use together",
        ),
    ),
    "thor": (
        Abstract(
            "better translations than Switch (here: by chrF instead of BLEU)", "2 BLEU more",
            key="chrF",
            why="800 pairs; THOR has two passes per step and Switch one; one of two layers has "
            "experts; the claim was stated after the results",
        ),
        Abstract(
            "as good as a mixture 18 times as large", "equal BLEU", state=NOT_TESTABLE,
            why="needs a mixture of billions of parameters",
        ),
        Abstract(
            "a router is no better than random experts (here: by 0.02 nats)", "–", key="router",
        ),
    ),
    "widenet": (
        Abstract(
            "images: better than ViT with 0.72 of its parameters (here: by loss, against unshared "
            "blocks)", "1.5 points of ImageNet", key="unshared of images", bound=0.0,
        ),
        Abstract(
            "images: with 0.46 and 0.13 of the parameters, better than ViT and ViT-MoE",
            "0.8 and 2.1 points", state=NOT_MEASURED, why="no variant has these sizes",
        ),
        Abstract(
            "text: better than ALBERT (here: by loss)", "1.8 points, mean of four data sets",
            key="albert",
        ),
        Abstract(
            "text: better than BERT with factorized embeddings (here: by loss, against unshared "
            "blocks)", "0.8 points", key="unshared", bound=0.0,
        ),
    ),
    "gntmove": (
        Abstract(
            "zero-shot: higher PSNR than GNT on unseen scenes", "26.02 dB on LLFF", key="dense",
        ),
        Abstract(
            "few-shot: higher PSNR than GNT after tuning on few views", "–", state=NOT_MEASURED,
            why="no study tunes on a new scene",
        ),
        Abstract("the permanent expert is essential", "–", key="permanent"),
    ),
    "mofme": (
        Abstract(
            "higher PSNR than baselines of image restoration (here: a dense network as wide)",
            "0.1 to 0.2 dB", key="dense",
        ),
        Abstract(
            "72 % fewer parameters than a mixture of FFN experts of equal PSNR (here: 75 %, at "
            "most 0.1 dB behind)", "72 %", key="within",
        ),
        Abstract(
            "39 % less time than a mixture of FFN experts", "39 %", state=NOT_MEASURED,
            why="no times were taken",
        ),
    ),
    "driftmoe": (
        Abstract(
            "accuracy competitive with adaptive ensembles of a hundred trees on nine streams "
            "(measured: a forest of ten on LED)", "–", key="forest", state=NOT_TESTABLE,
            why="20,000 of 1,000,000 examples, in which trees hardly split; streams of a million "
            "and forests of a hundred trees would test it",
        ),
    ),
}  # fmt: skip
