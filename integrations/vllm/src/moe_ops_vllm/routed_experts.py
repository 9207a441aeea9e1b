"""The experts that each token was routed to, beside the generated tokens.

vLLM's engine for GPUs returns them (`enable_return_routed_experts`), its engine for CPUs refuses
that option. The classes here connect vLLM's own recorder and store to the CPU's worker and
scheduler:

    LLM(
        model,
        worker_cls="moe_ops_vllm.routed_experts.Worker",
        scheduler_cls="moe_ops_vllm.routed_experts.Scheduler",
    )

Then `CompletionOutput.routed_experts` is as it is there: [prompt + completion - 1, layers, K], row
t for input token t, in the narrowest unsigned type, with zeros for layers without experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector
from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)
from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
from vllm.v1.worker.cpu_worker import CPUWorker


class Scheduler(VllmScheduler):  # type: ignore[misc]
    """vLLM's scheduler, which adds to a request's output the rows that `Worker` has recorded."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        _check(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self.aux_output_connector = AuxOutputSchedulerConnector()


class Worker(CPUWorker):  # type: ignore[misc]
    """vLLM's worker for CPUs, which records the ids of experts in each step."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        _check(vllm_config)
        # Compiled graphs contain the recording, and are cached by a hash of the configuration.
        vllm_config.additional_config["moe_ops_routed_experts"] = True
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        # Routers get their recorder before the model is compiled, which happens before the KV cache
        # exists, on which the connector's store depends.
        limit = self.scheduler_config.max_num_batched_tokens
        self.capturer = RoutedExpertsCapturer(limit, self.vllm_config)
        bind_routed_experts_capturer(self.get_model(), self.capturer)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        self.connector = AuxOutputWorkerConnector(
            vllm_config=self.vllm_config, model=self.get_model(), kv_cache_config=kv_cache_config
        )
        self.connector._capturer = self.capturer
        bind_routed_experts_capturer(self.get_model(), self.capturer)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.connector.begin_step(scheduler_output.aux_output_connector_metadata)
        self.drafts = scheduler_output.scheduled_spec_decode_tokens
        self.counts = scheduler_output.num_scheduled_tokens
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        batch = self.model_runner.input_batch
        ids = list(batch.req_ids)
        step = SimpleNamespace(
            req_ids=ids,
            num_computed_tokens_np=batch.num_computed_tokens_cpu[: len(ids)].copy(),
            query_start_loc_np=np.cumsum([0, *(self.counts[name] for name in ids)]),
        )
        output = super().sample_tokens(grammar_output)
        pending = self.connector.prepare_output(step)
        if pending is not None:
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            drafted = np.array([len(self.drafts.get(name, ())) for name in ids])
            pending.enqueue_cpu_copy(sampled, np.where(drafted > 0, drafted + 1 - sampled, 0))
            output.aux_output_connector_output = pending.process_output()
        return output

    def shutdown(self) -> None:
        if hasattr(self, "connector"):
            self.connector.close()
        super().shutdown()


def _check(config: VllmConfig) -> None:
    """Raises an error for a configuration in which rows would be missing."""
    here = f"{__name__}."
    for option, found, name in (
        ("worker_cls", config.parallel_config.worker_cls, "Worker"),
        ("scheduler_cls", config.scheduler_config.scheduler_cls, "Scheduler"),
    ):
        if found not in (here + name, globals()[name]):
            raise ValueError(f"recording of experts needs {option}={here + name!r}, got {found!r}")
    if not config.model_config.is_moe:
        model = config.model_config.model
        raise ValueError(f"recording of experts needs a model with experts, got {model}")
    if not config.cache_config.enable_prefix_caching:
        raise ValueError("recording of experts needs prefix caching, whose hashes name its blocks")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("recording of experts needs pipeline_parallel_size=1")
