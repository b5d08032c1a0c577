"""Learning from what the policy itself writes, once it is scored. `experience.Online` is what they have in common."""
