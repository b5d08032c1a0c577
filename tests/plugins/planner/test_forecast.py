"""What runs come to: steps, time, money, energy, memory, checkpoints; and what is said where a figure lacks."""

from dataclasses import replace

import pytest

from llama_step import LLAMA_8B, llama_step
from loomtune import api
from loomtune.catalogue import installed
from loomtune.plan import Plan
from loomtune.settings import Hardware, Link
from loomtune_plugins.planner.figures import lines
from loomtune_plugins.planner.forecast import Rows, forecast
from loomtune_plugins.planner.saving import saving
from loomtune_plugins.planner.trace import Peak

H100 = Hardware(
    kind="cuda",
    title="NVIDIA H100 SXM5 80 GB",
    memory_gib=79.1,
    memory_gb_per_second=3350,
    tflops={"bf16": 989.4},
    per_node=8,
    inside=Link(450),
    between=Link(50),
    host=Link(63),
    host_gib=2000,
    disk_gb_per_second=10,
    watts=1000,
    price=2.0,
)
TRACE = llama_step(LLAMA_8B, ranks=8)


def planned(**given):
    """A plan of full fine-tuning under FSDP, with settings in the place of these."""
    axes = {"model": {"name": "random"}, "adapter": {"name": "full"}, "sharding": {"name": "fsdp"}}
    root = {"precision": "bf16", "batch": {"size": 8}, "steps": 100, "checkpoint": {"keep": 2}}
    return Plan(settings={**axes, "optimizer": {"name": "adamw"}, "exporter": {}, **root, **given}, versions={})


def foretold(trace=TRACE, hardware=H100, rows=None, **given):
    return forecast(trace, planned(**given), installed(), hardware, rows)


def test_a_run_takes_its_steps_and_its_waits_and_costs_its_accelerators_hours():
    made = foretold(checkpoint={"every": 50})
    low, high = made.speed.seconds
    wait = made.kept.waits

    assert made.whole.steps == 100
    assert made.whole.seconds == pytest.approx((100 * low + 2 * wait[0], 100 * high + 2 * wait[1]))
    assert made.whole.device_hours == pytest.approx([8 * each / 3600 for each in made.whole.seconds])
    assert made.whole.usd == pytest.approx([2 * each for each in made.whole.device_hours])
    assert made.whole.kilowatt_hours == pytest.approx(made.whole.device_hours)
    assert not made.unknown


def test_speed_is_of_all_ranks_and_used_of_one():
    made = foretold()
    low, high = made.speed.seconds

    assert made.speed.tokens == 8 * 8192
    assert made.speed.rate == pytest.approx((8 * 8192 / high, 8 * 8192 / low))
    assert made.speed.used["mfu"][1] == pytest.approx(made.speed.flops["mfu"] / low / 989.4e12)
    assert made.speed.used["mfu"] < made.speed.used["mfu_palm"] < made.speed.used["hfu"]


def test_ranks_that_share_rows_make_no_more_tokens():
    trace = llama_step(LLAMA_8B, ranks=8, rows=2)  # each of two replicas has two of the four rows

    assert (
        foretold(trace, sharding={"name": "fsdp", "tensor": 2, "sequence": 2}, batch={"size": 4}).speed.tokens
        == 4 * 8192
    )


def test_rows_that_cannot_be_dealt_out_evenly_are_counted_once():
    trace = llama_step(LLAMA_8B, ranks=8, rows=2)  # the first rank's of ten rows

    assert foretold(trace, batch={"size": 10}).speed.tokens == pytest.approx(10 * 8192)


@pytest.mark.parametrize(
    ("given", "rows", "steps"),
    [
        ({"steps": 0, "epochs": 2.0}, Rows(rows=1001), 251),
        ({"steps": 0, "epochs": 0.5}, Rows(rows=1001), 63),
        ({"steps": 7}, Rows(rows=1001), 7),
        ({"steps": 7, "stop_after": 3}, None, 3),
        ({"steps": 0}, None, None),
        ({"steps": 0, "batch": {"size": 8, "sampler": "packed"}, "max_length": 100}, Rows(rows=1000, mean=40), 50),
    ],
)
def test_steps_are_those_that_the_rows_make(given, rows, steps):
    made = foretold(rows=rows, **given)

    assert made.whole.steps == steps
    assert (made.whole.usd is None) == (steps is None)


def test_shorter_rows_go_quicker_and_leave_memory_as_it_is():
    full, half = foretold(), foretold(rows=Rows(rows=800, mean=4096, longest=8192, met=5000))

    assert half.speed.tokens == full.speed.tokens / 2
    assert half.speed.seconds[1] < full.speed.seconds[1]
    assert half.room.peak == full.room.peak
    assert "no rows were at hand" in " ".join(full.assumptions)
    assert "no rows were at hand" not in " ".join(half.assumptions)


def test_an_unknown_price_leaves_the_cost_unknown_and_says_so():
    made = foretold(hardware=replace(H100, price=0.0, watts=0.0, disk_gb_per_second=0.0))

    assert (made.whole.usd, made.whole.kilowatt_hours, made.kept.save) == (None, None, None)
    assert made.whole.seconds is not None
    assert made.unknown == [
        "hardware.price: cost",
        "hardware.watts: energy",
        "hardware.disk_gb_per_second: time to save",
    ]


def test_without_hardware_memory_is_all_that_is_known():
    made = foretold(hardware=Hardware())

    assert made.room.peak == 60 << 30
    assert (made.room.fits, made.speed.seconds, made.whole.usd) == (None, None, None)
    assert made.kept.checkpoint.bytes > 0
    assert made.unknown == ["hardware: whether it fits, time and cost"]


def test_a_speed_that_lacks_makes_no_time_rather_than_a_wrong_one():
    made = foretold(hardware=replace(H100, inside=Link()))

    assert made.speed.seconds is None
    assert "hardware.inside.gb_per_second: time and cost" in made.unknown


def test_what_fits_has_room_on_the_device_and_in_the_node():
    assert foretold().room.fits
    assert not foretold(hardware=replace(H100, memory_gib=59.9)).room.fits
    assert not foretold(hardware=replace(H100, host_gib=10)).room.fits
    assert foretold(hardware=replace(H100, host_gib=0)).room.fits


def test_what_is_offloaded_lies_in_every_process_of_a_node():
    more = replace(TRACE, host={"optimizer": 10 << 30})

    assert foretold(more).room.host - foretold().room.host == 8 * 10 << 30


def test_a_checkpoint_holds_weights_once_and_both_moments_of_what_is_trained():
    full = foretold().kept.checkpoint

    assert full.model == 4 * LLAMA_8B.parameters
    assert full.optimizer == 8 * LLAMA_8B.parameters
    assert full.words < 0.01 * full.bytes


def test_an_adapter_s_checkpoint_has_no_base_and_its_weights_twice():
    trained = 20_000_000
    trace = replace(TRACE, parameters=(LLAMA_8B.parameters + trained, trained, LLAMA_8B.parameters + trained))

    saved = saving(trace, planned(adapter={"name": "lora"}), installed())

    assert (saved.model, saved.optimizer) == (4 * trained, 12 * trained)


def test_moments_of_eight_bits_are_a_quarter_and_a_scale_for_each_block():
    saved = saving(TRACE, planned(optimizer={"name": "adamw_8bit"}), installed())

    assert saved.optimizer == 2 * LLAMA_8B.parameters + 2 * (4 * LLAMA_8B.parameters // 256)


def test_a_checkpoint_is_written_by_all_nodes_at_once():
    one, four = (foretold(llama_step(LLAMA_8B, ranks=ranks), batch={"size": ranks}).kept for ranks in (8, 32))

    assert one.save[0] == pytest.approx(one.checkpoint.bytes / 10e9, rel=0.1)
    assert four.save[0] < 0.3 * one.save[0]


def test_training_waits_for_the_gathering_and_the_copying_of_a_checkpoint():
    gathered, kept = (foretold(trace).kept for trace in (TRACE, replace(TRACE, collectives=())))
    copied = gathered.checkpoint.files / 63e9

    assert kept.waits == pytest.approx((copied, 2.4 * copied))
    assert gathered.waits[0] - kept.waits[0] == pytest.approx(gathered.checkpoint.model * 7 / 8 / 370e9, rel=0.01)


def test_the_disk_holds_what_stays_what_is_written_and_what_is_exported():
    made = foretold(exporter={"huggingface": {"name": "huggingface", "dtype": "bf16"}})

    assert made.kept.checkpoint.exported == 2 * LLAMA_8B.parameters
    assert made.kept.disk == 3 * made.kept.checkpoint.bytes + 2 * LLAMA_8B.parameters


def test_every_figure_has_its_reason():
    plan = planned()
    figures = lines(forecast(TRACE, plan, installed(), H100), TRACE, plan, H100)

    subjects = [one.subject for one in figures]
    assert subjects[:3] == ["peak memory of a rank", "host memory of a node", "time of a step"]
    assert {"speed", "mfu", "mfu_palm", "hfu", "cost", "energy", "checkpoint", "disk"} <= set(subjects)
    assert all(one.low <= one.high and one.unit and one.reasoning for one in figures)


def test_the_real_saver_writes_as_many_bytes_as_were_foretold(worlds, mixed_data, tmp_path):
    shape = "{model_type: llama, hidden_size: 128, intermediate_size: 512, num_hidden_layers: 4, vocab_size: 8192"
    model = ["model=random", f"model.shape={shape}, num_attention_heads: 4, num_key_value_heads: 4}}"]
    settings = [*model, "data=jsonl", f"data.path={mixed_data}", "steps=1", "batch.size=2", "sharding=fsdp"]
    done = worlds.train(2, [*settings, "checkpoint.background=false", "optimizer.lr=1e-3"], tmp_path / "run")
    count = 2 * 8192 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 512 + 2 * 128) + 128
    trace = replace(
        TRACE, processes=2, blocks=4, parameters=(count,) * 3, moments={"forward": Peak(1, {})}, collectives=(), work=()
    )

    written = sum(file.stat().st_size for file in (done.folder / "checkpoints").rglob("*") if file.is_file())

    plan = api.compose(settings, processes=2)
    assert saving(trace, plan, installed()).bytes == pytest.approx(written, rel=0.01)
