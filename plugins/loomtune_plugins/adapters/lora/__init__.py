"""LoRA and its family, on a plain base or on one of four bits."""
