"""ZeRO's settings as DeepSpeed reads them."""

from __future__ import annotations

from typing import Any

from loomtune_plugins.shardings.settings import ZeroSettings

Configuration = dict[str, Any]


def configuration(settings: ZeroSettings, precision: str, device: str) -> Configuration:
    """What DeepSpeed is told; clipping, accumulation and the schedule are not left to it."""
    numbers = settings.bucket_mb * 2**20 // 4
    place = {"device": "nvme", "nvme_path": settings.nvme} if settings.nvme else {"device": "cpu"}
    offload = {**place, "pin_memory": device != "cpu"}
    zero: Configuration = {
        "stage": settings.stage,
        "overlap_comm": device != "cpu",
        "reduce_bucket_size": numbers,
        "allgather_bucket_size": numbers,
        "stage3_prefetch_bucket_size": numbers,
        "stage3_param_persistence_threshold": settings.persist,
        "memory_efficient_linear": False,  # would replace torch's for the whole process, and for ever
    }
    if settings.offload != "none":
        zero["offload_optimizer"] = offload
    if settings.offload == "all":
        zero["offload_param"] = offload
    if settings.stage < 3 and settings.offload == "none":
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,  # said, never used
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,  # otherwise 1
        "gradient_allreduce_op": "mean" if settings.stage == 3 else "sum",  # stage 3 can only average
        "zero_force_ds_cpu_optimizer": False,
    }
