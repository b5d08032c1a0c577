"""Settings of the attention back-ends."""

from dataclasses import dataclass


@dataclass
class SDPASettings:
    """torch's scaled dot-product attention: nothing to set."""
