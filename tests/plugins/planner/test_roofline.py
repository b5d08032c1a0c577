"""How long steps take: by hand, in order, and never slower on better hardware."""

from dataclasses import replace

import pytest

from llama_step import LLAMA_8B, LLAMA_70B, llama_step
from loomtune.settings import Hardware, Link
from loomtune_plugins.planner import efficiency, kernels
from loomtune_plugins.planner.efficiency import efficiency_of
from loomtune_plugins.planner.offloading import HIDDEN, offloaded
from loomtune_plugins.planner.roofline import scaled, times
from loomtune_plugins.planner.trace import Work

H100 = Hardware(
    kind="cuda",
    title="NVIDIA H100 SXM5 80 GB",
    memory_gib=79.1,
    memory_gb_per_second=3350,
    tflops={"bf16": 989.4, "fp32": 67},
    per_node=8,
    inside=Link(450),
    between=Link(50),
    host=Link(63),
)
HOPPER = efficiency_of("cuda", H100.title)


def product(m, k, n, count=1):
    return Work("matmul", "bf16", "forward", (1, m, k, n), 2.0 * m * k * n, 2.0 * (m * k + k * n + m * n), count=count)


def with_work(*work, micro=1):
    return replace(llama_step(LLAMA_8B), work=work, collectives=(), micro=micro)


def test_a_large_matmul_takes_its_operations_at_the_published_shares():
    took = kernels.seconds(product(8192, 8192, 8192), H100, HOPPER)

    assert took.low == pytest.approx(2 * 8192**3 / 794.5e12 + 4.3e-6, rel=0.01)
    assert took.high == pytest.approx(2 * 8192**3 / 720e12 + 6.4e-6, rel=0.01)


def test_a_product_with_one_row_takes_the_reading_of_its_weights():
    took = kernels.seconds(product(1, 8192, 8192), H100, HOPPER)

    assert took.low == pytest.approx(2 * 8192**2 / 3350e9 / 0.91 + 4.3e-6, rel=0.01)


def test_blocks_past_the_edges_and_idle_multiprocessors_cost():
    whole, past, few = (
        kernels.filled(shape, 132) for shape in ((1, 8192, 8192, 8192), (1, 129, 512, 33792), (1, 128, 512, 128))
    )

    assert whole > 0.95
    assert past == pytest.approx(129 / 256, abs=0.05)
    assert few < 0.02
    assert kernels.filled((1, 7, 7, 7), 0) == 1  # a CPU has no blocks
    assert kernels.filled((1, 0, 512, 128), 132) == 1  # of a rank with no part of a small tensor


def test_a_product_that_leaves_multiprocessors_idle_takes_longer_for_its_operations():
    took = kernels.seconds(product(9 * 128, 512, 9 * 128), H100, HOPPER)  # 81 blocks for 132 multiprocessors

    assert took.low - 4.3e-6 == pytest.approx(2 * 512 * (9 * 128) ** 2 / 794.5e12 / (81 / 132 / 0.95), rel=0.01)


def test_attention_counts_as_the_flash_papers_do_and_is_slower_in_short_rows():
    forward = Work("attention", "bf16", "forward", (64, 8192, 8192, 128, 1), 0, 0)
    backward = replace(forward, phase="backward")
    again = replace(backward, again=True)
    short = replace(forward, shape=(64 * 64, 1024, 1024, 128, 1))

    assert kernels.attention(forward) == 4 * 64 * 8192**2 * 128 / 2
    assert kernels.attention(backward) == 2.5 * kernels.attention(forward)
    assert kernels.seconds(again, H100, HOPPER) == kernels.seconds(forward, H100, HOPPER)
    assert kernels.attention(short) == kernels.attention(forward)
    assert kernels.seconds(short, H100, HOPPER).low > kernels.seconds(forward, H100, HOPPER).low


def test_what_lies_between_measured_lengths_lies_between_their_shares():
    curve = ((512, 0.2, 0.3), (1024, 0.4, 0.5))

    assert efficiency.at(curve, 724.08) == pytest.approx((0.3, 0.4), abs=1e-4)
    assert efficiency.at(curve, 256) == (0.1, 0.15)
    assert efficiency.at(curve, 9999) == (0.4, 0.5)


@pytest.mark.parametrize(
    ("title", "units"),
    [
        ("NVIDIA H200 SXM 141 GB", 132),
        ("NVIDIA A100-SXM4-80GB", 108),
        ("NVIDIA B200", 148),
        ("AMD Instinct MI300X", 304),
    ],
)
def test_accelerators_are_known_by_their_titles(title, units):
    assert efficiency_of("cuda", title).units == units


def test_an_accelerator_that_nobody_measured_gets_the_span_of_the_others():
    for title in ("Somebody's first", "NVIDIA H100 PCIe 80 GB"):
        assert efficiency_of("cuda", title).assumed
    assert efficiency_of("cpu", "").units == 0


@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B], ids=["8b", "70b"])
def test_ordinary_steps_have_a_range_of_at_most_a_half_more(shape, ranks):
    took = times(llama_step(shape, ranks=ranks), H100)

    assert 1 < took.step.high / took.step.low <= 1.5
    assert not took.unknown


def test_parts_add_up_by_phase_and_by_cause():
    took = times(llama_step(LLAMA_8B, ranks=16), H100)

    for sums in (took.by_phase(), took.by_cause()):
        assert sum(span.high for span in sums.values()) == pytest.approx(took.step.high)
    assert {"forward", "backward", "optimizer"} == set(took.by_phase())
    assert took.by_cause()["matmul"].low > took.by_cause()["communication"].low


@pytest.mark.parametrize(
    "better",
    [
        {"memory_gb_per_second": 6700},
        {"tflops": {"bf16": 1978.8, "fp32": 134}},
        {"inside": Link(900)},
        {"between": Link(100)},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("replicate", [1, 4])
def test_twice_a_speed_never_slows(better, replicate):
    trace = llama_step(LLAMA_8B, ranks=32, replicate=replicate, length=2048)
    slow, quick = times(trace, H100).step, times(trace, replace(H100, **better)).step

    assert quick.low <= slow.low
    assert quick.high <= slow.high


def test_copies_of_the_whole_inside_nodes_are_cheaper_where_links_between_them_are_slow():
    thin = replace(H100, between=Link(6))
    spread, copied = (
        times(llama_step(LLAMA_8B, ranks=64, replicate=replicate, length=512, micro=4), thin).step
        for replicate in (1, 8)
    )

    assert copied.low < spread.low
    assert copied.high < spread.high


def test_at_best_messages_hide_behind_kernels_and_otherwise_the_longest_of_each_kind_shows():
    trace = llama_step(LLAMA_8B)
    gathers = [one for one in trace.collectives if one.phase == "forward" and one.hidden]
    alone = times(replace(trace, work=[], collectives=gathers), H100).by_phase()["forward"]
    beside = times(replace(trace, collectives=gathers), H100).parts

    assert alone.low > 0.01
    shown = beside["forward", "communication"]
    assert shown.low == 0
    assert alone.high / 32 <= shown.high < alone.high


def test_several_accelerators_wait_for_the_slowest_in_the_ordinary():
    alone, eight = (
        times(replace(llama_step(LLAMA_8B), processes=ranks, collectives=()), H100).step for ranks in (1, 8)
    )

    assert eight.low == alone.low
    assert eight.high == pytest.approx(1.08 * alone.high, rel=1e-3)


def test_kernels_are_slower_while_messages_are_in_flight():
    (gathers,) = (one for one in llama_step(LLAMA_8B).collectives if one.phase == "forward" and one.hidden)
    compute = with_work(product(8192, 8192, 8192, count=1000))
    few, more = (
        times(replace(compute, collectives=[replace(gathers, count=count)]), H100).by_cause()["communication"].high
        for count in (11, 21)
    )

    each = times(replace(compute, work=[], collectives=[replace(gathers, count=1)]), H100).step.high
    assert more - few == pytest.approx(10 * 0.189 * each)


def test_every_micro_batch_shows_its_longest_message():
    once, often = (
        times(replace(trace, collectives=[one for one in trace.collectives if one.hidden]), H100).parts
        for trace in (llama_step(LLAMA_8B), llama_step(LLAMA_8B, micro=4))
    )
    key = "forward", "communication"

    assert often[key].high == pytest.approx(4 * once[key].high, rel=0.01)


def test_messages_hide_while_the_host_starts_kernels():
    gathers = [one for one in llama_step(LLAMA_8B).collectives if one.phase == "forward" and one.hidden]
    tiny = Work("other", "bf16", "forward", (), 0, 100, count=30_000)

    took = times(replace(with_work(tiny), collectives=gathers), H100)

    assert took.by_cause()["launch"].low > took.by_cause()["memory"].low
    assert took.by_cause()["communication"].low == 0


def test_on_cpus_nothing_hides_messages_in_the_ordinary():
    trace = llama_step(LLAMA_8B, ranks=2)
    cpu = Hardware(kind="cpu", tflops={"fp32": 0.1}, memory_gb_per_second=20, per_node=2, inside=Link(2))
    both, alone = times(trace, cpu), times(replace(trace, work=[]), cpu)

    assert both.by_cause()["communication"].high == pytest.approx(alone.step.high)


def test_many_tiny_kernels_take_what_the_host_needs_to_start_them():
    tiny = Work("other", "bf16", "forward", (), 0, 100, count=1000)

    took = times(with_work(tiny), H100)

    assert (took.step.low, took.step.high) == pytest.approx((5e-3, 12e-3))
    assert took.by_cause()["launch"].low > took.by_cause()["memory"].low


def test_copies_to_the_host_take_its_link_unless_they_hide():
    compute = product(8192, 8192, 8192, count=100)
    copy = Work("copy", "bf16", "forward", (), 0, 63e9 / 100)
    shown, hidden = (
        times(with_work(compute, replace(copy, shape=shape)), H100).parts.get(("forward", "copy"))
        for shape in ((), HIDDEN)
    )

    assert shown.low == pytest.approx(0.01 * 63 / 55.43, rel=1e-3)
    assert hidden.low == 0
    assert hidden.high == shown.high  # the longest, which is the only one, has nothing beside it


def test_a_step_on_the_host_takes_its_memory():
    adam = Work("host", "fp32", "optimizer", (), 0, 28e9 / 8)

    took = times(with_work(adam), H100).step

    assert (took.low, took.high) == pytest.approx((0.11, 0.26))


def test_what_lies_on_the_host_crosses_its_link_with_every_gather_and_reduction():
    trace = llama_step(LLAMA_8B, ranks=8)
    part = LLAMA_8B.parameters // 8
    there = replace(trace, host={"parameters": 4 * part, "gradients": 4 * part, "optimizer": 8 * part})

    work = offloaded(there)

    def copied(phase):
        return sum(one.bytes * one.count for one in work if one.kind == "copy" and one.phase == phase)

    blocks = 4 * LLAMA_8B.layers * LLAMA_8B.block / 8
    assert copied("forward") == pytest.approx(4 * part, rel=1e-3)  # in fp32, although bf16 is gathered
    assert copied("backward") == pytest.approx(blocks + 4 * part, rel=1e-3)
    assert {one.kind for one in work if one.phase == "optimizer"} == {"host"}
    assert times(there, H100).step.low > times(trace, H100).step.low


def test_an_optimizer_on_the_host_sends_the_parameters_back():
    trace = llama_step(LLAMA_8B, ranks=8)

    work = offloaded(replace(trace, host={"optimizer": LLAMA_8B.parameters}))

    (back,) = (one for one in work if one.kind == "copy" and one.phase == "optimizer")
    assert (back.bytes, back.shape) == (trace.kept["parameters"], ())
    assert not any(one.kind == "copy" and one.phase == "forward" for one in work)
    gradients = sum(one.bytes * one.count for one in work if one.kind == "copy" and one.phase == "backward")
    assert gradients == pytest.approx(4 * LLAMA_8B.parameters / 8, rel=1e-3)
    assert offloaded(trace) is trace.work


def test_a_mean_batch_takes_less_in_its_kernels_and_as_much_in_its_messages():
    trace = llama_step(LLAMA_8B)
    less = scaled(trace, 0.5, 0.25)

    assert less.tokens == trace.tokens / 2
    assert less.collectives == trace.collectives
    before, after = times(trace, H100).parts, times(less, H100).parts
    assert after["forward", "matmul"].low == pytest.approx(before["forward", "matmul"].low / 2)
    assert after["forward", "attention"].low == pytest.approx(before["forward", "attention"].low / 8)
    assert after["optimizer", "memory"] == before["optimizer", "memory"]


def test_figures_that_lack_are_named():
    poor = Hardware(kind="cuda", title="NVIDIA H100", tflops={"bf16": 989.4}, per_node=8)

    assert times(llama_step(LLAMA_8B, ranks=16), poor).unknown == [
        "hardware.memory_gb_per_second",
        "hardware.inside.gb_per_second",
        "hardware.between.gb_per_second",
    ]


def test_what_is_taken_for_granted_is_said():
    said = times(llama_step(LLAMA_8B), H100).assumptions

    assert any("73% to 80%" in sentence for sentence in said)
    assert any("messages" in sentence or "message" in sentence for sentence in said)
