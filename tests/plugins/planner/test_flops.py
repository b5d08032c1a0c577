"""Operations of a step, by hand and by published figures."""

import pytest

from loomtune_plugins.planner.flops import Shape, mean_length, model_flops_per_token, step_flops, utilisation
from loomtune_plugins.planner.trace import Peak, Trace, Work

LLAMA3_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
NEVER = Peak(0, {})


def llama(*, layers=32, width=4096, wide=14336, keys=1024, vocabulary=128256):
    """Names and shapes of a Llama's parameters."""
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(layers):
        of = f"model.layers.{layer}."
        shapes |= {of + f"self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {of + f"self_attn.{name}_proj.weight": (keys, width) for name in "kv"}
        shapes |= {of + f"mlp.{name}_proj.weight": (wide, width) for name in ("gate", "up")}
        shapes |= {of + "mlp.down_proj.weight": (width, wide)}
        shapes |= {of + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes


def trace(*work, tokens=0, parameters=(0, 0, 0)):
    return Trace(0, 1, 1, {"forward": NEVER}, {}, {}, (), work, tokens, tokens, 1, parameters)


def test_llama_3_8b_has_as_many_parameters_as_its_card_says_and_6n_of_those_that_multiply():
    shape = Shape.of(llama(), None, LLAMA3_8B)

    assert shape.total == 8_030_261_248  # meta-llama/Meta-Llama-3-8B, model.safetensors.index.json
    assert shape.body + shape.head == 8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096
    assert model_flops_per_token(shape, 0) == 6 * (shape.body + shape.head) == pytest.approx(45.0e9, rel=2e-3)


def test_palm_s_own_example_comes_out_as_its_appendix_prints_it():
    # Table 11: PaLM 540B, 238.3 K tokens/s on 6144 chips of 275 TFLOP/s: 46.2 %, and 45.7 % without attention.
    shape = Shape(0, 0, 0, 0, total=540_350_000_000, trained=540_350_000_000, layers=118, width=48 * 256)

    used = {
        length: utilisation(238_300 * model_flops_per_token(shape, length, convention="mfu_palm"), 1, 6144, 275e12)
        for length in (0, 2048)
    }

    assert used[0] == pytest.approx(0.457, abs=5e-4)
    assert used[2048] == pytest.approx(0.462, abs=5e-4)


def test_attention_counts_the_causal_half_in_one_convention_and_the_square_in_the_other():
    shape = Shape.of(llama(), None, LLAMA3_8B)

    def of_attention(convention):
        with_it, without = (model_flops_per_token(shape, length, convention=convention) for length in (8192, 0))
        return with_it - without

    assert of_attention("mfu_palm") == 12 * 32 * 4096 * 8192
    assert of_attention("mfu") == of_attention("mfu_palm") / 2


def test_a_frozen_base_costs_four_operations_in_place_of_six():
    shapes = llama() | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": (16, 4096)}
    adapters = [name for name in shapes if "lora" in name]

    shape = Shape.of(shapes, adapters, LLAMA3_8B)
    frozen = shape.body + shape.head - 16 * 4096

    assert model_flops_per_token(shape, 0) == 4 * frozen + 6 * 16 * 4096
    assert model_flops_per_token(shape, 0, forward_only=True) == 2 * frozen + 2 * 16 * 4096


def test_only_targets_meet_the_head():
    shape = Shape.of(llama(), None, LLAMA3_8B)

    assert model_flops_per_token(shape, 0, targets=0.25) == 6 * (shape.body + shape.head / 4)


def test_a_tied_embedding_is_counted_once_as_the_head():
    shapes = llama()
    del shapes["lm_head.weight"]

    assert Shape.of(shapes, None, LLAMA3_8B).head == 128256 * 4096


def test_a_token_meets_the_experts_that_it_is_sent_to():
    config = LLAMA3_8B | {"num_local_experts": 8, "num_experts_per_tok": 2}
    shapes = {"model.layers.0.mlp.experts.down_proj": (8, 100, 10), "model.layers.0.mlp.gate.weight": (8, 10)}

    assert Shape.of(shapes, None, config).body == 2 * 100 * 10 + 8 * 10


def test_a_token_s_row_is_on_average_longer_than_the_average_row():
    assert mean_length([10, 30]) == 25
    assert mean_length([]) == 0


def test_a_trace_and_a_shape_agree_and_recomputation_counts_in_hfu_alone():
    # One block of 3 heads of width 4 and matmuls of 600 parameters, 2 rows of 16 tokens, computed again once.
    tokens, square = 32, 2 * 3 * 16 * 16 * 4
    forward = Work("matmul", "bf16", "forward", (1, 32, 20, 30), 2 * 600 * tokens, 0)
    again = Work("matmul", "bf16", "backward", (1, 32, 20, 30), 2 * 600 * tokens, 0, again=True)
    backward = Work("matmul", "bf16", "backward", (1, 32, 30, 20), 2 * 600 * tokens, 0, count=2)
    flash = Work("attention", "bf16", "forward", (6, 16, 16, 4, 1), 2 * square, 0)
    flash_backward = Work("attention", "bf16", "backward", (6, 16, 16, 4, 1), 5 * square, 0)
    shape = Shape(600, 0, 600, 0, 700, 700, layers=1, width=12)

    seen = step_flops(trace(forward, again, backward, flash, flash_backward, tokens=tokens, parameters=(700, 700, 700)))

    for convention in ("mfu", "mfu_palm"):
        assert seen[convention] == tokens * model_flops_per_token(shape, 16, convention=convention)
    assert seen["hfu"] == tokens * 2 * 600 * 4 + 7 * square


def test_ranks_that_share_rows_share_their_operations_too():
    alone, shared = (step_flops(trace(tokens=100, parameters=(10, 10, 10)), shared)["mfu_palm"] for shared in (1, 4))

    assert shared == alone / 4
