"""What a run uses: time by phase, waiting, the model's operations, memory, and traces (`docs/measuring.md`)."""
