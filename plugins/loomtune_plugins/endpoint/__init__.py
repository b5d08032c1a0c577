"""Language models as a source of data and of judgement: any OpenAI-compatible service, or a model of this machine.

`opened(settings, prefix)` gives a `Client`; `client.answer(asks)` a reply to each. Whatever fails is tried again within
limits or told, every answer is kept on the disk, and importing this imports no torch.
"""

from loomtune_plugins.endpoint.asking import Ask, Message, Reply
from loomtune_plugins.endpoint.client import Client, opened
from loomtune_plugins.endpoint.settings import EndpointSettings
from loomtune_plugins.endpoint.turns import told

__all__ = ["Ask", "Client", "EndpointSettings", "Message", "Reply", "opened", "told"]
