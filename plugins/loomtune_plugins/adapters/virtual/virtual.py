"""What prompt tuning, P-tuning and prefix tuning have in common: they wrap no layer and lead each sample instead."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loomtune.contracts import Adapter, Batch, Model, WeightSource
from loomtune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loomtune_plugins.adapters.virtual.woven import Woven
    from loomtune_plugins.adapters.wrapped.woven import Added

BASE, ENCODER = "base.", "encoder."
"""How names of the woven module begin: of the model as it was, and of peft's encoder of virtual tokens."""


class Virtual(Adapter):
    """Trains peft's encoder of virtual tokens and leaves the model as it is, in every bit.

    A method says by which config of peft, and how what the encoder makes reaches the model: in training by `inputs`, in
    generation by `lead`. peft's files hold what the encoder makes, not the encoder: checkpoints keep that.
    """

    saves_base = False

    def __init__(self, length: int) -> None:
        self.virtual_tokens = length
        self._config: Any = None

    @abstractmethod
    def config(self, **more: Any) -> Any:
        """peft's config of the method. more: what every config of peft takes."""

    @abstractmethod
    def encoder(self, config: Any) -> nn.Module:
        """peft's encoder, on the current device, for a config that knows the model's sizes."""

    def first(self, woven: Woven, part: str, shape: tuple[int, ...], base: WeightSource, seed: int) -> Tensor:
        """First values, whole and in fp32, of a parameter of the encoder: those of torch's layers, drawn by the seed.

        shape: of the whole, which parameters that lie in parts no longer have.
        """
        from loomtune_plugins.adapters.virtual import weights as virtual_weights

        return virtual_weights.drawn(woven.encoder, part, shape, seed)

    def prepare(self, woven: Woven) -> None:
        """What a method does to the woven module, once."""
        return

    @abstractmethod
    def lead(self, woven: Woven, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the model that generates, with what stands before each row."""

    def suits(self, model: Model) -> None:
        if (context := model.context()) <= self.virtual_tokens:
            raise UserError.of(
                f"adapter.length={self.virtual_tokens} leaves no room in the model's context of {context} tokens",
                f"set adapter.length to less than {context}",
            )

    def weave(self, module: nn.Module, weights: WeightSource, seed: int) -> tuple[nn.Module, WeightSource]:
        """Freezes the model and puts the encoder beside it."""
        from loomtune_plugins.adapters.virtual.woven import Woven, fitted
        from loomtune_plugins.adapters.wrapped.woven import Added, Names, WovenWeights
        from loomtune_plugins.adapters.wrapped.wrapping import quiet

        quiet()
        self._config = fitted(self.config(), module)
        with next(module.parameters()).device:
            woven = Woven(module.requires_grad_(False), self.encoder(self._config), self.virtual_tokens)
        self.prepare(woven)
        woven.before_calls(self.lead)
        found = Names()
        for name in woven.state_dict():
            if (part := name.removeprefix(ENCODER)) != name:
                found.added[name] = Added("", part)
            else:
                found.base[name] = name.removeprefix(BASE)

        def first(name: str, added: Added, shape: tuple[int, ...]) -> Tensor:
            return self.first(woven, added.part, shape, weights, seed)

        return woven, WovenWeights(weights, woven, found, first)

    def base(self, module: nn.Module) -> nn.Module:
        """The model beside the encoder."""
        return module.get_submodule(BASE.rstrip("."))

    @contextmanager
    def off(self, module: nn.Module) -> Iterator[None]:
        """Nothing stands before a sample."""
        woven: Any = module
        before, woven.on = woven.on, False
        try:
            yield
        finally:
            woven.on = before

    @abstractmethod
    def inputs(
        self, module: nn.Module, batch: Batch, attention: Callable[[Batch], Mapping[str, Any]]
    ) -> tuple[Batch, Mapping[str, Any]]: ...

    def base_name(self, name: str) -> str | None:
        """Without `base.`; None for the encoder's."""
        return None if name.startswith(ENCODER) else name.removeprefix(BASE)

    def learning_rate_scale(self, name: str) -> float:
        """The same rate for all."""
        return 1.0

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Refuses: no weight of the model does what virtual tokens do."""
        raise UserError.of(
            "virtual tokens cannot be merged into the model's weights",
            "`loomtune export RUN --to adapter` writes them beside it",
        )

    def save(self, folder: Path, tensors: Iterator[tuple[str, Tensor]], base: str) -> None:
        """Writes `adapter_model.safetensors` and `adapter_config.json`, which `PeftModel.from_pretrained` opens."""
        import torch
        from safetensors.torch import save_file

        from loomtune_plugins.adapters.virtual.woven import made

        assert self._config is not None, "the model's sizes are known once a skeleton is woven"
        ours = {name.removeprefix(ENCODER): tensor.cpu() for name, tensor in tensors if name.startswith(ENCODER)}
        encoder = self.encoder(self._config)
        encoder.load_state_dict(ours)
        with torch.no_grad():
            vectors = made(encoder, self.virtual_tokens, torch.device("cpu"))[0].contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"prompt_embeddings": vectors}, folder / "adapter_model.safetensors")
        config = self.config(inference_mode=True)
        for key in config.__dataclass_fields__.keys() & SIZES:
            setattr(config, key, getattr(self._config, key))
        config.base_model_name_or_path = base
        config.save_pretrained(str(folder))

    def reopen(self, module: nn.Module, folder: Path) -> Callable[[Tensor], Tensor] | None:
        """By `PeftModel.from_pretrained`."""
        from loomtune_plugins.adapters.wrapped.opened import by_peft

        return by_peft(module, folder)


SIZES = frozenset(
    {"token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "encoder_hidden_size"}
)
"""What peft reads off the model's config, and needs to open a file."""


def check_length(length: int) -> None:
    """Raises UserError for a number of virtual tokens that is none."""
    if length < 1:
        raise UserError.of(f"adapter.length={length} would train nothing", "set adapter.length to at least 1")


def check_width(width: int) -> None:
    """Raises UserError for an inner width that is none."""
    if width < 0:
        raise UserError.of(f"adapter.width={width} is no width", "set adapter.width to a whole number; 0: the model's")
