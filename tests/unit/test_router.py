"""A rule fitted to a router's probe holds for tokens that the probe did not see, for every architecture."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.model.router import Router, attach_routers
from raymoe.model.router_rule import RouterHints, RouterRule, RoutingSample, fit_rule
from raymoe.model.runner import Runner
from raymoe.model.trunk import build_trunk
from tests.toy_models import TOYS, Toys

UNSEEN = [3, 118, 99, 12, 70, 7, 101, 25, 53, 88, 110, 31, 5, 64, 17, 96, 40, 122, 11, 76, 2, 109, 58, 83]

WITHOUT_RULE = {
    # the first layer's experts follow from the token's id, not from scores
    "deepseek_v4": [0],
    # weights are normalised together with those of the shared experts, which a replaced expert would change too
    "inkling_text": [0, 1, 2],
    # each weight depends on the logits of experts that were not chosen, and on the order of the two chosen
    "phimoe": [0, 1, 2],
    # the router scores a skip expert too; choosing that one arrives as expert 0 with weight 0
    "zaya": [0, 1, 2, 3],
}


class HalfExperts:
    """Experts that return half of their input; what they receive is kept in the order of the layers."""

    def __init__(self) -> None:
        self.received: list[tuple[np.ndarray, np.ndarray]] = []

    def route(
        self, _layer: int, experts_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.received.append((experts_TK.numpy(), weights_TK.float().numpy()))
        return experts_TK, weights_TK

    def compute(self, _layer: int, hidden_TH: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        return (0.5 * hidden_TH).unsqueeze(1).expand(-1, experts_TK.shape[1], -1)


def trunk_of(model_type: str, toys: Toys, dtype: str = "float32", backend: HalfExperts | None = None) -> Any:
    """A toy's trunk in which everything that could bias a choice or scale a weight is far from neutral."""
    checkpoint = open_checkpoint(toys(model_type), dtype)
    trunk = build_trunk(checkpoint, backend or HalfExperts(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in itertools.chain(trunk.named_parameters(), trunk.named_buffers()):
        if tensor.numel() == 8 and ("bias" in name.rpartition(".")[2] or "per_expert" in name):
            noise = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise if "bias" in name else 1.0 + noise)
    return trunk


def assert_rule_holds(router: Router, experts_TK: np.ndarray, weights_TK: np.ndarray, tolerance: float) -> None:
    rule = router.rule
    assert rule is not None
    scores_TE = rule.scores(router.logits_TE.float().numpy())
    chosen_TK = np.take_along_axis(scores_TE, experts_TK, axis=1)
    weights = rule.weights(chosen_TK, experts_TK)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, weights_TK, rtol=tolerance, atol=1e-6)

    selection_TE = rule.selection_scores(scores_TE)
    others_TE = selection_TE.copy()
    np.put_along_axis(others_TE, experts_TK, -np.inf, axis=1)
    worst_chosen_T = np.take_along_axis(selection_TE, experts_TK, axis=1).min(axis=1)
    assert (worst_chosen_T >= others_TE.max(axis=1) - tolerance).all()
    permitted_TE = rule.permitted(scores_TE)
    if permitted_TE is not None:
        assert (permitted_TE.sum(axis=1) == rule.groups_kept * scores_TE.shape[1] // rule.groups).all()
        assert np.take_along_axis(permitted_TE, experts_TK, axis=1).all()


def assert_rules_hold(trunk: Any, without_rule: list[int], tolerance: float = 1e-5) -> list[Router]:
    routers = attach_routers(trunk)
    assert [router.path for router in routers] == [path for path, _ in experts_modules(trunk)]
    assert [index for index, router in enumerate(routers) if router.rule is None] == without_rule
    backend = experts_modules(trunk)[0][1].raymoe_backend
    assert not backend.received  # the probe asks nobody
    Runner(trunk).prefill(UNSEEN)
    for router, (experts_TK, weights_TK) in zip(routers, backend.received, strict=True):
        if router.rule is not None:
            assert router.logits_TE.shape == (len(UNSEEN), 8)
            assert_rule_holds(router, experts_TK, weights_TK, tolerance)
    return routers


@pytest.mark.parametrize("model_type", sorted(TOYS))
def test_rule_holds_for_tokens_that_the_probe_did_not_see(model_type: str, toys: Toys) -> None:
    assert_rules_hold(trunk_of(model_type, toys), WITHOUT_RULE.get(model_type, []))


@pytest.mark.parametrize(
    "model_type", ["cohere2_moe", "deepseek_v3", "deepseek_v4", "gemma4_text", "gpt_oss", "jamba", "lfm2_moe"]
)
def test_rule_holds_within_the_rounding_of_bfloat16(model_type: str, toys: Toys) -> None:
    trunk = trunk_of(model_type, toys, "bfloat16")
    assert_rules_hold(trunk, WITHOUT_RULE.get(model_type, []), tolerance=2**-6)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("deepseek_v3", {"norm_topk_prob": False}, {"renormalised": False, "scale": 1.5, "groups": 4}),
        ("deepseek_v3", {"routed_scaling_factor": 2.827}, {"renormalised": True, "scale": 2.827}),
        ("deepseek_v3", {"num_group": 1, "topk_group": 1}, {"groups": 1}),
        ("deepseek_v2", {"topk_method": "greedy"}, {"groups": 1, "score": "softmax"}),
        ("axk2", {"num_group": None}, {"groups": 1}),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, {"score": "sigmoid", "renormalised": True}),
        ("qwen3_moe", {"norm_topk_prob": True}, {"score": "softmax", "renormalised": True}),
        ("lfm2_moe", {"use_expert_bias": False}, {"bias_E": None}),
        ("kolibri1", {"norm_topk_prob": True}, {"renormalised": True, "bias_on_logits": True}),
    ],
)
def test_rule_follows_the_settings_of_a_checkpoint(
    model_type: str, settings: dict[str, Any], expected: dict[str, Any], toys: Toys
) -> None:
    trunk = trunk_of(model_type, toys)
    for module, (name, value) in itertools.product(trunk.modules(), settings.items()):
        if hasattr(module, name):
            setattr(module, name, value)
    for router in assert_rules_hold(trunk, []):
        assert {name: getattr(router.rule, name) for name in expected} == expected


def test_rules_belong_to_layers(toys: Toys) -> None:
    routers = attach_routers(trunk_of("deepseek_v3", toys))
    biases = [router.rule.bias_E for router in routers if router.rule is not None]
    assert len(biases) == 2
    assert not np.array_equal(biases[0], biases[1])


@pytest.mark.parametrize("model_type", ["deepseek_v4", "jamba", "kimi_linear", "minimax", "nemotron_h", "zaya"])
def test_the_probe_leaves_nothing_behind(model_type: str, toys: Toys) -> None:
    backend = HalfExperts()
    trunk = trunk_of(model_type, toys, backend=backend)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    logits, _ = Runner(trunk).prefill(UNSEEN)
    random_state = torch.random.get_rng_state()

    routers = attach_routers(trunk)

    assert torch.equal(random_state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    assert all(module.raymoe_backend is backend for _, module in experts_modules(trunk))
    assert not any(module._forward_pre_hooks for module in trunk.modules())
    hooks = sum(len(module._forward_hooks) for module in trunk.modules())
    assert hooks == sum(router.rule is not None for router in routers)
    assert torch.equal(Runner(trunk).prefill(UNSEEN)[0], logits)


def test_a_probe_that_fails_leaves_nothing_behind(toys: Toys) -> None:
    backend = HalfExperts()
    trunk = trunk_of("mixtral", toys, backend=backend)

    def fail(*_args: Any) -> None:
        raise RuntimeError("out of memory")

    failing = trunk.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attach_routers(trunk)
    failing.remove()
    assert all(module.raymoe_backend is backend for _, module in experts_modules(trunk))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trunk.modules())
    assert all(router.rule is not None for router in attach_routers(trunk))


def test_logits_are_those_of_the_last_forward(toys: Toys) -> None:
    trunk = trunk_of("qwen3_next", toys)
    routers = attach_routers(trunk)
    runner = Runner(trunk)
    _, state = runner.prefill(UNSEEN)
    assert [router.logits_TE.shape for router in routers] == [(len(UNSEEN), 8)] * 3
    runner.decode(state, 17)
    decoded = [router.logits_TE for router in routers]
    runner.prefill([*UNSEEN, 17])
    for router, logits_TE in zip(routers, decoded, strict=True):
        assert logits_TE.shape == (1, 8) and not logits_TE.requires_grad
        torch.testing.assert_close(logits_TE[0], router.logits_TE[-1], rtol=1e-4, atol=1e-4)


def rule_of(**changes: Any) -> RouterRule:
    return RouterRule(**{"score": "sigmoid", "renormalised": True, "scale": 1.0, **changes})


def test_scores_by_function() -> None:
    logits = np.array([[0.0, np.log(3.0), -1000.0]], dtype=np.float32)
    np.testing.assert_allclose(rule_of(score="softmax").scores(logits), [[0.25, 0.75, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(rule_of().scores(logits), [[0.5, 0.75, 0.0]], rtol=1e-6, atol=1e-30)
    expected = np.sqrt(np.log([[2.0, 4.0, 1.0]]))
    np.testing.assert_allclose(rule_of(score="sqrtsoftplus").scores(logits), expected, rtol=1e-6)
    assert rule_of(score="identity").scores(logits) is logits


def test_weights_of_a_set() -> None:
    scores = np.array([[0.2, 0.6]], dtype=np.float32)
    np.testing.assert_allclose(rule_of(scale=2.0).weights(scores), [[0.5, 1.5]], rtol=1e-6)
    np.testing.assert_allclose(rule_of(scale=2.0, renormalised=False).weights(scores), [[0.4, 1.2]], rtol=1e-6)
    assert rule_of().weights(np.zeros((1, 2), dtype=np.float32)).tolist() == [[0.0, 0.0]]


def test_weights_scaled_by_expert_need_the_experts() -> None:
    rule = rule_of(scale_E=np.array([1.0, 10.0, 100.0], dtype=np.float32))
    scores = np.array([[0.2, 0.6]], dtype=np.float32)
    np.testing.assert_allclose(rule.weights(scores, np.array([[2, 0]])), [[25.0, 0.75]], rtol=1e-6)
    with pytest.raises(ValueError, match="needs the experts"):
        rule.weights(scores)


def test_bias_counts_for_selection_only() -> None:
    scores = np.array([[0.5, 0.4]], dtype=np.float32)
    bias = np.array([0.0, 0.25], dtype=np.float32)
    rule = rule_of(bias_E=bias)
    np.testing.assert_allclose(rule.selection_scores(scores), [[0.5, 0.65]], rtol=1e-6)
    np.testing.assert_allclose(rule.weights(scores), [[5 / 9, 4 / 9]], rtol=1e-6)
    odds = 2 / 3 * np.exp(0.25)
    on_logits = rule_of(bias_E=bias, bias_on_logits=True)
    np.testing.assert_allclose(on_logits.selection_scores(scores), [[0.5, odds / (1 + odds)]], rtol=1e-6)


@pytest.mark.parametrize(
    ("group_score", "bias", "permitted"),
    [
        ("max", [0.0] * 6, [False, False, True, True, False, False]),
        ("top2", [0.0] * 6, [True, True, False, False, False, False]),
        ("max", [0.0, 0.0, 0.0, 0.0, 0.5, 0.0], [False, False, False, False, True, True]),
    ],
)
def test_permitted_experts_lie_in_the_best_groups(group_score: str, bias: list[float], permitted: list[bool]) -> None:
    scores = np.array([[0.5, 0.5, 0.7, 0.1, 0.4, 0.3]], dtype=np.float32)
    rule = rule_of(groups=3, group_score=group_score, bias_E=np.array(bias, dtype=np.float32))
    mask = rule.permitted(scores)
    assert mask is not None and mask.tolist() == [permitted]
    assert np.isneginf(rule.selection_scores(scores)).tolist() == [[not allowed for allowed in permitted]]


def test_no_group_limit_permits_all() -> None:
    assert rule_of().permitted(np.ones((2, 4), dtype=np.float32)) is None


def sample_of(rule: RouterRule, k: int = 2, tolerance: float = 1e-5) -> RoutingSample:
    logits = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    scores = rule.scores(logits)
    experts = np.argsort(-rule.selection_scores(scores), axis=1)[:, :k]
    weights = rule.weights(np.take_along_axis(scores, experts, axis=1), experts)
    return RoutingSample(logits_TE=logits, experts_TK=experts, weights_TK=weights, tolerance=tolerance)


def test_weights_that_no_candidate_gives_have_no_rule() -> None:
    sample = sample_of(rule_of())
    sample.weights_TK[3, 1] *= 1.001
    assert fit_rule(sample, RouterHints()) is None


def test_choices_that_no_candidate_makes_have_no_rule() -> None:
    bias = np.random.default_rng(1).normal(size=8).astype(np.float32)
    sample = sample_of(rule_of(bias_E=bias))
    assert fit_rule(sample, RouterHints()) is None
    fitted = fit_rule(sample, RouterHints(biases=[-bias, bias]))
    assert fitted is not None and fitted.bias_E is bias


def test_choosing_all_experts_has_a_rule() -> None:
    fitted = fit_rule(sample_of(rule_of(score="softmax"), k=8), RouterHints())
    assert fitted is not None and fitted.score == "softmax"


def test_an_expert_chosen_twice_has_no_rule() -> None:
    sample = sample_of(rule_of(renormalised=False), k=1)
    twice = RoutingSample(
        logits_TE=sample.logits_TE,
        experts_TK=np.repeat(sample.experts_TK, 2, axis=1),
        weights_TK=np.repeat(sample.weights_TK, 2, axis=1),
        tolerance=1e-5,
    )
    assert fit_rule(twice, RouterHints()) is None


def test_choices_may_differ_among_scores_that_the_precision_cannot_tell_apart() -> None:
    for gap, known in ((0.01, True), (0.3, False)):
        sample = sample_of(rule_of(renormalised=False), k=1, tolerance=2**-6)
        chosen, other = sample.experts_TK[0, 0], (sample.experts_TK[0, 0] + 1) % 8
        sample.logits_TE[0, other] = sample.logits_TE[0, chosen] + gap
        assert (fit_rule(sample, RouterHints()) is not None) == known


def test_a_scale_near_a_known_number_is_that_number() -> None:
    sample = sample_of(rule_of(scale=2.5000001))
    fitted = fit_rule(sample, RouterHints(numbers=[2.0, 2.5]))
    assert fitted is not None and fitted.scale == 2.5
    unknown = fit_rule(sample, RouterHints())
    assert unknown is not None and unknown.scale == pytest.approx(2.5, rel=1e-6)
