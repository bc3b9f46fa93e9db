"""Calls of OpenRLHF's loss layer, all options, on random masked tensors: the same for its own modules and for ours.

The numbers come from ``random.Random``, because its sequences are the same on every version of Python and of torch.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """One call: ``run(api, dtype)`` returns tensors by their names, or None where the function returns None."""

    name: str
    run: Callable[[Any, torch.dtype], dict]


class Source:
    """Random tensors of one case, on ``device``."""

    device = "cpu"

    def __init__(self, seed, dtype):
        self.random, self.dtype = random.Random(seed), dtype

    def normal(self, *shape, scale=1.0):
        numbers = [self.random.gauss(0.0, scale) for _ in range(torch.Size(shape).numel())]
        return torch.tensor(numbers, dtype=torch.float64).view(shape).to(self.device, self.dtype)

    def logprobs(self, *shape):
        numbers = [-3.0 * self.random.random() - 0.01 for _ in range(torch.Size(shape).numel())]
        return torch.tensor(numbers, dtype=torch.float64).view(shape).to(self.device, self.dtype)

    def mask(self, rows, length, empty=False):
        live = [[int(i == 0 or self.random.random() < 0.7) for i in range(length)] for _ in range(rows)]
        if empty:
            live[1] = [0] * length
        return torch.tensor(live).to(self.device)

    def ids(self, *shape, high):
        return (
            torch.tensor([self.random.randrange(high) for _ in range(torch.Size(shape).numel())])
            .view(shape)
            .to(self.device)
        )


def observed(call, learned, *others, **keywords):
    """The outputs of ``call(*learned, *others)``, and the gradients of a weighing of the first one."""
    learned = [x.clone().requires_grad_() for x in learned]
    outputs = call(*learned, *others, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": x if x is None else x.detach() for i, x in enumerate(outputs)}
    first = outputs[0]
    weights = 0.5 + torch.arange(first.numel(), dtype=torch.float64).view(first.shape) / first.numel()
    gradients = torch.autograd.grad((first.double() * weights.to(first.device)).sum(), learned)
    return found | {f"gradient {i}": x for i, x in enumerate(gradients)}


def values(call, *arguments):
    outputs = call(*arguments)
    return {f"output {i}": x for i, x in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}


def normalisers(source, wanted):
    """The totals of a batch as OpenRLHF hands them over: tensors of shape () on the device."""
    tokens, sequences = (torch.tensor(x).to(source.device) for x in (101.0, 11.0))
    return {"dp_size": 3, "batch_num_tokens": tokens, "global_batch_size": sequences} if wanted else {}


SPREADS = (0.05, 0.4, 1.2)


def _policy(seed, options, totals, empty):
    def run(api, dtype):
        source = Source(seed, dtype)
        logprobs, gap = source.logprobs(3, 6), SPREADS[seed % 3]
        old, rollout = logprobs + source.normal(3, 6, scale=gap), logprobs + source.normal(3, 6, scale=0.7 * gap)
        advantages, mask = source.normal(3, 6), source.mask(3, 6, empty)
        loss = api.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, **options)
        return observed(loss, [logprobs], old, advantages, mask, rollout, **normalisers(source, totals))

    return run


def policy_cases(first_seed):
    corrections = [{"is_correction_level": "off"}, {"is_correction_level": "token", "is_correction_mode": "clip"}]
    for level, gate in itertools.product(("token", "seq"), ("ratio", "binary_kl", "tv")):
        threshold = (0.5, 5.0) if gate == "ratio" else (0.0, 0.05)
        corrections.append(
            {"is_correction_level": level, "is_correction_gating": gate, "is_correction_threshold": threshold}
        )
    seed = first_seed
    for kind, correction, dual, level, totals in itertools.product(
        ("ppo", "gspo"), corrections, (None, 2.0), (True, False), (False, True)
    ):
        if kind == "gspo" and (not level or len(correction) > 1 and "clip" not in correction.values()):
            continue  # the options of the gate are not looked at, and the level is that of sequences
        seed += 1
        options = {"policy_loss_type": kind, "dual_clip": dual, "token_level_loss": level, **correction}
        # OpenRLHF counts an empty sequence as filtered and ours does not, so that this metric would differ.
        empty = seed % 2 == 0 and correction["is_correction_level"] != "seq"
        name = f"PolicyLoss {' '.join(str(x) for x in options.values())} {'totals' if totals else 'batch'} {seed}"
        yield Case(name, _policy(seed, options, totals, empty))


def _value(seed, clip, level, totals, empty):
    def run(api, dtype):
        source = Source(seed, dtype)
        value = source.normal(3, 6)
        old, returns, mask = value + source.normal(3, 6, scale=0.3), source.normal(3, 6), source.mask(3, 6, empty)
        return observed(api.ValueLoss(clip, level), [value], old, returns, mask, **normalisers(source, totals))

    return run


def value_cases(first_seed):
    options = itertools.product((None, 0.2, 0.5), (True, False), (False, True))
    for seed, (clip, level, totals) in enumerate(options, first_seed):
        yield Case(f"ValueLoss {clip} {level} {totals} {seed}", _value(seed, clip, level, totals, seed % 2 == 0))


def _case(name, seed, body):
    return Case(f"{name} {seed}", lambda api, dtype: body(api, Source(seed, dtype)))


def pair_cases(seed):
    def reward(name, *shape, margin):
        def body(api, source):
            chosen, rejected, gap = (source.normal(*shape, scale=3.0) for _ in range(3))
            return observed(getattr(api, name)(), [chosen, rejected], *([gap.abs()] if margin else []))

        return body

    for name, margin, shape in itertools.product(("PairWiseLoss", "LogExpLoss"), (False, True), ((5,), (5, 1))):
        yield _case(f"{name} {margin} {shape}", seed, reward(name, *shape, margin=margin))

    def dpo(smoothing, ipo):
        def body(api, source):
            pairs = [source.normal(5, scale=9.0) for _ in range(4)]
            return observed(api.DPOLoss(0.1, smoothing, ipo), pairs[:2], *pairs[2:])

        return body

    for smoothing, ipo in ((0.0, False), (0.1, False), (0.5, False), (0.7, False), (0.0, True), (0.1, True)):
        yield _case(f"DPOLoss {smoothing} {ipo}", seed, dpo(smoothing, ipo))


def token_cases(seed):
    def sft(level, totals):
        def body(api, source):
            logprobs, mask = source.logprobs(3, 6), source.mask(3, 6, empty=not level)
            return observed(api.SFTLoss(level), [logprobs], mask, **normalisers(source, totals))

        return body

    def aggregated(level, totals):
        def body(api, source):
            given = normalisers(source, totals)
            return observed(api.aggregate_loss, [source.normal(3, 6)], source.mask(3, 6, True), level, **given)

        return body

    for level, totals in itertools.product((True, False), (False, True)):
        yield _case(f"SFTLoss {level} {totals}", seed, sft(level, totals))
        yield _case(f"aggregate_loss {level} {totals}", seed, aggregated(level, totals))

    def labels(source):
        found = source.ids(2, 5, high=11)
        found[0, :3] = -100
        return found

    yield _case(
        "GPTLMLoss",
        seed,
        lambda api, source: observed(api.GPTLMLoss(), [source.normal(2, 5, 11, scale=3.0)], labels(source)),
    )

    def kl(estimator, unbiased, spread, old):
        def body(api, source):
            logprobs = source.logprobs(3, 6)
            base = logprobs + source.normal(3, 6, scale=spread)
            behaviour = logprobs + source.normal(3, 6) if old else None
            return observed(api.compute_approx_kl, [logprobs], base, behaviour, estimator, unbiased)

        return body

    for estimator, unbiased, spread in itertools.product(("k1", "k2", "k3"), (False, True), (0.5, 8.0)):
        yield _case(f"compute_approx_kl {estimator} {unbiased} {spread}", seed, kl(estimator, unbiased, spread, True))
    yield _case("compute_approx_kl k3 True without old", seed, kl("k3", True, 0.5, False))


def logits_cases(seed):
    def logprobs(temperature):
        def body(api, source):
            logits, ids = source.normal(2, 5, 11, scale=3.0), source.ids(2, 5, high=11)
            # A copy, because OpenRLHF divides the caller's logits in place.
            return observed(lambda z: api.log_probs_from_logits(z * 1.0, ids, temperature), [logits])

        return body

    for temperature in (1.0, 0.7):
        yield _case(f"log_probs_from_logits {temperature}", seed, logprobs(temperature))
    yield _case(
        "compute_entropy", seed, lambda api, source: observed(api.compute_entropy, [source.normal(2, 5, 11, scale=3.0)])
    )


def statistics_cases(seed):
    def mean(dim, masked):
        def body(api, source):
            x, mask = source.normal(3, 6), source.mask(3, 6)
            mask[0] = 1
            mask[:, 0] = 1
            return observed(api.masked_mean, [x], mask if masked else None, dim)

        return body

    for dim, masked in itertools.product((None, -1, 1, 0), (True, False)):
        yield _case(f"masked_mean {dim} {masked}", seed, mean(dim, masked))
    for dim in (1, 0, -1):
        yield _case(
            f"masked_normalize {dim}",
            seed,
            lambda api, source, dim=dim: values(
                api.masked_normalize, source.normal(3, 6), source.mask(3, 6, True), dim
            ),
        )

    def reward(coef, clip):
        def body(api, source):
            scores, mask = source.normal(3, scale=8.0), source.mask(3, 6, True)
            # As OpenRLHF has it: log-probabilities are multiplied by the mask before the KL is taken.
            return values(api.compute_reward, scores, coef, source.normal(3, 6) * mask, mask, clip)

        return body

    for coef, clip in itertools.product((0.05, 0.0, -1.0), (None, (-10.0, 10.0))):
        yield _case(f"compute_reward {coef} {clip}", seed, reward(coef, clip))


def advantage_cases(seed):
    def estimates(masked, gamma, lam):
        def body(api, source):
            value, reward, mask = source.normal(3, 6), source.normal(3, 6), source.mask(3, 6, True) if masked else None
            gae = values(api.get_advantages_and_returns, value, reward, mask, gamma, lam)
            return gae | {"returns": api.get_cumulative_returns(reward, mask, gamma)}

        return body

    for masked, (gamma, lam) in itertools.product((True, False), ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0))):
        yield _case(f"get_advantages_and_returns {masked} {gamma} {lam}", seed, estimates(masked, gamma, lam))


def cases(seed=1):
    """Every case of 0.11.2, with other numbers for another ``seed``."""
    return [
        *policy_cases(1000 * seed),
        *value_cases(1000 * seed),
        *pair_cases(seed),
        *token_cases(seed),
        *logits_cases(seed),
        *statistics_cases(seed),
        *advantage_cases(seed),
    ]


def legacy_cases(seed=1):
    """Every case of 0.5.5."""

    def policy(api, source):
        logprobs = source.logprobs(3, 6)
        old, advantages = logprobs + source.normal(3, 6, scale=0.4), source.normal(3, 6)
        return observed(api.PolicyLoss(0.2), [logprobs], old, advantages, source.mask(3, 6))

    def value(clip):
        def body(api, source):
            x = source.normal(3, 6)
            old, returns = x + source.normal(3, 6, scale=0.3), source.normal(3, 6)
            return observed(api.ValueLoss(clip), [x], old, returns, source.mask(3, 6))

        return body

    yield _case("legacy PolicyLoss", seed, policy)
    for clip in (None, 0.2):
        yield _case(f"legacy ValueLoss {clip}", seed, value(clip))

    def vanilla(api, source):
        chosen, rejected, *reference = (source.normal(5, scale=9.0) for _ in range(4))
        return observed(api.VanillaKTOLoss(0.1), [chosen, rejected], *reference)

    yield _case("legacy VanillaKTOLoss", seed, vanilla)

    def kto(chosen_count, rejected_count, shift):
        def body(api, source):
            sizes = (chosen_count, rejected_count)
            learned = [source.normal(n, scale=9.0) for n in sizes]
            reference, prompts = [source.normal(n, scale=9.0) for n in sizes], source.normal(4, scale=9.0)
            others = prompts + source.normal(4) + shift
            # A class without an answer has no gradient in OpenRLHF.
            empty = [i for i, n in enumerate(sizes) if n == 0]
            loss = api.KTOLoss(0.1, 1.3, 0.7, 1, torch.device("cpu"))

            def call(*scores):
                pair = [learned[i] if i in empty else scores[i - len([e for e in empty if e < i])] for i in (0, 1)]
                return loss(*pair, prompts, *reference, others)

            return observed(call, [x for i, x in enumerate(learned) if i not in empty])

        return body

    for numbers in ((3, 2, 5.0), (3, 2, -5.0), (0, 4, -5.0), (4, 0, -5.0)):
        yield _case(f"legacy KTOLoss {numbers}", seed, kto(*numbers))

    def distilled(api, source):
        labels = source.ids(2, 5, high=11)
        labels[0, :3] = -100
        return observed(api.KDLoss(), [source.normal(2, 5, 11, scale=3.0)], source.normal(2, 5, 11, scale=3.0), labels)

    yield _case("legacy KDLoss", seed, distilled)

    def steps(soft, columns):
        def body(api, source):
            logits = source.normal(2, 5, 11, scale=3.0)
            inputs = torch.tensor([[9, 1, 9, 2, 9], [3, 9, 4, 5, 6]]).to(source.device)
            labels = torch.tensor([[3, -100, 7, -100, 3], [-100, 7, -100, -100, -100]]).to(source.device)
            if soft:
                labels = torch.where(labels == -100, -100.0, 0.2 + labels / 11.0).float()
            loss = api.PRMLoss(9, columns)
            return observed(lambda z: loss(inputs, z, labels, return_acc=True), [logits])

        return body

    for soft, columns in ((False, None), (False, [3, 7]), (True, [3, 7])):
        yield _case(f"legacy PRMLoss {soft} {columns}", seed, steps(soft, columns))

    def kl(k3):
        def body(api, source):
            logprobs = source.logprobs(3, 6)
            base = logprobs + source.normal(3, 6)
            return observed(api.compute_approx_kl, [logprobs], base, source.mask(3, 6), k3)

        return body

    for k3 in (False, True):
        yield _case(f"legacy compute_approx_kl {k3}", seed, kl(k3))

    def packed(api, source):
        scores, lengths = source.normal(3, scale=8.0), [4, 1, 6]
        segments = [source.normal(n) for n in lengths]
        found = api.compute_reward(scores, 0.05, [x.clone() for x in segments], None, lengths, (-5.0, 5.0))
        return {f"output {i}": x for i, x in enumerate(found)}

    yield _case("legacy compute_reward", seed, packed)


def cases_of_09(seed=1):
    """The policy loss of 0.9.5; of its metrics ``ppo_kl`` is compared without a correction alone."""

    def policy(kind, correction, dual, level):
        def body(api, source):
            logprobs = source.logprobs(3, 6)
            old, rollout = logprobs + source.normal(3, 6, scale=0.4), logprobs + source.normal(3, 6, scale=0.3)
            loss = getattr(api, "PolicyLoss09", api.PolicyLoss)(
                0.2, 0.28, dual, level, kind, correction is not None, [0.8, 1.5], correction or "tis"
            )
            found = observed(loss, [logprobs], old, source.normal(3, 6), source.mask(3, 6), rollout)
            if correction is not None:
                del found["output 2"]
            return found

        return body

    options = itertools.product(("ppo", "gspo"), (None, "tis", "icepop", "seq-mask-tis"), (None, 2.0), (True, False))
    for given in options:
        yield _case(f"09 PolicyLoss {' '.join(map(str, given))}", seed, policy(*given))


def worst(found, expected):
    """The largest error of ``found``, relative to the largest number of each tensor, and where it is."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    errors = {"nothing": 0.0}
    for name, x in expected.items():
        if x is None:
            assert found[name] is None, f"{name}: None expected, got {found[name]}"
            continue
        x, y = torch.as_tensor(x).double(), torch.as_tensor(found[name]).double()
        assert x.shape == y.shape, f"{name}: {y.shape}, expected {x.shape}"
        if x.numel():
            error = ((y - x).abs().max() / x.abs().max().clamp(min=1e-3)).item()
            errors[name] = error if error == error else float("inf")
    where = max(errors, key=errors.get)
    return errors[where], where
