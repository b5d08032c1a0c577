"""A model of this machine, asked through loomtune's own parts: its model, engine and rollout plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loomtune.catalogue import installed
from loomtune.contracts import EngineSpec, Model, Rollout, Sampling, Tokenizer
from loomtune.errors import UserError
from loomtune.seeds import derive
from loomtune_plugins.endpoint.asking import Ask, Done, Gate, Reply, Source
from loomtune_plugins.endpoint.prompts import Prompts, prompts
from loomtune_plugins.endpoint.replies import Unusable, options
from loomtune_plugins.endpoint.settings import EndpointSettings
from loomtune_plugins.endpoint.turns import ended

if TYPE_CHECKING:
    from loomtune.contracts import Role
    from loomtune.world import World


class Local(Source):
    """In this process, in fp32. What is drawn depends on the question and its `draw` alone, never on its company."""

    def __init__(self, settings: EndpointSettings, prefix: str) -> None:
        self._settings, self._prefix = settings, prefix

    def check(self) -> None:
        try:
            self._model.check()
            self._tokenizer  # noqa: B018 - a template that does not suit is told
        except UserError as error:
            told = "; ".join(fault.what for fault in error.faults)
            cure = f"set {self._prefix}.model to a folder, or {self._prefix}.url to where it is served"
            raise UserError.of(f"{self._prefix}.model={self._settings.model}: {told}", cure) from error

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    @cached_property
    def _identity(self) -> Mapping[str, Any]:
        return {"weights": self._model.fingerprint(), "tokenizer": self._tokenizer.fingerprint}

    def request(self, ask: Ask) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": self._said(ask)}
        if not ask.options:
            asked |= {"max_tokens": ask.max_tokens, "temperature": ask.temperature, "top_p": ask.top_p}
        return asked

    def memory(self) -> int:
        """torch and transformers, and the weights in fp32 twice, since they are read while they are laid out."""
        import math

        return (600 << 20) + 8 * sum(math.prod(shape) for shape in self._model.stored().values())

    def answer(self, asks: Sequence[Ask], done: Done, gate: Gate) -> None:
        """Texts of one kind at a time, `batch` of them: what is done is told, and kept, before the next are begun."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, ask in enumerate(asks):
            kinds.setdefault((ask.options, ask.max_tokens, ask.temperature, ask.top_p), []).append(number)
        for numbers in kinds.values():
            numbers.sort(key=lambda number: len(self._tokens(asks[number])))
            for start in range(0, len(numbers), self._settings.batch):
                gate()
                chosen = numbers[start : start + self._settings.batch]
                made = self._chosen if asks[chosen[0]].options else self._written
                for number, reply in zip(chosen, made([asks[number] for number in chosen]), strict=True):
                    done(number, reply)

    def _written(self, asks: Sequence[Ask]) -> list[Reply]:
        first = asks[0]
        sampling = Sampling(
            max_tokens=first.max_tokens,
            max_length=self._model.context(),
            temperature=first.temperature,
            top_p=first.top_p,
            stop=self._tokenizer.stops,
        )
        prompts = [self._tokens(ask) for ask in asks]
        keys = [derive("endpoint", ask.draw, self._said(ask)) for ask in asks]
        made = self._rollout.generate(self._role, prompts, keys, sampling, self._world)
        return [self._reply(prompt, one.tokens) for prompt, one in zip(prompts, made, strict=True)]

    def _reply(self, prompt: Sequence[int], tokens: Sequence[int]) -> Reply:
        stops, counts = self._tokenizer.stops, (len(prompt), len(tokens))
        text = ended(self._tokenizer.decode([token for token in tokens if token not in stops]))
        if text:
            return Reply(text=text, ended=tokens[-1] in stops, tokens=counts)
        full = f"{len(prompt)} tokens leave no room for an answer" if not tokens else "an empty answer came"
        return Reply(failed=full, refused=True, tokens=counts)

    def _chosen(self, asks: Sequence[Ask]) -> list[Reply]:
        """Of each the log-probabilities of its options, over all tokens that spell them."""
        import torch

        replies = []
        role = self._role
        for ask in asks:  # one by one: padding would move a last place, and answers are a token long
            prompt = self._tokens(ask)
            if len(prompt) >= self._model.context():
                replies.append(Reply(failed=f"{len(prompt)} tokens leave no room for an answer", refused=True))
                continue
            with role.engine.evaluating(), role.engine.gathered() as module, torch.no_grad():
                tokens = torch.tensor([prompt], device=self._world.device)
                logits = module(input_ids=tokens).logits[0, -1].float()
            values = logits.log_softmax(-1)
            shown = [(option, float(values[token])) for option in ask.options for token in self._spelt(option)]
            try:
                replies.append(Reply(log_probs=options(shown, ask.options), tokens=(len(prompt), 1)))
            except Unusable as error:
                replies.append(Reply(failed=str(error), refused=True))
        return replies

    def _spelt(self, option: str) -> list[int]:
        """Tokens that are an option, blanks and brackets aside. Raises UserError where none is."""
        found = self._spellings.get(option, [])
        if not found:
            what = f"{self._prefix}.model={self._settings.model} has no token that is {option}"
            raise UserError.of(what, "ask another model")
        return found

    @cached_property
    def _spellings(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for token in range(self._model.vocabulary()):
            text = self._tokenizer.decode([token]).strip(" \n\t()")
            if len(text) == 1:
                found.setdefault(text, []).append(token)
        return found

    def _said(self, ask: Ask) -> str:
        """The prompt as people can read it, with its special tokens."""
        return self._tokenizer.decode(self._tokens(ask), special=True)

    def _tokens(self, ask: Ask) -> list[int]:
        return self._prompts(ask)

    @cached_property
    def _prompts(self) -> Prompts:
        return prompts(self._settings.model, self._settings.api, self._tokenizer)

    @cached_property
    def _model(self) -> Model:
        chosen = {"path": self._settings.model, "chat_template": self._settings.chat_template}
        model: Model = installed().build("model", "huggingface", chosen)
        if self._settings.api == "chat" and not model.tokenizer().template:
            model = installed().build("model", "huggingface", {**chosen, "chat_template": "plain"})
        return model

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._model.tokenizer()

    @cached_property
    def _rollout(self) -> Rollout:
        engine: Rollout = installed().build("rollout", "huggingface", {"batch": self._settings.batch})
        return engine

    @cached_property
    def _world(self) -> World:
        import torch

        from loomtune.world import World

        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return World(0, 1, 0, device)

    @cached_property
    def _role(self) -> Role:
        """The model as a frozen policy of one process."""
        from loomtune.contracts import Role

        catalogue = installed()
        spec = EngineSpec(
            model=self._model,
            adapter=catalogue.build("adapter", "full", {}),
            kernel=catalogue.build("kernel", "sdpa", {}),
            optimizer=None,
            precision="fp32",
            seed=0,
        )
        engine = catalogue.build("sharding", "single", {}).engine(spec, self._world)
        return Role("policy", engine, trained=False)
