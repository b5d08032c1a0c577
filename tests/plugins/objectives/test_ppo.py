"""PPO's losses against their formulas written once more in fp64, its credit, and what it keeps from batch to batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loomtune import api
from loomtune.batching import collate
from loomtune.contracts import Answer, Batch, Drawn, Objective, Role, Sample, Segment
from loomtune.errors import UserError
from loomtune.testing import check_objective, toy
from loomtune.testing.recorded import built
from loomtune.toolkit import log_probs
from loomtune_plugins.objectives.online.credited import Batched, Credited
from loomtune_plugins.objectives.online.groups import Group, Scored
from loomtune_plugins.objectives.online.ppo import Ppo
from loomtune_plugins.objectives.online.ppo_reading import value_losses
from loomtune_plugins.objectives.online.ppo_settings import PpoSettings
from loomtune_plugins.scalar_scores import scores
from support import shared

LENGTHS = (3, 5, 1, 4)


def sample(prompt: str, *places: int) -> Sample:
    """A prompt and its completions, whose columns are drawn around what the policy and the value say."""
    rng = np.random.default_rng(places[0])
    before = np.array(toy.ToyTokenizer().encode(prompt), np.int32)
    parts = [Segment(before, np.zeros(len(before), np.bool_), columns=columns(rng, 0))]
    for place in places:
        tokens = toy.SPECIAL + rng.integers(97, 123, LENGTHS[place]).astype(np.int32)
        parts.append(Segment(tokens, np.ones(len(tokens), np.bool_), 0, columns(rng, len(tokens))))
    return Sample(tuple(parts), {"sequences": 2.0, "tokens": float(sum(LENGTHS[i] for i in places)), "first": 0.0})


def columns(rng: np.random.Generator, count: int) -> dict[str, Any]:
    around = {"old": (-5.6, 0.6), "reference": (-5.6, 0.6), "advantage": (0, 1), "value": (0, 0.4), "returns": (0, 1)}
    drawn = {name: mean + spread * rng.standard_normal(count) for name, (mean, spread) in around.items()}
    return {name: values.astype(np.float32) for name, values in drawn.items()}


BATCH = [sample("a loom ", 0, 1), sample("warp", 2, 3)]


def batch_of(samples: list[Sample] | None = None) -> Batch:
    chosen = BATCH if samples is None else samples
    return collate(chosen, range(len(chosen)), 0)


def loss(objective: Objective, roles: dict[str, Role], batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each term's mean, and the metrics', of a batch that is a whole step."""
    with torch.no_grad():
        statistics = objective.statistics(roles, [batch], toy.world())
    totals = objective.weights(batch)
    sums = objective.loss(roles, batch, totals, statistics)
    metrics = {name: float(value / weight) for name, (value, weight) in sums.metrics.items()}
    return {name: value / totals[name] for name, value in sums.terms.items()}, metrics


def with_values(roles: dict[str, Role]) -> dict[str, Role]:
    """Values that differ, as a head that was trained gives them."""
    network: Any = roles["value"].engine
    head = network.network.heads["_value"].weight
    with torch.no_grad():
        head.copy_(0.3 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    return roles


def expected(roles: dict[str, Role], batch: Batch, how: PpoSettings) -> dict[str, Tensor]:
    """Schulman et al. 2017, equation 7, and the clipped squared error, token by token."""
    policy, values = log_probs(roles["policy"], batch).double(), scores(roles["value"], batch).double()
    given = {name: column.double() for name, column in batch.columns.items()}
    gains, errors = [], []
    for t in range(len(batch.target)):
        ratio, gain = (policy[t] - given["old"][t]).exp(), given["advantage"][t]
        gains.append(torch.min(ratio * gain, ratio.clamp(1 - how.clip[0], 1 + how.clip[1]) * gain))
        old, goal = given["value"][t], given["returns"][t]
        held = torch.clamp(values[t], old - how.value_clip, old + how.value_clip) if how.value_clip else values[t]
        errors.append(0.5 * torch.max((values[t] - goal) ** 2, (held - goal) ** 2))
    return {"policy": -torch.stack(gains).mean(), "value": how.value_coef * torch.stack(errors).mean()}


def gradients(terms: Mapping[str, Tensor], roles: dict[str, Role]) -> list[Tensor]:
    engines: list[Any] = list({id(role.engine): role.engine for role in roles.values() if role.trained}.values())
    parameters = [one for engine in engines for one in engine.network.parameters() if one.requires_grad]
    found = torch.autograd.grad(torch.stack([*terms.values()]).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("where", ["head", "model"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_low": 0.1, "clip_high": 0.5, "value_clip": 0.5}, {"value_clip": 0.0, "value_coef": 0.7}],
)
def test_both_losses_are_their_formulas(where: str, settings: dict[str, Any]) -> None:
    how = PpoSettings(value=where, **settings)
    objective = Ppo(how)
    roles, batch = with_values(toy.roles(objective)), batch_of()
    assert (roles["value"].engine is roles["policy"].engine) == (where == "head")
    found, _ = loss(objective, roles, batch)
    wanted = expected(roles, batch, how)
    assert {name: float(value.detach()) for name, value in found.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in wanted.items()}, rel=1e-5
    )
    for ours, theirs in zip(gradients(found, roles), gradients(wanted, roles), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-6)


def test_one_network_is_read_once_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for where, passes in (("head", 1), ("model", 2)):
        objective = Ppo(PpoSettings(value=where))
        roles, seen = toy.roles(objective), []
        forward = toy.BareEngine.forward
        monkeypatch.setattr(toy.BareEngine, "forward", lambda *a, f=forward, s=seen, **k: s.append(1) or f(*a, **k))
        loss(objective, roles, batch_of())
        monkeypatch.undo()
        assert len(seen) == passes


def test_the_values_gradient_leaves_the_policy_alone_where_it_has_a_network_of_its_own() -> None:
    objective = Ppo(PpoSettings(value="model"))
    roles = with_values(toy.roles(objective))
    found, _ = loss(objective, roles, batch_of())
    policy: Any = roles["policy"].engine
    parameters = [one for one in policy.network.parameters() if one.requires_grad]
    found_for = torch.autograd.grad(found["value"], parameters, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in found_for)


def test_value_losses_are_the_recorded_ones() -> None:
    """Of the inputs of `ppo.json`, as two other trainers compute them."""
    case = json.loads(shared("references", "ppo.json").read_text())
    given, mask = case["inputs"], torch.tensor(case["inputs"]["mask"]).bool()
    values, old, returns = (
        torch.tensor(table)[mask] for table in (given["new_values"], given["old_values"], case["gae"]["verl_returns"])
    )
    assert float(value_losses(values, old, returns, 0.2)[0].mean()) == pytest.approx(0.3707859, abs=1e-6)
    assert float(value_losses(values, old, returns, 0.0)[0].mean()) == pytest.approx(0.3633334, abs=1e-6)


def test_the_entropy_is_a_gain_and_has_its_gradient() -> None:
    for temperature in (1.0, 0.7):
        plain, wide = (Ppo(PpoSettings(entropy=e, temperature=temperature)) for e in (0.0, 0.3))
        roles, batch = with_values(toy.roles(plain)), batch_of()
        (without, metrics), (found, _) = (loss(each, roles, batch) for each in (plain, wide))
        engine: Any = roles["policy"].engine

        def of(view: Any, heat: float = temperature) -> Tensor:
            p = (view.heads["lm"](view.states).double() / heat).log_softmax(-1)
            return -(p.exp() * p).sum(-1)

        entropy = engine.forward(batch, of).mean()
        assert metrics["entropy"] == pytest.approx(float(entropy.detach()), rel=1e-5)
        wanted = {**without, "policy": without["policy"] - 0.3 * entropy}
        assert float(found["policy"].detach()) == pytest.approx(float(wanted["policy"].detach()), rel=1e-5)
        for ours, theirs in zip(gradients(found, roles), gradients(wanted, roles), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-6)


def test_a_micro_batch_without_samples_gives_zeros_that_reach_every_parameter() -> None:
    for where in ("head", "model"):
        objective = Ppo(PpoSettings(value=where, entropy=0.1))
        roles = toy.roles(objective)
        empty = collate([], [], 0, like=BATCH[0])
        sums = objective.loss(roles, empty, objective.weights(empty), objective.statistics(roles, [empty], toy.world()))
        assert all(float(value.detach()) == 0 and value.requires_grad for value in sums.terms.values())


def test_it_keeps_the_contract() -> None:
    check_objective(Ppo(PpoSettings()), [{"prompt": "a loom ", "completion": "weaves"}, {"prompt": "warp?"}])


# Credit


def scored(tokens: int, reward: float, *, ended: bool = True) -> Scored:
    return Scored(Answer({}, [5], [*range(7, 7 + tokens)], "", ended), reward=reward)


def group(*kept: Scored) -> Group:
    return Group(Drawn(0, sample("x", 0)), [5], kept)


class Heard:
    """A run that takes notes."""

    def __init__(self) -> None:
        self.noted: dict[str, float] = {}


GROUPS = [group(scored(3, 1.0), scored(2, -1.0, ended=False)), group(scored(4, 0.5)), group(scored(0, 3.0))]


def read(monkeypatch: pytest.MonkeyPatch, objective: Ppo, *, away: float = 0.0) -> tuple[Batched, Heard]:
    """What the objective makes of the groups, whose columns are drawn. away: what the reference says less."""
    rng = np.random.default_rng(3)
    found: dict[str, list[list[np.ndarray[Any, Any]]]] = {"old": [], "value": [], "reference": []}
    for each in GROUPS:
        lengths = [len(one.answer.tokens) for one in each.kept]
        old = [rng.normal(-2, 1, n).astype(np.float32) for n in lengths]
        found["old"].append(old)
        found["reference"].append([one - np.float32(away) for one in old])
        found["value"].append([rng.normal(0, 1, n).astype(np.float32) for n in lengths])
    monkeypatch.setattr(Credited, "read", lambda self, run, groups: Batched(groups, found))
    run = Heard()
    return objective.read(run, GROUPS), run  # type: ignore[arg-type]


def joined(table: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([one for each in table for one in each])


def test_advantages_are_whitened_over_all_tokens_of_the_batch_and_returns_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = read(monkeypatch, Ppo(PpoSettings()))
    raw, _ = read(monkeypatch, Ppo(PpoSettings(whiten=False)))
    advantages, plain = joined(whole.columns["advantage"]), joined(raw.columns["advantage"])
    assert np.allclose(advantages, (plain - plain.mean()) / plain.std(ddof=1), atol=1e-6)
    for batch in (whole, raw):
        assert np.allclose(joined(batch.columns["returns"]), plain + joined(batch.columns["value"]), atol=1e-6)
    assert [[len(one) for one in each] for each in whole.columns["advantage"]] == [[3, 2], [4], [0]]


def test_what_is_masked_is_no_part_of_the_whitening(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = read(monkeypatch, Ppo(PpoSettings(mask_truncated=True)))
    assert not batch.columns["advantage"][0][1].any() and len(batch.columns["advantage"][0][1]) == 2
    kept = np.concatenate([batch.columns["advantage"][0][0], batch.columns["advantage"][1][0]])
    assert kept.mean() == pytest.approx(0, abs=1e-9) and kept.std(ddof=1) == pytest.approx(1, abs=1e-6)


def test_a_cut_completion_is_scored_less_and_the_kl_is_paid_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    how = PpoSettings(lam=1.0, gamma=1.0, whiten=False, beta=0.1, missing_eos_penalty=0.7)
    batch, run = read(monkeypatch, Ppo(how), away=0.5)
    (first, cut), (other,), _ = batch.columns["returns"]
    assert first.tolist() == pytest.approx([1.0 - 0.05 * n for n in (3, 2, 1)], abs=1e-6)
    assert cut.tolist() == pytest.approx([-1.7 - 0.05 * n for n in (2, 1)], abs=1e-6)
    assert other.tolist() == pytest.approx([0.5 - 0.05 * n for n in (4, 3, 2, 1)], abs=1e-6)
    assert run.noted["kl/completion"] == pytest.approx(0.5 * (3 + 2 + 4 + 0) / 4, abs=1e-6)


@pytest.mark.parametrize(("estimator", "of"), [("k1", 0.5), ("k2", 0.125), ("k3", np.exp(-0.5) - 0.5)])
def test_the_kl_in_the_reward_is_of_the_chosen_estimator(
    monkeypatch: pytest.MonkeyPatch, estimator: str, of: float
) -> None:
    how = PpoSettings(lam=1.0, whiten=False, beta=1.0, kl=estimator)
    batch, _ = read(monkeypatch, Ppo(how), away=0.5)
    assert batch.columns["returns"][0][0].tolist() == pytest.approx([1 - 3 * of, 1 - 2 * of, 1 - of], abs=1e-6)


def drawn_once(monkeypatch: pytest.MonkeyPatch, objective: Ppo, *, fails: bool = False) -> Heard:
    """What is noted of a batch, after which perhaps something fails."""
    heard: list[Heard] = []

    def experience(self: Ppo, run: Any, drawn: Any) -> list[Any]:
        heard.append(read(monkeypatch, self, away=0.5)[1])
        if fails:
            raise RuntimeError("somebody asked to leave")
        return []

    monkeypatch.setattr(Credited, "experience", experience)
    objective.experience(None, [])  # type: ignore[arg-type]
    return heard[0]


def test_a_coefficient_that_adapts_is_used_first_and_moved_then_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    how = PpoSettings(beta=0.1, kl_target=0.5, kl_gain=0.5)
    objective = Ppo(how)
    noted = drawn_once(monkeypatch, objective).noted
    assert noted["kl/coefficient"] == 0.1 and objective.coefficient == pytest.approx(0.1 * 1.1)
    state = json.loads(json.dumps(objective.state()))
    resumed = Ppo(how)
    resumed.resume(state)
    assert resumed.coefficient == objective.coefficient
    resumed.resume({})
    assert resumed.coefficient == 0.1


def test_a_batch_that_fails_has_moved_no_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Ppo(PpoSettings(beta=0.1, kl_target=0.5))
    with pytest.raises(RuntimeError):
        drawn_once(monkeypatch, objective, fails=True)
    assert objective.coefficient == 0.1


def test_without_a_target_the_coefficient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Ppo(PpoSettings(beta=0.1))
    drawn_once(monkeypatch, objective)
    assert objective.coefficient == 0.1


def test_without_a_kl_there_is_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Ppo(PpoSettings(beta=0.0, lam=1.0, whiten=False))
    assert set(objective.roles()) == {"policy", "value"}
    assert set(Ppo(PpoSettings()).roles()) == {"policy", "reference", "value"}
    batch, run = read(monkeypatch, objective, away=0.5)
    assert batch.columns["returns"][0][0].tolist() == pytest.approx([1, 1, 1]) and "kl/completion" not in run.noted


# Settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"value": "hed"}, "value=hed is not known. Did you mean 'head'"),
        ({"kl": "k4"}, "kl=k4 is not known"),
        ({"gamma": 1.5}, r"gamma=1\.5 does not lie between 0 and 1"),
        ({"lam": -0.1}, r"lam=-0\.1 does not lie"),
        ({"value_coef": 0.0}, "value_coef=0 learns no values"),
        ({"value_clip": -0.2}, r"value_clip=-0\.2 is negative"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1 is negative"),
        ({"beta": 0.0, "kl_target": 6.0}, r"kl_target=6\.0 has no effect with objective\.beta=0"),
        ({"mask_truncated": True, "missing_eos_penalty": 1.0}, r"missing_eos_penalty=1\.0 has no effect with"),
        ({"kl_gain": 0.5}, r"kl_gain=0\.5 has no effect with objective\.kl_target=0"),
        ({"temperature": 0.0}, "temperature=0 draws nothing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Ppo(PpoSettings(**settings))


def test_others_names_of_settings_are_known() -> None:
    theirs = {"kl_coef": 0.2, "cliprange": 0.3, "cliprange_value": 0.4, "vf_coef": 0.5, "num_ppo_epochs": 2}
    made: Any = built("ppo", theirs)
    how = made.settings
    assert (how.beta, how.clip_low, how.value_clip, how.value_coef, how.epochs) == (0.2, 0.3, 0.4, 0.5, 2)


def test_a_value_network_of_its_own_is_refused_with_an_adapter_that_shares_the_base(tiny_ppo: list[str]) -> None:
    api.check(api.compose([*tiny_ppo, "objective.value=model"]))
    api.check(api.compose([*tiny_ppo, "adapter=lora"]))
    with pytest.raises(UserError, match=r"(?s)value=model asks for a network.*set objective\.value=head"):
        api.check(api.compose([*tiny_ppo, "adapter=lora", "objective.value=model"]))


def test_only_a_value_network_of_its_own_may_start_from_another_model(tiny_ppo: list[str], tiny_model: Any) -> None:
    given = f"roles.value.model.path={tiny_model}"
    api.check(api.compose([*tiny_ppo, "objective.value=model", given]))
    with pytest.raises(UserError, match="value starts from the policy's own model"):
        api.check(api.compose([*tiny_ppo, given]))


@pytest.fixture
def tiny_ppo(tied_model: Any, mixed_data: Any) -> list[str]:
    data = [f"model.path={tied_model}", "data=jsonl", f"data.path={mixed_data}", "sharding=single"]
    return [*data, "objective=ppo", "rollout=huggingface", "reward=[length]", "reward.length.longest=4"]


def test_a_run_has_the_parts_of_its_samples_named() -> None:
    assert list(Ppo(PpoSettings(group=2)).parts()) == ["prompt", "completion", "completion"]


def test_four_passes_make_four_steps_unless_it_is_said_otherwise() -> None:
    assert Ppo(PpoSettings()).steps_per_batch() == 4
    assert Ppo(PpoSettings(epochs=2, minibatches=3)).steps_per_batch() == 6
