"""What a node's agent keeps of its ranks, and how they are watched."""
