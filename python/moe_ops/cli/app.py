"""Commands of ``moe-ops``: their arguments and output; other modules do the work.

The file is long because it declares every option of every command, with its help.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moe_ops import _arguments as ranges
from moe_ops.cli import arguments

app = typer.Typer(
    help="Mixture-of-experts operators for PyTorch: check an installation, chat with and serve "
    "models, change checkpoints, measure.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_Model = Annotated[
    Path, typer.Argument(help="Folder of a Hugging Face causal language model, or a hub id.")
]
_Quantize = Annotated[
    str | None,
    typer.Option(help="int4, int8 or fp8: quantize a float checkpoint while it is loaded."),
]
_Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")]
_Threads = Annotated[int | None, arguments.threads("CPU threads. [default: what torch chooses]")]


def _console(quiet: bool = False, stderr: bool = False) -> Console:
    return Console(quiet=quiet, stderr=stderr, highlight=False)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        import moe_ops

        typer.echo(moe_ops.__version__)
        raise typer.Exit


@app.command()
@arguments.command
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    rates: Annotated[
        bool, typer.Option("--rates", help="Also measure the rates that plan --vram needs.")
    ] = False,
) -> None:
    """Check this installation, test every op, and suggest fixes for problems."""
    from moe_ops import doctor as checks

    report = checks.examine()
    if rates:
        from moe_ops.cli.plan_machine import rates_finding

        report.findings.append(rates_finding())
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        from moe_ops.cli.tables import print_report

        print_report(_console(), report)
    if report.failed:
        raise typer.Exit(1)


@app.command()
@arguments.command
def demo(
    steps: Annotated[
        int | None, arguments.steps("Training steps. [default: 1800, about 3 minutes]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text file or folder. [default: source of Python's standard library]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("moe_demo"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it was stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw away the unfinished run in --out.")
    ] = False,
    seed: Annotated[int, arguments.seed("Of weights and batches.")] = 0,
    threads: Annotated[
        int | None, arguments.threads("CPU threads. [default: what torch chooses]")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A tiny model and a few steps: does it run at all?")
    ] = False,
) -> None:
    """Train a mixture-of-experts language model and draw which expert takes which byte.

    A stopped or killed run continues with --resume and ends with a bitwise identical result.
    """
    from moe_ops.demo.run import DemoOptions, run_demo

    console = _console()
    options = DemoOptions(
        out=out,
        data=data,
        steps=steps,
        resume=resume,
        overwrite=overwrite,
        seed=seed,
        threads=threads,
        smoke=smoke,
    )
    try:
        run_demo(options, console)
    except KeyboardInterrupt:
        again = f"moe-ops demo --resume --out {shlex.quote(str(out))}"
        console.print(f"Stopped. Continue with: {again}", markup=False, soft_wrap=True)
        raise typer.Exit(arguments.INTERRUPTED) from None


@app.command()
@arguments.command
def chat(
    model: _Model,
    quantize: _Quantize = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[
        int | None, arguments.tokens("Most tokens of an answer. [default: the checkpoint's]", 1)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=100.0, help="0 takes the likeliest token. [default: the checkpoint's]"
        ),
    ] = None,
    dtype: _Dtype = "auto",
    threads: _Threads = None,
) -> None:
    """Chat with a model in the terminal; it runs on moe_ops.

    Ctrl-C stops an answer, /clear starts anew, /exit or Ctrl-D ends. Reads a pipe as well, one
    message per line.
    """
    try:
        from moe_ops.cli import chat, loading
    except ImportError as error:
        raise arguments.fail(f"moe-ops chat: {error}") from None
    options = loading.LoadOptions(model, quantize, dtype, threads)
    chat.run(
        options,
        _console(stderr=True),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


@app.command()
@arguments.command
def serve(
    model: _Model,
    quantize: _Quantize = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm where it is installed.")
    ] = "transformers",
    cache_tokens: Annotated[
        int | None,
        arguments.tokens(
            "Room of a cache for all requests, which then run together. [default: one by one]", 1
        ),
    ] = None,
    dtype: _Dtype = "auto",
    threads: _Threads = None,
) -> None:
    """Serve a model to OpenAI clients with the server of transformers or vLLM."""
    try:
        from moe_ops.cli import loading, serve
    except ImportError as error:
        raise arguments.fail(f"moe-ops serve: {error}") from None
    options = loading.LoadOptions(model, quantize, dtype, threads)
    serve.run(
        options,
        _console(stderr=True),
        host=host,
        port=port,
        engine=engine,
        cache_tokens=cache_tokens,
    )


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    program: Annotated[
        list[str] | None,
        typer.Argument(help="A command of this environment, a file of Python, or -m MODULE."),
    ] = None,
    install: Annotated[
        bool,
        typer.Option(
            "--install", help="Make processes that programs start know moe_ops too, from now on."
        ),
    ] = False,
    uninstall: Annotated[
        bool, typer.Option("--uninstall", help="Remove what --install has written.")
    ] = False,
) -> None:
    """Run another program that loads models by transformers, which then knows moe_ops.

    It opens checkpoints that moe_ops has quantized, and experts_implementation="moe_ops".
    """
    from moe_ops.cli import run

    if install or uninstall:
        arguments.command(run.set_up)(program or [], install, uninstall, _console())
        return
    words = program or []
    arguments.command(run.prepare)(words)
    run.run_program(words)  # Its errors are its own.


@app.command()
@arguments.command
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small layers, about a minute instead of ten.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    threads: Annotated[int | None, arguments.threads("CPU threads. [default: 1]")] = None,
    isa: Annotated[
        str | None, typer.Option(help="Hold everything to this instruction set: avx2.")
    ] = None,
) -> None:
    """Time moe_ops against transformers, plain torch and the limits of this machine."""
    from dataclasses import replace

    from moe_ops.bench import machine, measure, report

    if isa is not None and isa not in machine.ISA_ENVIRONMENTS:
        known = " or ".join(machine.ISA_ENVIRONMENTS)
        raise arguments.fail(f"bench: --isa must be {known}, got {isa}.")
    machine.hold_to_isa(isa)
    plan = replace(measure.QUICK if quick else measure.Plan(), threads=threads or 1)
    result = measure.run(plan, log=lambda line: typer.echo(line, err=True))
    typer.echo(json.dumps(result) if as_json else report.render(result))


@app.command()
@arguments.command
def quantize(
    source: Annotated[
        Path, typer.Argument(help="Folder of a Hugging Face causal language model, or a hub id.")
    ],
    target: Annotated[Path, typer.Argument(help="Folder for the quantized checkpoint.")],
    format: Annotated[str, typer.Option(help="int4, int8 or fp8.")] = "int4",
    group_size: Annotated[
        int | None, typer.Option(help="Of int4: 32, 64 or 128. [default: 64]")
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Quantize dense layers too: int8 beside int4 experts is close to Q4_K_M. "
            "[default: they stay float]"
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file: its end measures the quality, its beginning calibrates."),
    ] = None,
    scales: Annotated[
        bool, typer.Option("--scales", help="Activation-aware scales, found on the text.")
    ] = False,
    tokens: Annotated[
        int, arguments.tokens("Tokens of the text for calibrating, and as many to judge.", 64)
    ] = 4096,
    context: Annotated[int, arguments.tokens("Tokens per sequence.", 2)] = 512,
    skip: Annotated[
        list[str] | None, typer.Option(help="Pattern of module names that stay float; repeatable.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")
    ] = False,
    push_to: Annotated[
        str | None, typer.Option(help="Id of a repository of the hub to upload the result to.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantize the experts of a checkpoint, or all of it, to 8 or 4 bits, and measure the cost."""
    console = _console(quiet=as_json)
    try:
        from moe_ops.cli.quantize import QuantizeOptions, run
    except ImportError as error:
        raise arguments.fail(f"moe-ops quantize: {error}") from None
    options = QuantizeOptions(
        source=source,
        target=target,
        format=format,
        group_size=group_size,
        dense=dense,
        text=text,
        scales=scales,
        tokens=tokens,
        context=context,
        skip=tuple(skip or ()),
        overwrite=overwrite,
        push_to=push_to,
    )
    result = run(options, console)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@app.command()
@arguments.command
def export(
    source: Annotated[
        Path, typer.Argument(help="Folder of a Hugging Face causal language model, or a hub id.")
    ],
    target: Annotated[Path, typer.Argument(help="File for GGUF, folder for other formats.")],
    format: Annotated[
        str,
        typer.Option(
            help="gguf:q4_k (or f32, f16, bf16, q8_0, q4_0, mxfp4), gguf to keep quantized weights "
            "as they are, compressed-tensors:int4 or int8, gptq:int4; 'int4 g32' sets a group."
        ),
    ],
    dense: Annotated[
        str | None,
        typer.Option(
            help="Type of dense layers: q8_0, int8, ...; none leaves them float in a folder. "
            "[default: that of experts]"
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file: weights are rounded by their importance on its beginning."),
    ] = None,
    tokens: Annotated[int, arguments.tokens("Tokens of the text.", 64)] = 16384,
    context: Annotated[int, arguments.tokens("Tokens per sequence.", 2)] = 512,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file, or what is in a folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model for other programs: GGUF, compressed-tensors or GPTQ."""
    try:
        from moe_ops.cli.export import ExportOptions, run
    except ImportError as error:
        raise arguments.fail(f"moe-ops export: {error}") from None
    options = ExportOptions(
        source=source,
        target=target,
        format=format,
        dense=dense,
        text=text,
        tokens=tokens,
        context=context,
        overwrite=overwrite,
    )
    result = run(options, _console(quiet=as_json))
    if as_json:
        typer.echo(json.dumps(result, indent=2))


_OF_MACHINES = (
    "ram",
    "bandwidth",
    "overhead",
    "pcie",
    "gpu_bandwidth",
    "format",
    "dense_format",
    "batch",
    "cached_experts",
    "hit_rate",
)
_OF_BOTH = ("model", "vram", "context", "tflops", "as_json", *_OF_MACHINES)


@app.command()
@arguments.command
def plan(
    given: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A config.json, a folder with one, an id of the hub, or a preset: deepseek_v3, ..."
        ),
    ],
    vram: Annotated[
        float | None,
        arguments.size("Plan one machine instead: GB of its GPU; 0 is no GPU."),
    ] = None,
    ram: Annotated[
        float | None, arguments.size("GB of the machine. [default: available here]")
    ] = None,
    bandwidth: Annotated[
        float | None,
        arguments.size("GB/s at which kernels read the machine's memory. [default: measured here]"),
    ] = None,
    overhead: Annotated[
        float | None, arguments.size("Microseconds a layer besides kernels. [default: measured]")
    ] = None,
    pcie: Annotated[
        float | None, arguments.size("GB/s to the GPU. [default: measured, or 25 without CUDA]")
    ] = None,
    gpu_bandwidth: Annotated[
        float | None,
        arguments.size("GB/s of the GPU's memory. [default: measured, or 360 without CUDA]"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(help="Of experts: bf16, int8, fp8, int4, mxfp4 or stored. [default: all]"),
    ] = None,
    dense_format: Annotated[
        str | None,
        typer.Option(help="Of other weights. [default: that of the files, or bf16]"),
    ] = None,
    batch: Annotated[int, arguments.tokens("Sequences of the machine.", 1)] = 1,
    cached_experts: Annotated[
        int, typer.Option(min=0, help="Experts per layer cached on the GPU, with --hit-rate.")
    ] = 0,
    hit_rate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fraction of the used experts that are cached."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=ranges.MAX_RANKS, help="All devices.")] = 8,
    cluster: Annotated[
        str, typer.Option(help="Preset of devices and links: h100, h200, b200, gb200_nvl72, ...")
    ] = "h100",
    ep: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share experts out. [default: the best]")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Ranks of tensor parallelism.")] = 1,
    fsdp: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks that FSDP shards over. [default: all, in training]"),
    ] = None,
    tokens: Annotated[int, arguments.tokens("Tokens of a rank in one forward.", 1)] = 4096,
    context: Annotated[int, arguments.tokens("Tokens of a sequence.", 1)] = 4096,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    inference: Annotated[bool, typer.Option("--inference", help="Forward alone.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activation checkpointing of every block.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Rows travel as fp8.")] = False,
    fp32_combine: Annotated[
        bool, typer.Option("--fp32-combine", help="Results return in float32.")
    ] = False,
    dispatch: Annotated[str, typer.Option(help="A dispatcher, as of choose().")] = "auto",
    imbalance: Annotated[
        float, typer.Option(min=1.0, help="Tokens of the busiest rank over the mean.")
    ] = 1.0,
    redundant: Annotated[
        int, typer.Option(min=0, help="Places of a rank for copies of experts.")
    ] = 0,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Of a fast domain.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a device.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="That products reach; of the CPU with --vram.")
    ] = None,
    intra: Annotated[float | None, typer.Option(help="GB/s of a device inside a node.")] = None,
    inter: Annotated[float | None, typer.Option(help="GB/s of a device across nodes.")] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also run a step of one rank, without data: a minute or two."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="Picture: .svg, .png, .pdf or .html.")] = None,
) -> None:
    """Plan expert parallelism: memory, traffic and time of a rank, and what to change.

    With --vram, plan one machine whose experts are in CPU memory: memory, tokens a second.
    """
    set_here = [
        name
        for name in given.params
        if (source := given.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    wrong = [n for n in set_here if n not in _OF_BOTH] if vram is not None else []
    wrong = wrong or ([n for n in set_here if n in _OF_MACHINES] if vram is None else [])
    if wrong:
        word = "without" if vram is not None else "with"
        option = wrong[0].replace("_", "-")
        raise arguments.fail(f"plan: --{option} must be given {word} --vram.")
    if vram is not None:
        from moe_ops.cli import plan_machine

        result = plan_machine.run(
            plan_machine.MachineOptions(
                model=model,
                vram=vram,
                ram=ram,
                bandwidth=bandwidth,
                tflops=tflops,
                overhead=overhead,
                pcie=pcie,
                gpu_bandwidth=gpu_bandwidth,
                format=format,
                dense_format=dense_format,
                context=context,
                batch=batch,
                cached_experts=cached_experts,
                hit_rate=hit_rate,
            ),
            _console(quiet=as_json),
        )
        if as_json:
            typer.echo(json.dumps(result, indent=2))
        return
    from moe_ops.cli.plan import PlanOptions, run

    options = PlanOptions(
        model=model,
        ranks=ranks,
        cluster=cluster,
        ep=ep,
        changes={
            "ranks_per_node": ranks_per_node,
            "memory": None if memory is None else memory * 2**30,
            "flops": None if tflops is None else tflops * 1e12,
            "intra_bandwidth": None if intra is None else intra * 1e9,
            "inter_bandwidth": None if inter is None else inter * 1e9,
        },
        job={
            "tp": tp,
            "fsdp": fsdp,
            "tokens": tokens,
            "context": context,
            "training": not inference,
            "dtype": dtype,
            "recompute": recompute,
            "fp8": fp8,
            "fp32_combine": fp32_combine,
            "dispatch": dispatch,
            "imbalance": imbalance,
            "redundant": redundant,
        },
        trace=trace,
        out=out,
    )
    result = run(options, _console(quiet=as_json))
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@app.command()
@arguments.command
def prune(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face causal language model.")],
    keep: Annotated[str, typer.Option(help="Experts a layer: 8, or the part of them: 0.5.")],
    text: Annotated[
        Path,
        typer.Option(help="Text file: its beginning chooses experts, its end measures the cost."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pruned checkpoint.")],
    by: Annotated[
        str,
        typer.Option(
            help="What is dropped: frequency, tcess, tcess_softmax, gate_norm, reap, max_output. "
            "Or merged: uncurl, hc_smoe."
        ),
    ] = "reap",
    groups: Annotated[
        str, typer.Option(help="Of group-limited routing: drop, or keep as many of each group.")
    ] = "drop",
    tokens: Annotated[
        int, arguments.tokens("Tokens of the text to choose by, and as many to judge.", 64)
    ] = 16384,
    context: Annotated[int, arguments.tokens("Tokens per sequence.", 2)] = 512,
    tune: Annotated[
        int, typer.Option(min=0, max=10**6, help="Steps of training afterwards, on the same text.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Keep, or merge into, fewer experts per layer; transformers loads the result without
    moe_ops."""
    console = _console(quiet=as_json)
    try:
        number = float(keep) if "." in keep else int(keep)
    except ValueError:
        raise arguments.fail(f"prune: --keep must be a number, got {keep}.") from None
    try:
        from moe_ops.cli.prune import PruneOptions, run
    except ImportError as error:
        raise arguments.fail(f"moe-ops prune: {error}") from None
    options = PruneOptions(
        source=source,
        target=out,
        text=text,
        keep=number,
        by=by,
        groups=groups,
        tokens=tokens,
        context=context,
        tune=tune,
        overwrite=overwrite,
    )
    result = run(options, console)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@app.command()
@arguments.command
def inspect(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face causal language model.")],
    text: Annotated[Path, typer.Option(help="Text file that the model reads.")],
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("experts.html"),
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of another checkpoint of the model, to compare with."),
    ] = None,
    tokens: Annotated[int, arguments.tokens("Number of tokens of the text to read.", 4)] = 4096,
    context: Annotated[int, arguments.tokens("Tokens per sequence.", 2)] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an HTML page about the experts of a model on a text: loads, tokens, pairs."""
    try:
        from moe_ops.cli.inspect import run
    except ImportError as error:
        raise arguments.fail(f"moe-ops inspect: {error}") from None
    result = run(source, text, out, against, tokens, context, _console(quiet=as_json))
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@app.command()
@arguments.command
def upcycle(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="Folders of dense Hugging Face models: Llama, Mistral or Qwen3. Several are "
            "specialists of one seed, each of which becomes experts.",
        ),
    ],
    experts: Annotated[int, typer.Option(min=1, max=2**16, help="Experts a layer.")],
    top_k: Annotated[int, typer.Option(min=1, max=2**16, help="Experts a token.")],
    out: Annotated[Path, typer.Option(help="Folder for the new checkpoint.")],
    slices: Annotated[
        int, typer.Option(min=1, max=2**16, help="Parts that each copy of a network is cut into.")
    ] = 1,
    clusters: Annotated[
        str, typer.Option(help="Neurons of a part: contiguous, k_means, or coactivation.")
    ] = "contiguous",
    noise: Annotated[
        float, arguments.share("Weights of copies times 1 + NOISE * a normal number.")
    ] = 0.0,
    drop: Annotated[
        float, arguments.share("Part of each copy's neurons that is drawn anew (Drop-Upcycling).")
    ] = 0.0,
    text: Annotated[
        Path | None,
        typer.Option(help="Text file: its beginning finds coactivation, its end measures."),
    ] = None,
    tokens: Annotated[int, arguments.tokens("Tokens of the text for either.", 64)] = 16384,
    context: Annotated[int, arguments.tokens("Tokens per sequence.", 2)] = 512,
    seed: Annotated[int, arguments.seed("Of routers, noise and drawn neurons.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a mixture of experts of dense models; transformers loads the result without moe_ops."""
    console = _console(quiet=as_json)
    try:
        from moe_ops.cli.upcycle import UpcycleOptions, run
    except ImportError as error:
        raise arguments.fail(f"moe-ops upcycle: {error}") from None
    options = UpcycleOptions(
        sources=tuple(sources),
        target=out,
        experts=experts,
        top_k=top_k,
        slices=slices,
        clusters=clusters,
        noise=noise,
        drop=drop,
        text=text,
        tokens=tokens,
        context=context,
        seed=seed,
        overwrite=overwrite,
    )
    result = run(options, console)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


zoo_app = typer.Typer(help="Published systems that moe_ops can build.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")


@zoo_app.command("list")
@arguments.command
def zoo_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List name, summary and presets of every system."""
    from moe_ops.cli.zoo import listing, print_listing

    if as_json:
        typer.echo(json.dumps(listing(), indent=2))
    else:
        print_listing(_console())
