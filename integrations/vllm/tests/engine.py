"""python engine.py FOLDER MODE: the first token that vLLM generates for each prompt, as JSON.

Prompts are lists of token ids, in JSON on stdin. MODE is "eager" or "compiled". The result has
"tokens": for each prompt the log-probabilities of the 20 most likely tokens; and "ops": how often
each op of moe_ops ran.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(folder: str, mode: str) -> None:
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=mode == "eager",
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    sampling = SamplingParams(
        temperature=0, max_tokens=2, ignore_eos=True, logprobs=20, detokenize=False
    )
    with torch.profiler.profile() as profile:
        results = engine.generate(prompts, sampling, use_tqdm=False)
    tokens = [
        {str(token): entry.logprob for token, entry in result.outputs[0].logprobs[0].items()}
        for result in results
    ]
    ops = {
        entry.key: entry.count
        for entry in profile.key_averages()
        if entry.key.startswith("moe_ops::")
    }
    print("RESULT " + json.dumps({"tokens": tokens, "ops": ops}))


if __name__ == "__main__":
    main(*sys.argv[1:])
