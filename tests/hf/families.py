"""Tiny random models of every family of transformers that has mixture-of-experts blocks.

python -m tests.hf.families            # builds, runs and generates with each of them
python -m tests.hf.families jamba
"""

from __future__ import annotations

import copy
import sys
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .family_configs import LARGER, TEXT
from .models import VOCAB, draw_weights

FAMILIES = tuple(sorted((*TEXT, *LARGER)))
# Families that `generate` cannot be called for, and why.
NOT_GENERATIVE = {
    "openai_privacy_filter": "it labels tokens",
    "diffusion_gemma": "it denoises blocks of tokens",
}
# Families that this version of transformers cannot build or run on the CPU, and why.
LEFT_OUT: dict[str, str] = {}


def configuration(family: str, **overrides) -> tuple[type | None, PreTrainedConfig]:
    """Returns the class of a family's model, None for the one of AutoModelForCausalLM, and its
    configuration. `overrides` replace options of the text model's part."""
    if family in TEXT:
        model_type, config = TEXT[family]
        return None, AutoConfig.for_model(model_type, **copy.deepcopy({**config, **overrides}))
    name, config, others = copy.deepcopy(LARGER[family])
    cls = getattr(transformers, name)
    config = {**config, **copy.deepcopy(overrides)}
    if others:
        ids = {f"{kind}_token_id": VOCAB - 1 for kind in ("image", "video", "audio")}
        tied = config.get("tie_word_embeddings", False)
        config = {"text_config": config, **others, **ids, "tie_word_embeddings": tied}
    return cls, cls.config_class(**config)


def build(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Returns a float32 model in eval mode that reads text. `overrides` replace options of the
    text model's configuration; every parameter is drawn as in `models.build`."""
    cls, config = configuration(family, **overrides)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    make = AutoModelForCausalLM.from_config if cls is None else cls._from_config
    model = make(config, **options)
    draw_weights(model, seed)
    model.tie_weights()
    return model.float().eval()


def logits(model: PreTrainedModel, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **inputs).logits


def check(family: str) -> str:
    model = build(family)
    ids = torch.randint(1, VOCAB - 1, (2, 13), generator=torch.Generator().manual_seed(1))
    result = logits(model, ids)
    assert result.isfinite().all()
    said = f"logits {tuple(result.shape)} std {result.std():.2f}"
    if family in NOT_GENERATIVE:
        return f"{said}; no generation: {NOT_GENERATIVE[family]}"
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return f"{said}; generated {tokens[0, 13:].tolist()}"


def main() -> int:
    bad = 0
    for family in sys.argv[1:] or FAMILIES:
        start = time.perf_counter()
        try:
            said = check(family)
        except Exception as error:
            bad += 1
            said = f"FAILED {type(error).__name__}: {str(error)[:300]}"
        print(f"{family:22}{time.perf_counter() - start:5.1f} s  {said}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
