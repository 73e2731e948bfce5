"""Both kinds of plan as tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from mtptrain.planning.result import DecodingPlan, DraftLengthRow, ModelSizes, PartCost, PassCost, Profile, TrainingPlan
from mtptrain.run.tables import print_sentence, print_table


def print_plan(plan: DecodingPlan | TrainingPlan, console: Console) -> None:
    """Print a plan of either kind."""
    if isinstance(plan, TrainingPlan):
        print_training_plan(plan, console)
    else:
        print_decoding_plan(plan, console)


def print_decoding_plan(plan: DecodingPlan, console: Console) -> None:
    """Print summary, assumptions, gain by K, and the work of a plain pass, the best verify pass and a draft step."""
    print_sentence(console, decoding_summary(plan), style="bold")
    for line in (_describe_sizes(plan.model), _describe_decoding(plan), _describe_profile(plan.acceptance)):
        print_sentence(console, line)
    print_table(console, _draft_length_table(plan))
    shown = plan.draft_lengths[plan.best_draft_length or 1]
    print_table(console, _work_table("Plain pass, t(1)", plan.draft_lengths[0].verify))
    print_table(console, _work_table(f"Verify pass, t({shown.draft_length + 1})", shown.verify))
    if shown.draft is not None:
        print_table(console, _work_table("Later draft step", shown.draft.later_step))
    print_sentence(console, "Estimates: every part at the hardware's ceiling, without overlap. See docs/plan.md.")


def print_training_plan(plan: TrainingPlan, console: Console) -> None:
    """Print summary, memory by kind of tensor, and FLOPs, communication and time of a step."""
    memory, step, cache = plan.memory, plan.step, plan.stream_cache
    seconds = {"computing": step.seconds.computing, "communication": step.seconds.communication}
    moments = {name: size / 1e9 for name, size in memory.moments.items()}
    print_sentence(console, training_summary(plan), style="bold")
    print_sentence(console, _describe_sizes(plan.model))
    print_sentence(console, _describe_training(plan))
    print_table(console, _shares_table(f"Memory per GPU during {memory.moment}, the peak", "GB", memory.gpu, 1e9))
    print_sentence(console, "GB at each moment: " + ", ".join(f"{name} {size:.4g}" for name, size in moments.items()))
    print_table(console, _shares_table("CPU memory per process", "GB", memory.cpu, 1e9))
    print_table(console, _shares_table(f"A step of {step.tokens:,} tokens, all GPUs", "TFLOP", step.flops, 1e12))
    if step.sent_bytes_a_gpu:
        print_table(console, _shares_table("Sent by each GPU per step", "GB", step.sent_bytes_a_gpu, 1e9))
    print_table(console, _shares_table("Time of a step", "seconds (ceiling)", seconds, 1))
    print_sentence(
        console,
        f"A stream cache of these tokens takes {cache.bytes / 1e12:.4g} TB, {cache.bytes_a_token / 1024:g} KiB per "
        "token in bf16.",
    )
    print_sentence(
        console,
        "Estimates, not measurements. Ceiling: products at the hardware's rate, without overlap. Expected: products at "
        "35 % of the data sheet's rate, which DeepSeek-V3's training reached (arXiv 2412.19437). See docs/plan.md.",
    )


def decoding_summary(plan: DecodingPlan) -> str:
    """Return the best K and its gain in one sentence."""
    if plan.best_draft_length == 0:
        return "drafting does not pay at this acceptance: every K from 1 to 8 is slower than plain decoding"
    row = plan.draft_lengths[plan.best_draft_length]
    return (
        f"best: K={row.draft_length}, {row.speedup:.2f}x at {row.acceptance_length:.2f} tokens a pass "
        f"(ceiling: {_rate(row.tokens_per_second)} over all rows)"
    )


def training_summary(plan: TrainingPlan) -> str:
    """Return memory and time of the whole training in one sentence."""
    memory = plan.memory
    return (
        f"{'fits' if memory.fits else 'DOES NOT FIT'}: {memory.bytes_a_gpu / 1e9:.4g} GB of "
        f"{memory.memory_bytes_a_gpu / 1e9:.4g} GB per GPU; {plan.tokens / 1e6:,.0f} M tokens take {plan.hours:.3g} "
        f"hours at {_rate(plan.tokens_per_second)} (ceiling), expected {plan.expected_hours:.3g} hours at "
        f"{_rate(plan.expected_tokens_per_second)}"
    )


def _rate(tokens_per_second: float) -> str:
    """Return a rate to four digits, written out: 149,700 tokens/s."""
    return f"{float(f'{tokens_per_second:.4g}'):,.0f} tokens/s"


def _describe_sizes(model: ModelSizes) -> str:
    total, active, module = (
        f"{count / 1e9:.4g} B" for count in (model.parameters, model.active_parameters, model.module_parameters)
    )
    return f"{model.name}: {total} parameters, {active} per token; MTP module {module}"


def _describe_decoding(plan: DecodingPlan) -> str:
    memory, hardware, load = plan.memory, plan.hardware, plan.load
    available, weights, keys = (
        f"{size / 1e9:.3g} GB"
        for size in (memory.memory_bytes_a_gpu, memory.weights_bytes_a_gpu, memory.cache_bytes_a_gpu)
    )
    return (
        f"{hardware.num_gpus} x {hardware.name}, {load.weights.value} weights, {load.cache.value} keys, batch "
        f"{load.batch}, context {load.context}; a GPU of {available} holds {weights} of weights and {keys} of keys"
        + ("" if memory.fits else ": DOES NOT FIT")
    )


def _describe_profile(acceptance: Profile) -> str:
    shares = ", ".join(f"{share:.2f}" for share in acceptance.conditional)
    return f"acceptance by position, {acceptance.source}: {shares}; later positions repeat the last"


def _describe_training(plan: TrainingPlan) -> str:
    hardware, load = plan.hardware, plan.training
    return (
        f"{hardware.num_gpus} x {hardware.name}; ZeRO stage {load.zero_stage}; "
        f"backbone.placement={load.placement.value}, {load.backbone.value} weights; heads in {load.heads.value}; "
        f"micro-batch per GPU {load.rows} x {load.row_length} tokens, accumulation {load.micro_batches}, "
        f"{load.steps} draft steps"
    )


def _draft_length_table(plan: DecodingPlan) -> Table:
    times = ("verify\nms (ceiling)", "draft\nms (ceiling)")
    table = _new_table("Gain of K drafts per pass", ["K", "tok/pass", "experts", *times, "speed-up", "break-even"])
    for row in plan.draft_lengths:
        is_best = row.draft_length == plan.best_draft_length
        table.add_row(*_gain_cells(row), style="bold" if is_best else None)
    return table


def _gain_cells(row: DraftLengthRow) -> list[str]:
    no_break_even = "-" if row.draft is None else "never"
    return [
        str(row.draft_length),
        f"{row.acceptance_length:.2f}",
        f"{row.verify.experts:.1f}",
        f"{1e3 * row.verify.seconds:.3f}",
        "-" if row.draft is None else f"{1e3 * row.draft.seconds:.3f}",
        f"{row.speedup:.2f}x",
        no_break_even if row.break_even is None else f"{row.break_even:.2f}",
    ]


def _work_table(title: str, cost: PassCost) -> Table:
    """Return a table with one row per part, the slowest first."""
    table = _new_table(title, ["part", "GB", "GFLOP", "ms (ceiling)", "share"])
    for name, part in sorted(cost.parts.items(), key=lambda item: -item[1].seconds):
        table.add_row(*_work_cells(name, part, cost.seconds))
    table.add_row(*_work_cells("all", cost, cost.seconds), style="bold")
    return table


def _work_cells(name: str, cost: PartCost | PassCost, total_seconds: float) -> list[str]:
    return [
        name,
        f"{cost.bytes / 1e9:.4g}",
        f"{cost.flops / 1e9:.4g}",
        f"{1e3 * cost.seconds:.4f}",
        f"{cost.seconds / total_seconds:.0%}",
    ]


def _shares_table(title: str, unit: str, values: dict[str, float], scale: float) -> Table:
    """Return a table with one row per value, the largest first, and their sum."""
    table = _new_table(title, ["", unit, "share"])
    total = sum(values.values())
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value / scale:.4g}", f"{value / total:.0%}" if total else "-")
    table.add_row("all", f"{total / scale:.4g}", "", style="bold")
    return table


def _new_table(title: str, headers: list[str]) -> Table:
    """Return an empty table whose first column holds names and the others numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header == headers[0] else "right")
    return table
