"""Breaks the code on purpose, one line at a time, and sees that a test notices: `make mutations`.

Each mutation is made in a copy of the source roots in a temporary folder, never in the working tree. First the copy's
tests must pass as it is; then each mutant's must fail, by a failed assertion or expectation and not because nothing
could be imported.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ("core", "plugins", "conf", "launchers")
PATIENCE = 300.0
"""Seconds until the tests of a mutant count as hanging, which is not the same as noticing."""

MARKS = ("<!-- mutations -->\n", "<!-- end of mutations -->\n")
PARITY = "tests/runs/test_parity.py::test_every_layout_gives_the_curve_of_one_process"
CUT = "tests/plugins/shardings/test_tensor.py"
STRETCHES = "tests/plugins/shardings/test_sequence.py"
ON_POLICY = "tests/plugins/objectives/test_distill_on_policy.py"
RECORDS = "tests/core/test_records.py"
CREDIT, PPO_CREDIT, PPO = (
    "tests/core/toolkit/test_advantages.py",
    "tests/plugins/objectives/test_ppo_credit.py",
    "tests/plugins/objectives/test_ppo.py",
)
ROLLOUTS = "tests/plugins/rollouts"
GATHERED = "tests/plugins/shardings/test_gathered.py"
PACKED = "tests/core/test_batching.py::test_packed_samples_stand_one_after_the_other_and_each_counts_its_own_positions"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One broken line. what: the mistake, in words. file: below the root; holds `old` exactly once. tests: node ids."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "mean of means",
        "each micro-batch is divided by its own weight instead of the step's",
        "core/loomtune/stepping.py",
        "for engine, loss in run.losses(result, totals):",
        "for engine, loss in run.losses(\n"
        "                    result, {t: w * len(batches) for t, w in run.objective.weights(batch).items()}\n"
        "                ):",
        ("tests/core/test_loop.py::test_micro_batches_add_up_to_the_step",),
    ),
    Mutation(
        "mean per rank",
        "a step's weight is summed over this rank's micro-batches only",
        "core/loomtune/stepping.py",
        "run.world.sum([mine[term] for term in terms])",
        "[mine[term] for term in terms]",
        (f"{PARITY}[ddp on 3, micro-batches of 2]",),
    ),
    Mutation(
        "schedule off by one",
        "the first step asks the schedule for step 0",
        "core/loomtune/loop.py",
        "run.schedule.factor(run.step, run.steps)",
        "run.schedule.factor(run.step - 1, run.steps)",
        ("tests/core/test_loop.py::test_the_first_step_is_step_1_for_the_schedule",),
    ),
    Mutation(
        "void last step",
        "the way down ends a step too early, so that the last step learns nothing",
        "plugins/loomtune_plugins/schedules/warmup.py",
        "max(1, steps + 1 - warm)",
        "max(1, steps - warm)",
        ("tests/plugins/schedules/test_schedules.py",),
    ),
    Mutation(
        "guard ignored",
        "the optimizer steps whatever the guards say",
        "core/loomtune/stepping.py",
        "verdicts.append(self._judge(loss, math.hypot(*before)))\n"
        "                return verdicts[-1] is Verdict.CONTINUE",
        "verdicts.append(self._judge(loss, math.hypot(*before)))\n                return True",
        ("tests/core/test_loop.py::test_several_networks_take_a_step_together_or_not_at_all",),
    ),
    Mutation(
        "wet step",
        "what is computed before the first step changes the weights' optimizer",
        "core/loomtune/dry.py",
        "engine.step(0.0, 0.0, lambda norm: False)",
        "engine.step(0.0, 0.0, lambda norm: True)",
        ("tests/core/test_dry.py::test_a_dry_step_changes_nothing_to_the_bit",),
    ),
    Mutation(
        "time counted for the outer",
        "a phase in another leaves its time with that",
        "plugins/loomtune_plugins/trackers/usage/timeline.py",
        "self._stack[-1] if self._stack else OTHER",
        "self._stack[0] if self._stack else OTHER",
        ("tests/plugins/trackers/usage/test_timeline.py::test_a_phase_in_another_takes_its_time_from_it",),
    ),
    Mutation(
        "a queue taken for sleep",
        "a rank whose core is taken by another process seems to wait for its peers",
        "plugins/loomtune_plugins/trackers/usage/clocks.py",
        "wall - time.thread_time() - self._queued()",
        "wall - time.thread_time()",
        ("tests/plugins/trackers/usage/test_clocks.py",),
    ),
    Mutation(
        "prompts left out",
        "operations are counted of predicted tokens alone",
        "plugins/loomtune_plugins/trackers/usage/worth.py",
        "return cls(sum(sample.length for sample in samples), targets, sum(map(_squares, samples)))",
        "return cls(targets, targets, sum(map(_squares, samples)))",
        ("tests/plugins/trackers/usage/test_worth.py",),
    ),
    Mutation(
        "a trace too early",
        "recording begins in the middle of the step before",
        "plugins/loomtune_plugins/trackers/usage/tracing.py",
        "if begins and name in FIRST and self._between:",
        "if begins and name in FIRST:",
        ("tests/plugins/trackers/usage/test_tracing.py",),
    ),
    Mutation(
        "bad rows again",
        "a roll-back meets the rows again that led to it",
        "core/loomtune/loop.py",
        'self.feed.set({**before, "pending": None})',
        "self.feed.pending = []",
        ("tests/core/test_loop.py::test_a_roll_back_goes_on_from_the_checkpoint_with_rows_that_were_not_met",),
    ),
    Mutation(
        "data position forgotten",
        "a resumed run begins its data from the start",
        "core/loomtune/feed.py",
        'int(state.get("fetched", 0)), int(state.get("visited", 0))',
        "0, 0",
        ("tests/core/test_loop.py::test_a_resumed_run_goes_on_to_the_bit",),
    ),
    Mutation(
        "pending steps forgotten",
        "a checkpoint drops the steps that were rolled out and not yet trained on",
        "core/loomtune/feed.py",
        '"pending": pending, **place}',
        '"pending": [], **place}',
        ("tests/core/test_loop.py::test_steps_made_of_drawn_rows_survive_a_checkpoint_to_the_bit",),
    ),
    Mutation(
        "optimizer state forgotten",
        "a resumed run begins with fresh moments",
        "core/loomtune/keeper.py",
        "optimizer=True",
        "optimizer=False",
        ("tests/core/test_loop.py::test_a_resumed_run_goes_on_to_the_bit",),
    ),
    Mutation(
        "one order for all epochs",
        "every epoch visits the rows in the same order",
        "core/loomtune/order.py",
        '"order", *named, n, times',
        '"order", *named, times',
        ("tests/core/test_batching.py::test_epochs_and_seeds_have_orders_of_their_own",),
    ),
    Mutation(
        "shares cut down",
        "of a share that is no whole number of rows, an epoch visits too few, and no other makes up for it",
        "core/loomtune/order.py",
        "floor(epoch * self.visits)",
        "epoch * floor(self.visits)",
        ("tests/core/test_order.py::test_an_epoch_visits_each_source_as_often_as_its_share_comes_to_by_then",),
    ),
    Mutation(
        "packs begun anew",
        "a step of packed rows begins with its window, wherever the one before it ended",
        "core/loomtune/samplers.py",
        "at = starts.index(begin)",
        "at = 0",
        ("tests/core/test_samplers.py::test_packed_steps_see_every_row_once_an_epoch_and_fill_what_they_have",),
    ),
    Mutation(
        "shifted label",
        "a target is predicted from its own position",
        "core/loomtune/batching.py",
        "begin + at - 1)",
        "begin + at)",
        ("tests/core/test_batching.py::test_a_target_is_predicted_from_the_token_before_it",),
    ),
    Mutation(
        "answer after answer",
        "the second answer's first token is predicted from the end of the first answer, not of the prompt",
        "core/loomtune/batching.py",
        "np.where(at == 0, before, begin + at - 1)",
        "begin + at - 1",
        ("tests/core/test_batching.py::test_answers_go_on_from_the_end_of_their_prompt",),
    ),
    Mutation(
        "unequal micro-batches",
        "replicas get as many micro-batches as they have rows for, so that their collectives do not meet",
        "core/loomtune/placement.py",
        "placed[replica][turn] = Placement(tuple(tuple(numbers[j] for j in rows[row]) for row in group))",
        "placed[replica][turn] = Placement(tuple(tuple(numbers[j] for j in rows[row]) for row in group))\n"
        "    placed = [[one for one in mine if one.numbers] for mine in placed]",
        ("tests/core/test_batching.py::test_every_row_is_placed_once_in_equally_many_micro_batches",),
    ),
    Mutation(
        "lost EOS",
        "the end token is not learned, and the model never stops",
        "plugins/loomtune_plugins/objectives/encoding.py",
        "    encoded.end(tokenizer.eos_id)\n",
        "",
        (
            "tests/plugins/objectives/test_sft.py::test_a_completion_and_the_end_token_are_learned_and_the_prompt_is_not",
        ),
    ),
    Mutation(
        "prompt learned",
        "the prompt's tokens are targets too",
        "plugins/loomtune_plugins/objectives/encoding.py",
        'asked = Piece(text_of(row, "prompt") + separator, False)',
        'asked = Piece(text_of(row, "prompt") + separator, True)',
        (
            "tests/plugins/objectives/test_sft.py::test_a_completion_and_the_end_token_are_learned_and_the_prompt_is_not",
        ),
    ),
    Mutation(
        "samples see each other",
        "attention takes a row of several samples for one",
        "plugins/loomtune_plugins/kernels/masks.py",
        "return bool(follows.all() & rootless.all())",
        "return True",
        ("tests/plugins/kernels/test_sdpa.py::test_packed_samples_have_the_logits_of_separate_rows",),
    ),
    Mutation(
        "temperature ignored",
        "log-probabilities are those of temperature 1, whatever it was when sampling",
        "core/loomtune/toolkit/log_probs.py",
        "logits / temperature",
        "logits * 1.0",
        ("tests/core/toolkit/test_log_probs.py::test_chunks_give_the_values_and_gradients_of_the_whole",),
    ),
    Mutation(
        "head trained in vain",
        "an lm head that nobody reads is trained; its gradient never comes",
        "core/loomtune/toolkit/network.py",
        'if "lm" in self.spec.heads:',
        "if self.spec.heads:",
        ("tests/core/toolkit/test_network.py::test_a_head_that_nobody_reads_is_not_trained",),
    ),
    Mutation(
        "dropout by rank",
        "each rank draws masks of its own",
        "core/loomtune/toolkit/dropout.py",
        'derive(seed, "dropout", name)',
        'derive(seed, "dropout", name, torch.distributed.is_initialized() and torch.distributed.get_rank())',
        ("tests/runs/test_parity.py::test_dropout_and_lora_draw_alike_in_every_layout[ddp on 2]",),
    ),
    Mutation(
        "dropout by place",
        "masks belong to the place in the micro-batch, not to the sample",
        "core/loomtune/toolkit/dropout.py",
        "_mix64(batch.sample_numbers[batch.sample_of_segment])",
        "_mix64(batch.sample_of_segment)",
        ("tests/core/toolkit/test_dropout.py::test_masks_do_not_change_with_order_micro_batch_padding_or_packing",),
    ),
    Mutation(
        "measured with dropout",
        "evaluations leave dropout on",
        "plugins/loomtune_plugins/shardings/network_engine.py",
        "module.training = False",
        "module.training = True",
        (
            "tests/plugins/shardings/test_layouts.py::"
            "test_dropout_is_off_within_a_measurement_and_on_again_afterwards[single]",
        ),
    ),
    Mutation(
        "gradient not reduced",
        "DDP keeps every rank's gradients to itself",
        "plugins/loomtune_plugins/shardings/replicated.py",
        "if last or self.ddp is None:",
        "if self.ddp is None:",
        (f"{PARITY}[ddp on 3, micro-batches of 2]",),
    ),
    Mutation(
        "DDP averages",
        "gradients are averaged over ranks instead of summed",
        "plugins/loomtune_plugins/shardings/replicated.py",
        "lambda done: buffer)",
        "lambda done: buffer / dist.get_world_size())",
        (f"{PARITY}[ddp on 3, micro-batches of 2]",),
    ),
    Mutation(
        "FSDP averages",
        "gradients are averaged over shards instead of summed",
        "plugins/loomtune_plugins/shardings/sharded.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(float(self.mesh.size()))",
        (f"{PARITY}[fsdp on 2]",),
    ),
    Mutation(
        "norm of a shard",
        "the gradient norm, and with it the clipping, is that of this rank's part",
        "plugins/loomtune_plugins/shardings/norms.py",
        "for dimension in where[1]:",
        "for dimension in ():",
        (f"{PARITY}[fsdp on 2]",),
    ),
    Mutation(
        "no clipping",
        "optimizer.clip has no effect",
        "plugins/loomtune_plugins/shardings/network_engine.py",
        "if clip > 0:",
        "if clip < 0:",
        ("tests/plugins/shardings/test_layouts.py::test_the_norm_is_given_as_it_was_before_clipping",),
    ),
    Mutation(
        "norms decay",
        "weight decay pulls norms and biases to 0",
        "plugins/loomtune_plugins/shardings/groups.py",
        "parameter.ndim >= 2",
        "parameter.ndim >= 1",
        ("tests/plugins/shardings/test_groups.py::test_norms_and_biases_do_not_decay",),
    ),
    Mutation(
        "copies counted twice",
        "what tensor ranks hold whole counts once for each of them in the norm",
        "plugins/loomtune_plugins/shardings/norms.py",
        "if not place.is_replicate())",
        "if place is not None)",
        (f"{CUT}::test_gradients_and_their_norm_are_those_of_float64_on_one_process",),
    ),
    Mutation(
        "copies drift apart",
        "tensor ranks keep their own gradients of what both hold whole, which kernels may round differently",
        "plugins/loomtune_plugins/shardings/norms.py",
        "    dist.broadcast(flat, group=group, group_src=0)\n",
        "    dist.broadcast(flat.clone(), group=group, group_src=0)\n",
        (f"{CUT}::test_ranks_have_one_norm_and_equal_copies_where_kernels_round_differently[llama, biased]",),
    ),
    Mutation(
        "vocabulary the wrong way round",
        "the first tensor rank looks up the last one's rows of the embedding",
        "plugins/loomtune_plugins/shardings/tensor.py",
        "rows * mesh.get_local_rank()",
        "rows * (mesh.size() - 1 - mesh.get_local_rank())",
        (f"{CUT}::test_gradients_and_their_norm_are_those_of_float64_on_one_process",),
    ),
    Mutation(
        "part of an input's gradient",
        "a cut layer passes back this rank's part of its input's gradient for the whole",
        "plugins/loomtune_plugins/shardings/collectives.py",
        "_with_transpose(_same, _sum, tensor, group)",
        "_with_transpose(_same, _same, tensor, group)",
        (f"{CUT}::test_gradients_and_their_norm_are_those_of_float64_on_one_process",),
    ),
    Mutation(
        "two cuts joined in the wrong order",
        "a parameter cut over tensor and shard ranks is put together as if the shards had been cut first",
        "plugins/loomtune_plugins/shardings/sharded.py",
        "if other > i and cuts",
        "if other < i and cuts",
        (f"{CUT}::test_parts_cover_each_parameter_once_and_are_read_back_to_the_bit[llama, odd-4-settings0]",),
    ),
    Mutation(
        "every sequence rank's whole gradient",
        "the backward pass of the join gives each rank the sum over ranks of what all of them have already",
        "plugins/loomtune_plugins/shardings/sequence.py",
        "return gradient[index], None",
        "return gradient[index] * torch.distributed.get_world_size(), None",
        (f"{STRETCHES}::test_what_a_reader_makes_is_joined_and_its_gradients_add_up_over_ranks",),
    ),
    Mutation(
        "positions begin anew",
        "each stretch of a row counts its positions from 0",
        "plugins/loomtune_plugins/shardings/sequence.py",
        'for name in ("tokens", "positions", "segments")},\n',
        'for name in ("tokens", "segments")},\n            positions=whole.positions[:, :stretch].contiguous(),\n',
        (f"{STRETCHES}::test_stretches_put_side_by_side_are_the_rows",),
    ),
    Mutation(
        "masks of the first stretch",
        "every sequence rank draws the dropout masks of the row's first positions",
        "plugins/loomtune_plugins/shardings/stretches.py",
        "with dropout_keys(share.mine):",
        "with dropout_keys(replace(share.mine, positions=share.mine.positions - share.mine.positions[:, :1])):",
        ("tests/runs/test_sequence.py::test_dropout_and_lora_draw_alike_in_stretches[fsdp on 2, recomputed]",),
    ),
    Mutation(
        "keys for the wrong queries",
        "key and value heads that are fewer than ranks are repeated in another order than their queries",
        "plugins/loomtune_plugins/models/exchange.py",
        "tensor.repeat_interleave(times, 1)",
        "tensor.repeat(1, times, 1, 1)",
        (
            "tests/plugins/models/test_exchange.py::"
            "test_states_and_gradients_over_rows_that_are_cut_are_those_of_whole_rows",
        ),
    ),
    Mutation(
        "rows counted twice",
        "an evaluation adds up every rank's sums, also of ranks that share their rows",
        "plugins/loomtune_plugins/evaluators/heldout.py",
        "mine if run.world.counts else []",
        "mine",
        ("tests/runs/test_evaluation.py::test_the_held_out_loss_is_the_same_everywhere",),
    ),
    Mutation(
        "every rank counts",
        "ranks that share their rows all add them to the step's weight",
        "core/loomtune/assembly.py",
        "replicas=replicas, counts=counts)",
        "replicas=replicas)",
        ("tests/runs/test_sequence.py::test_rows_in_stretches_give_the_curve_of_one_process[ddp on 2]",),
    ),
    Mutation(
        "ZeRO averages",
        "stage 3 averages gradients, and nobody multiplies the loss",
        "plugins/loomtune_plugins/shardings/deepspeed_engine.py",
        "engine.zero_optimization_stage() == 3 else 1\n",
        "engine.zero_optimization_stage() > 3 else 1\n",
        ("tests/runs/test_zero.py::test_every_stage_gives_the_curve_of_one_process[stage 3-8]",),
    ),
    Mutation(
        "last step's gradient again",
        "ZeRO's buffer keeps the last step's gradients for parameters that the first micro-batch does not use",
        "plugins/loomtune_plugins/shardings/deepspeed_state.py",
        "        self.zero.grad_partitions_flat_buffer.zero_()  #",
        "        self.zero.grad_partitions_flat_buffer.abs()  #",
        (
            "tests/plugins/shardings/test_zero_engine.py::"
            "test_a_head_that_one_micro_batch_leaves_out_gets_nothing_of_the_step_before[stage 3]",
        ),
    ),
    Mutation(
        "padding not skipped",
        "a ZeRO rank looks for its part of a parameter right behind the one before, where that one's padding is",
        "plugins/loomtune_plugins/shardings/deepspeed_state.py",
        "                at += size\n",
        "                at += min(begin + size, numel) - begin\n",
        ("tests/runs/test_resume.py::test_any_checkpoint_resumes_anywhere[odd-fsdp on 2-zero 3 on 4]",),
    ),
    Mutation(
        "a row too early",
        "a part that begins within a row is taken to begin with it",
        "plugins/loomtune_plugins/shardings/flat.py",
        "first, last = -(-begin // row), end // row",
        "first, last = begin // row, end // row",
        ("tests/plugins/shardings/test_flat.py::test_the_boxes_of_every_stretch_hold_it_in_order",),
    ),
    Mutation(
        "nothing decays under ZeRO 3",
        "parameters are grouped after birth, when DeepSpeed has left them one dimension",
        "plugins/loomtune_plugins/shardings/zero_engine.py",
        "        self._materialise(config)\n",
        "        self._materialise(config)\n        self._name_parameters()\n",
        ("tests/runs/test_zero.py::test_every_stage_gives_the_curve_of_one_process[stage 3-8]",),
    ),
    Mutation(
        "packed positions go on",
        "a packed sample's positions go on from those of the one before it",
        "core/loomtune/batching.py",
        "np.arange(seen, seen + size)",
        "np.arange(column, column + size)",
        (PACKED,),
    ),
    Mutation(
        "one segment a row",
        "the samples of a packed row have one segment number, so that attention takes them for one",
        "core/loomtune/batching.py",
        "= segment.tokens, len(targets.parents)",
        "= segment.tokens, row",
        (PACKED,),
    ),
    Mutation(
        "probe sees nothing",
        "a run packs although the samples of a row see each other",
        "core/loomtune/probe.py",
        "for fault, count in zip(leaks, seen, strict=True) if count]",
        "for fault, count in zip(leaks, seen, strict=True) if count > run.world.size]",
        ("tests/core/test_probe.py::test_a_kernel_that_leaks_is_refused_with_the_cure",),
    ),
    Mutation(
        "answers deaf to their prompt",
        "answers share a prompt that an attention does not show them",
        "core/loomtune/probe.py",
        "deaf |= not bool((moved[owner == part] > rounding).any())",
        "deaf |= part == index and not bool((moved[owner == part] > rounding).any())",
        ("tests/core/test_probe.py::test_answers_that_see_each_other_or_not_their_prompt_do_not_share_it",),
    ),
    Mutation(
        "need ignored",
        "an adapter, objective or strategy starts without what it needs",
        "core/loomtune/plan.py",
        "    yield from _needs(entries)\n",
        "",
        (
            "tests/core/test_plan.py::test_a_need_that_nothing_chosen_provides_is_a_fault_that_says_how_to_find_it",
            "tests/plugins/commands/test_matrix.py::test_a_third_party_s_offers_are_in_it_under_its_own_vocabulary",
        ),
    ),
    Mutation(
        "world ignored in the matrix",
        "a cell is said to work although its strategy refuses the world or the model",
        "plugins/loomtune_plugins/commands/cells.py",
        "found = [finding for choice in choices for finding in choice.held]",
        "found: list[Finding] = []",
        ("tests/plugins/commands/test_matrix.py::test_a_world_that_does_not_divide_refuses_the_variants_that_need_it",),
    ),
    Mutation(
        "lost state taken for new",
        "a tensor of the optimizer that a checkpoint has lost is begun anew, in silence",
        "core/loomtune/checkpoint/reader.py",
        "kind = MissingTensorError if entry else CheckpointError",
        "kind = MissingTensorError",
        (
            "tests/core/checkpoint/test_resharding.py::"
            "test_state_that_was_still_to_be_made_is_told_from_state_that_is_lost",
        ),
    ),
    Mutation(
        "hole read as numbers",
        "a region of which a part was never saved is read as whatever memory held",
        "core/loomtune/checkpoint/reader.py",
        "if missing.any():",
        "if missing.all():",
        ("tests/core/checkpoint/test_resharding.py::test_a_region_that_nobody_saved_is_refused",),
    ),
    Mutation(
        "base exported",
        "an export holds the weights that the run began with",
        "core/loomtune/contracts/exporter.py",
        "self.fetch(name) if name in self.kept else self.source.read(name)",
        "self.source.read(name)",
        ("tests/runs/test_export.py::test_an_export_says_what_the_training_model_said",),
    ),
    Mutation(
        "heads not exported",
        "scalar heads that were trained are left out of the export",
        "core/loomtune/contracts/exporter.py",
        "[*shapes, *sorted(self.kept - shapes.keys())]",
        "list(shapes)",
        ("tests/runs/test_export.py::test_a_scalar_head_that_was_trained_is_exported_beside_the_model",),
    ),
    Mutation(
        "unproven export",
        "what left may be as far from what was trained as it likes",
        "core/loomtune/verify.py",
        "if not largest <= bound:",
        "if largest != largest:",
        (
            "tests/core/test_export_proof.py::test_a_wrong_merge_is_refused_and_leaves_nothing",
            "tests/core/test_export_proof.py::test_a_fault_of_writing_is_refused",
        ),
    ),
    Mutation(
        "unproven adapter",
        "an adapter that leaves alone may be anything",
        "plugins/loomtune_plugins/exporters/adapter.py",
        "return lambda module: trained.adapter.reopen(module, folder)",
        "return lambda module: None",
        (
            "tests/plugins/exporters/test_adapter.py::"
            "test_what_is_saved_otherwise_than_it_was_trained_is_refused_and_leaves_nothing",
        ),
    ),
    Mutation(
        "merge hidden by rounding",
        "a merge is compared only once it is rounded to bf16",
        "core/loomtune/verify.py",
        "if bound > EXACT:",
        "if bound > 1:",
        ("tests/core/test_export_proof.py::test_what_was_measured_is_written_and_said",),
    ),
    Mutation(
        "fp32 exported",
        "weights leave in fp32 whatever the base's type",
        "plugins/loomtune_plugins/exporters/huggingface.py",
        "rounds = wanted is not None",
        "rounds = bool(self._dtype)",
        ("tests/core/test_export_proof.py::test_weights_leave_in_the_types_in_which_the_base_stores_them",),
    ),
    Mutation(
        "swallowed save error",
        "a rank that could not write says nothing",
        "core/loomtune/checkpoint/saver.py",
        'report.error = f"rank {self.world.rank}: {type(error).__name__}: {error}"',
        "report.error = str()",
        (
            "tests/core/checkpoint/test_saving.py::test_an_error_of_one_thread_is_raised_on_every_rank_and_commits_nothing",
        ),
    ),
    Mutation(
        "no digest check",
        "a flipped bit in a checkpoint is read as if it were whole",
        "core/loomtune/checkpoint/folder.py",
        "if digest(path / name) != manifest.files[name]:",
        "if digest(path / name).bytes != manifest.files[name].bytes:",
        ("tests/core/checkpoint/test_integrity.py::test_a_flipped_bit_is_named_with_its_cure_on_every_rank",),
    ),
    Mutation(
        "old before new",
        "a step saved again removes the old folder before the new one has its name",
        "core/loomtune/checkpoint/folder.py",
        "        final.rename(aside)\n",
        "        _discard(final)\n",
        ("tests/core/checkpoint/test_kill.py::test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint_whole",),
    ),
    Mutation(
        "not on the disk",
        "files are not flushed before the folder gets its name: a power cut leaves a checkpoint of holes",
        "core/loomtune/checkpoint/files.py",
        "        file.flush()\n        os.fsync(file.fileno())\n",
        "        file.flush()\n",
        ("tests/core/checkpoint/test_saving.py::test_every_file_is_on_the_disk_before_its_folder_has_a_name",),
    ),
    Mutation(
        "lease ignored",
        "an attempt that was superseded still commits",
        "core/loomtune/checkpoint/saver.py",
        "            self.lease()\n",
        "",
        ("tests/core/checkpoint/test_saving.py::test_a_superseded_attempt_commits_nothing_on_any_rank",),
    ),
    Mutation(
        "unknown key accepted",
        "a mistyped setting is taken for a new one",
        "core/loomtune/compose/keys.py",
        "return parent not in AXIS_NAMES and mapping",
        "return True",
        ("tests/core/test_compose.py::test_all_mistakes_are_told_at_once",),
    ),
    Mutation(
        "duplicate accepted",
        "the second of two plugins that offer the same name wins in silence",
        "core/loomtune/catalogue.py",
        "if taken is not entry:",
        "if taken is None:",
        ("tests/core/test_catalogue.py::test_two_plugins_that_offer_the_same_are_both_named",),
    ),
    Mutation(
        "outer job's rank",
        "the environment of an outer job reaches the inner one",
        "launchers/loomtune_launchers/torchrun.py",
        "if not name.startswith(SCRUBBED) and name not in SCRUBBED_NAMES",
        "if not name.startswith(SCRUBBED)",
        ("tests/launchers/test_torchrun.py::test_what_an_outer_job_left_does_not_reach_the_inner_one",),
    ),
    Mutation(
        "the same rows always",
        "the rows whose answers the policy writes are the same places of every step",
        "plugins/loomtune_plugins/objectives/distill_on_policy.py",
        'derive(run.settings.seed, "on_policy", run.step, place)',
        'derive(run.settings.seed, "on_policy", place)',
        (f"{ON_POLICY}::test_which_rows_the_policy_answers_depends_on_seed_step_and_place_alone",),
    ),
    Mutation(
        "an end that is not learned",
        "the end token of an answer that the policy wrote is no target",
        "plugins/loomtune_plugins/objectives/written.py",
        "np.concatenate([before, np.ones(len(self.tokens), np.bool_)])",
        "np.concatenate([before, np.arange(len(self.tokens)) < len(self.tokens) - self.ended])",
        (f"{ON_POLICY}::test_an_answer_of_the_policy_is_learned_to_its_end_token_and_a_cut_one_has_none",),
    ),
    Mutation(
        "past the context",
        "a prompt near the end of the context is continued as far as any other",
        "plugins/loomtune_plugins/rollouts/generation.py",
        "return min(sampling.max_tokens, sampling.max_length - length) if",
        "return sampling.max_tokens if",
        (f"{ROLLOUTS}/test_engines.py::test_nothing_is_written_past_the_last_position_that_a_model_has",),
    ),
    Mutation(
        "chosen after the cut",
        "a drawn token's log-probability is told as if those that were cut off could not have been drawn",
        "plugins/loomtune_plugins/rollouts/noise.py",
        "chosen - tempered.logsumexp(-1)",
        "chosen - scores.logsumexp(-1)",
        (f"{ROLLOUTS}/test_noise.py::test_what_is_chosen_is_told_with_its_log_probability_before_any_cut",),
    ),
    Mutation(
        "another row's noise",
        "rows that stay in a batch go on with the keys of those that have left it",
        "plugins/loomtune_plugins/rollouts/generation.py",
        "[self.keys[i] for i in alive]",
        "self.keys[: len(alive)]",
        (f"{ROLLOUTS}/test_huggingface.py::test_rows_that_have_ended_leave_the_batch",),
    ),
    Mutation(
        "a copy that stays",
        "the whole weights that were generated from are kept until the next rollout",
        "plugins/loomtune_plugins/shardings/network_engine.py",
        'twin.to("meta")',
        "twin.eval()",
        (f"{GATHERED}::test_weights_are_gathered_once_for_a_rollout_of_any_length_and_let_go",),
    ),
    Mutation(
        "a thread in fp32",
        "continuous batching computes in a thread that knows nothing of autocast",
        "plugins/loomtune_plugins/rollouts/paged.py",
        "if torch.is_autocast_enabled(world.device.type):",
        "if torch.is_autocast_enabled(world.device.type) and not chosen:",
        (f"{ROLLOUTS}/test_continuous.py::test_another_thread_computes_in_the_type_of_this_one",),
    ),
    Mutation(
        "a state after the end",
        "the last advantage is bootstrapped from a value past the end of the response",
        "core/loomtune/toolkit/advantages.py",
        "later, following = 0.0, 0.0",
        "later, following = 0.0, float(values[-1]) if len(values) else 0.0",
        (f"{CREDIT}::test_nothing_is_bootstrapped_past_the_end",),
    ),
    Mutation(
        "variance of all",
        "advantages are whitened without Bessel's correction",
        "core/loomtune/toolkit/advantages.py",
        "numbers.var(ddof=1)",
        "numbers.var()",
        (f"{CREDIT}::test_whitened_numbers_have_bessels_variance_and_mean_0_or_their_own",),
    ),
    Mutation(
        "score at the start",
        "a completion's score comes with its first token",
        "plugins/loomtune_plugins/objectives/online/ppo_credit.py",
        "found[-1:] +=",
        "found[:1] +=",
        (f"{PPO_CREDIT}::test_the_score_comes_with_the_last_token_and_the_kl_with_its_own",),
    ),
    Mutation(
        "whitened one by one",
        "the advantages of each completion are whitened by themselves",
        "plugins/loomtune_plugins/objectives/online/ppo_credit.py",
        "_together(advantages) if whitens else",
        "[_together([one])[0] for one in advantages] if whitens else",
        (f"{PPO}::test_advantages_are_whitened_over_all_tokens_of_the_batch_and_returns_are_not",),
    ),
    Mutation(
        "the smaller error",
        "a value that leaves the reach of its rollout's counts by the smaller of its two errors",
        "plugins/loomtune_plugins/objectives/online/ppo_reading.py",
        "torch.maximum(free, held)",
        "torch.minimum(free, held)",
        (f"{PPO}::test_value_losses_are_the_recorded_ones",),
    ),
    Mutation(
        "the first coefficient again",
        "a run that goes on pays for its KL what the first batch did",
        "plugins/loomtune_plugins/objectives/online/ppo.py",
        'float(state.get("coefficient", self.beta))',
        "self.beta",
        (f"{PPO}::test_a_coefficient_that_adapts_is_used_first_and_moved_then_and_kept",),
    ),
    Mutation(
        "a value of noise",
        "a value head begins with drawn numbers",
        "core/loomtune/toolkit/network.py",
        "drawn = self.source.read(scored) if scored else torch.zeros(shape)",
        "drawn = self.source.read(scored) if scored else torch.randn(shape)",
        ("tests/core/toolkit/test_network.py::test_a_head_for_training_alone_begins_at_0",),
    ),
    Mutation(
        "worn for good",
        "what took the place of the policy's adapter stays there",
        "plugins/loomtune_plugins/shardings/network_engine.py",
        "self.load(lambda name, tensor, region: kept[_place(name, region)], optimizer=False)",
        "pass",
        ("tests/core/test_conformance.py::test_a_sharding_sums_and_goes_on_in_one_process[sharding=single]",),
    ),
    Mutation(
        "a head of noise",
        "a frozen head that no file holds is drawn at random",
        "core/loomtune/toolkit/network.py",
        "if self.spec.optimizer is None:\n            what",
        "if False:\n            what",
        ("tests/plugins/rewards/test_model.py::test_a_frozen_network_whose_files_have_no_head_is_refused",),
    ),
    Mutation(
        "scored at the stop",
        "an answer of a conversation is scored at its stop token, whatever rows have behind it",
        "plugins/loomtune_plugins/rewards/model.py",
        "return [*tokens, *self._tails[stop]]",
        "return tokens",
        ("tests/plugins/rewards/test_model.py",),
    ),
    Mutation(
        "the worst preferred",
        "of two completions the one with the lower reward is the chosen one",
        "plugins/loomtune_plugins/objectives/online/online_dpo.py",
        "all=[best, worst])",
        "all=[worst, best])",
        (
            "tests/plugins/objectives/test_online_dpo.py::test_the_best_completion_is_preferred_to_the_worst_of_its_prompt",
        ),
    ),
    Mutation(
        "markup of a model",
        "what a model wrote reaches the page as it is",
        "plugins/loomtune_plugins/page.py",
        'f"<td>{escape(cell)}</td>" for cell in row',
        'f"<td>{cell}</td>" for cell in row',
        ("tests/plugins/trackers/test_rollouts.py::test_the_page_shows_three_batches_with_curves_and_runs_nothing",),
    ),
    Mutation(
        "the adapter in its own reference",
        "an adapter of the head stays on where the reference's distribution is read",
        "plugins/loomtune_plugins/objectives/side_by_side.py",
        "with self._view.bare():",
        "if self._view:",
        ("tests/plugins/losses/test_kl_runs.py::test_an_adapter_of_the_head_is_off_where_the_reference_is_read",),
    ),
    Mutation(
        "zero times infinity",
        "DiscoPOP's blend and its exponential are computed apart: one is 0 where the other overflows",
        "plugins/loomtune_plugins/losses/margins.py",
        "(log_sigmoid(logits / width) - logits).clamp(max=80.0).exp()",
        "(logits / width).sigmoid() * (-logits).exp()",
        ("tests/plugins/losses/test_formulas.py::test_nothing_overflows_in_fp32",),
    ),
    Mutation(
        "a start that no checkpoint holds",
        "weights decay to where the attempt began, instead of where the run did",
        "plugins/loomtune_plugins/optimizers/adamw.py",
        "return {**moments, **self.starts()}",
        "return moments",
        ("tests/plugins/optimizers/test_decay_to_start_runs.py::test_a_run_goes_on_to_the_bit",),
    ),
    Mutation(
        "a stale reference",
        "what a reference said is taken for another model's",
        "core/loomtune/assembly.py",
        "made_of.append(model.fingerprint())",
        "made_of.append(model.family)",
        (f"{RECORDS}::test_other_weights_data_templates_and_lengths_are_other_records",),
    ),
    Mutation(
        "each rank leaves alone",
        "a rank that is asked to leave while frozen roles are read, or in an evaluation, does not ask the others",
        "core/loomtune/run.py",
        "self.world.total([self.stop.requested])[0]",
        "self.stop.requested",
        (f"{RECORDS}::test_ranks_leave_together_where_one_of_them_is_asked",),
    ),
    Mutation(
        "damage taken for numbers",
        "a part of what is read once is believed whatever its digest says",
        "core/loomtune/records.py",
        'hashlib.file_digest(file, "sha256").digest() == meant',
        "bool(meant)",
        (f"{RECORDS}::test_a_damaged_part_is_noticed_and_made_again",),
    ),
    Mutation(
        "numbers in the order of computing",
        "what is read once is kept in the order in which micro-batches gave it",
        "core/loomtune/reading.py",
        "found[np.lexsort((part, owner))]",
        "found",
        (
            f"{RECORDS}::test_each_target_has_what_the_policy_says_of_it_before_the_first_step",
            f"{RECORDS}::test_targets_stand_in_the_order_of_their_segments_however_a_tree_is_unfolded",
        ),
    ),
    Mutation(
        "the adapter in what is stored",
        "a stored reference has the policy's adapter on",
        "core/loomtune/assembly.py",
        "adapter=self.adapter.saves_base, trained=False",
        "adapter=True, trained=False",
        (f"{RECORDS}::test_with_an_adapter_the_base_is_what_is_stored",),
    ),
    Mutation(
        "the rest counts all",
        "the class beside a teacher's top k has the mass of the whole vocabulary",
        "plugins/loomtune_plugins/objectives/distill_top_k.py",
        "logits.scatter(-1, ids, NOTHING).logsumexp(-1, keepdim=True)",
        "logits.logsumexp(-1, keepdim=True)",
        ("tests/plugins/objectives/test_distill_top_k.py::test_all_tokens_but_the_likeliest_count_together",),
    ),
    Mutation(
        "an infinite score is learned from",
        "any float that a function gives is a score",
        "plugins/loomtune_plugins/rewards/workers/worker.py",
        "if not math.isfinite(number):",
        "if math.isnan(number):",
        (
            "tests/plugins/rewards/test_workers.py::"
            "test_an_answer_that_cannot_be_scored_says_why_and_takes_no_other_with_it",
        ),
    ),
    Mutation(
        "what a worker started outlives it",
        "only the worker's own group is killed",
        "plugins/loomtune_plugins/rewards/workers/worker.py",
        "for process in _descendants(os.getpid()):",
        "for process in ():",
        ("tests/plugins/rewards/test_workers.py::test_what_an_answer_started_ends_with_the_workers",),
    ),
    Mutation(
        "scores of other ranks in the wrong places",
        "ranks' shares are laid one behind the other",
        "plugins/loomtune_plugins/rewards/scored.py",
        "scores[rank :: world.size] = part",
        "scores[rank * len(part) : (rank + 1) * len(part)] = part",
        ("tests/plugins/rewards/test_scored.py::test_every_rank_scores_a_share_and_all_have_the_whole",),
    ),
    Mutation(
        "a reward that fails trains on nothing",
        "a batch without any score is none to end the run for",
        "plugins/loomtune_plugins/rewards/scored.py",
        "if failures and self._lost >= PATIENCE:",
        "if failures and self._lost >= 1000 * PATIENCE:",
        ("tests/plugins/rewards/test_scored.py::test_a_reward_that_never_scored_anything_ends_the_run_at_once",),
    ),
    Mutation(
        "a query's order never counts",
        "rows of a query compare as a multiset whatever was asked",
        "plugins/loomtune_plugins/rewards/sql.py",
        "ordered=is_ordered(gold)",
        "ordered=False",
        ("tests/plugins/rewards/test_sql.py::test_order_counts_where_the_right_query_asks_for_it",),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the mutations; 1 if any survives, 2 if something else was wrong."""
    options = _parser().parse_args(arguments)
    if options.write:
        write_table(options.write)
        return 0
    chosen = [mutation for mutation in MUTATIONS if not options.only or mutation.name in options.only]
    if unknown := set(options.only) - {mutation.name for mutation in chosen}:
        print(f"there is no mutation called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="loomtune-mutations-") as folder:
        whole = Path(folder) / "whole"
        copy(ROOT, whole)
        if misfits := [text for mutation in chosen if (text := misfit(whole, mutation))]:
            print("\n".join(misfits), file=sys.stderr)
            return 2
        if trouble := unbroken(whole, chosen):
            print(f"without any mutation the tests do not pass:\n{trouble}", file=sys.stderr)
            return 2
        with ThreadPoolExecutor(options.jobs) as pool:
            tried = pool.map(lambda item: attempt(whole, Path(folder) / str(item[0]), item[1]), enumerate(chosen))
            verdicts = {}
            for mutation, verdict in zip(chosen, tried, strict=True):
                verdicts[mutation.name] = verdict
                print(f"{verdict:10} {mutation.name}: {mutation.what}", flush=True)
    survived = [name for name, verdict in verdicts.items() if verdict != "noticed"]
    print(f"{len(verdicts) - len(survived)} of {len(verdicts)} mutations were noticed by their tests")
    return 1 if survived else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="try this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many at a time")
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the table in this file and try nothing")
    return parser


def unbroken(folder: Path, chosen: Sequence[Mutation]) -> str:
    """What is wrong with the tests of an unchanged copy; empty where all of them pass and none is skipped."""
    code, said = run(folder, sorted({test for mutation in chosen for test in mutation.tests}))
    if code == 0 and " skipped" not in summary(said):
        return ""
    return said[-4000:]


def attempt(whole: Path, folder: Path, mutation: Mutation) -> str:
    """`noticed` where a test failed because of the mutation; otherwise what happened instead."""
    copy(whole, folder)
    try:
        (folder / mutation.file).write_text(broken(folder, mutation))
        code, said = run(folder, mutation.tests)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if code == 1 and "failed" in summary(said) and "error" not in summary(said) and not unrelated(said):
        return "noticed"
    return {0: "SURVIVED", -1: "HUNG"}.get(code, "INVALID")


def broken(root: Path, mutation: Mutation) -> str:
    """The file's text with its one place replaced. Raises ValueError where there is none, or several."""
    text = (root / mutation.file).read_text()
    if (found := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} holds `{mutation.old}` {found} times, not once")
    changed = text.replace(mutation.old, mutation.new)
    compile(changed, mutation.file, "exec")
    return changed


def misfit(root: Path, mutation: Mutation) -> str:
    """Why a mutation cannot be made; empty where it can."""
    try:
        broken(root, mutation)
    except (ValueError, SyntaxError, OSError) as error:
        return str(error)
    return ""


def copy(source: Path, folder: Path) -> None:
    """Everything that the tests need, without what was compiled."""
    for name in (*ROOTS, "tests"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", folder)


def run(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code of pytest in a copy, -1 where it hangs, and what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(folder / name) for name in ROOTS),
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant of the same size and second would be taken for the original
        "LOOMTUNE_SHARED": os.environ.get("LOOMTUNE_SHARED", str(ROOT.parent / "shared")),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    check_imports(folder, environment)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=PATIENCE + 60 * len(tests))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return -1, process.communicate()[0]
    return process.returncode, said


def check_imports(folder: Path, environment: dict[str, str]) -> None:
    """The copy is what is imported, and not the installed package."""
    code = "import loomtune, loomtune_plugins, loomtune_launchers as l; "
    code += "print(loomtune.__file__, loomtune_plugins.__file__, l.__file__, sep='\\n')"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(Path(line).is_relative_to(folder) for line in found.split()), found


def summary(said: str) -> str:
    """pytest's last line."""
    return said.rstrip().rpartition("\n")[2]


def unrelated(said: str) -> bool:
    """True where a test failed because the mutant is no program, rather than a wrong one."""
    return bool(re.search(r"^E +(ImportError|ModuleNotFoundError|SyntaxError|NameError)", said, re.MULTILINE))


def table() -> str:
    """The mutations as Markdown."""
    lines = ["| mutation | what breaks | where | the test that notices |", "|---|---|---|---|"]
    for mutation in MUTATIONS:
        tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in mutation.tests)
        where = mutation.file.partition("/")[2]
        lines.append(f"| {mutation.name} | {mutation.what} | `{where}` | {tests} |")
    return "\n".join(lines) + "\n"


def write_table(path: Path) -> None:
    """Renews what stands between the two marks of a file."""
    begin, end = MARKS
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}{table()}{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
