"""python engine.py FOLDER: what vLLM generates from a checkpoint, as JSON.

stdin has JSON: "batches", lists of prompts, which are lists of token ids; "sampling" and "engine",
options of SamplingParams and LLM; and "aborted", prompts that are aborted after two steps, before
the batches; "reload" is a folder whose weights the engine loads before the batches, or None. The
result has "batches": for each prompt its completions, each with "tokens",
"logprobs" (for each step those of the most likely tokens) and "experts" (or null); "ops": how often
each op of moe_ops ran; "preemptions"; and "held": the requests whose experts the worker holds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(folder: Path, cache: Path, batches: list[Any], **given: Any) -> tuple[Any, str]:
    """Runs this file and returns its result and log; "env" holds environment variables."""
    variables = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    env = {**os.environ, **variables, **given.pop("env", {})}
    request = {"batches": batches, "engine": {}, "sampling": {}, "aborted": [], "reload": None}
    request |= given
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
    )
    log = done.stdout + done.stderr
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    assert found, log[-3000:]
    return json.loads(found[1]), log


def held(worker) -> int:
    return len(worker.connector._requests)


def main(folder: str) -> None:
    import torch
    from vllm import LLM, SamplingParams

    given = json.load(sys.stdin)
    options = {"dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 16, **given["engine"]}
    llm = LLM(folder, skip_tokenizer_init=True, disable_log_stats=False, **options)
    defaults = {"temperature": 0, "max_tokens": 2, "logprobs": 20}
    sampling = SamplingParams(ignore_eos=True, detokenize=False, **defaults | given["sampling"])

    for i, ids in enumerate(given["aborted"]):
        llm.llm_engine.add_request(f"aborted {i}", {"prompt_token_ids": ids}, sampling)
    if given["aborted"]:
        for _ in range(2):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([f"aborted {i}" for i in range(len(given["aborted"]))])
    if given["reload"]:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": given["reload"]})

    batches = []
    with torch.profiler.profile() as profile:
        for batch in given["batches"]:
            prompts = [{"prompt_token_ids": ids} for ids in batch]
            results = llm.generate(prompts, sampling, use_tqdm=False)
            batches.append([[completion(out) for out in r.outputs] for r in results])
    ops = {e.key: e.count for e in profile.key_averages() if e.key.startswith("moe_ops::")}
    counts = {m.name: m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"}
    result = {"batches": batches, "ops": ops, "preemptions": sum(counts.values())}
    if "worker_cls" in options:
        result["held"] = llm.collective_rpc(held)[0]
    print("RESULT " + json.dumps(result))


def completion(out) -> dict[str, object]:
    rows = out.routed_experts
    steps = [{str(token): entry.logprob for token, entry in step.items()} for step in out.logprobs]
    experts = None if rows is None else {"dtype": str(rows.dtype), "rows": rows.tolist()}
    return {"tokens": list(out.token_ids), "logprobs": steps, "experts": experts}


if __name__ == "__main__":
    main(*sys.argv[1:])
