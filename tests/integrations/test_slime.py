"""slime's functions against their formulas in float64, against slime's own code where it is installed, and the patch.

The own code is compiled where it runs, so a C++ compiler is needed there, or ``TORCH_COMPILE_DISABLE=1``.
"""

import doctest
import importlib
import importlib.util
import sys
import types

import pytest
import torch

from rlkernels.integrations import slime

SOURCE = """
def compute_approx_kl(log_probs, log_probs_base, kl_loss_type, importance_ratio=None): return "host"
def compute_policy_loss(ppo_kl, advantages, eps_clip, eps_clip_high, eps_clip_c=None): return "host"
def compute_cispo_loss(ppo_kl, log_probs, advantages, eps_clip, eps_clip_high): return "host"
def compute_gspo_kl(full_log_probs, full_old_log_probs, local_log_probs, loss_masks): return "host"
def vanilla_gae(rewards, values, gamma, lambd): return "host"
def chunked_gae(rewards, values, gamma, lambd, chunk_size=128): return "host"
def chunked_discounted_returns(rewards, discount, chunk_size=128): return "host"
def calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy=False, chunk_size=-1,
                                    log_prob_keep_mask=None, with_entropy_grad=True): return "host"
"""
INSTALLED = "slime" not in sys.modules and importlib.util.find_spec("slime") is not None


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(log_probs, base, kind, ratio=None):
    gap = base - log_probs
    value = {"k1": -gap, "k2": gap**2 / 2}.get(kind, gap.exp() - 1 - gap)
    value = value if ratio is None else ratio * value
    return value.clamp(-10, 10) if kind == "low_var_kl" else value


def policy(ppo_kl, advantages, low, high, dual=None):
    ratio = (-ppo_kl).exp()
    free, held = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    losses = torch.maximum(free, held)
    if dual is not None:
        losses = torch.where(advantages < 0, torch.minimum(-dual * advantages, losses), losses)
    return losses, (held > free).double()


def cispo(ppo_kl, log_probs, advantages, low, high):
    ratio = (-ppo_kl).exp()
    held = ratio.clamp(1 - low, 1 + high)
    return -held.detach() * advantages * log_probs, (held != ratio).double()


def gspo(now, old, local, masks):
    means = [((b - a) * m).sum() / m.sum().clamp(min=1) for a, b, m in zip(now, old, masks, strict=True)]
    return torch.cat([mean.expand(x.shape) for mean, x in zip(means, local, strict=True)])


def returns(rewards, gamma, chunk_size=128):
    columns, total = [], torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + gamma * total
        columns.append(total)
    return torch.stack(columns[::-1], 1)


def gae(rewards, values, gamma, lam, chunk_size=128):
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    advantages = returns(rewards + gamma * after - values, gamma * lam)
    return advantages, advantages + values


def logits(z, tokens, group, with_entropy=False, chunk_size=-1, log_prob_keep_mask=None, with_entropy_grad=True):
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    if log_prob_keep_mask is not None:
        kept = log_prob_keep_mask.scatter(1, tokens[:, None], True)
        logp = z.masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropy = entropy if with_entropy_grad else entropy.detach()
    return logp.gather(1, tokens[:, None]), entropy if with_entropy else None


TRUTH = types.SimpleNamespace(
    compute_approx_kl=kl,
    compute_policy_loss=policy,
    compute_cispo_loss=cispo,
    compute_gspo_kl=gspo,
    vanilla_gae=gae,
    chunked_gae=gae,
    chunked_discounted_returns=returns,
    calculate_log_probs_and_entropy=logits,
)

TOKENS = torch.randint(17, (6,), generator=torch.Generator().manual_seed(9))
KEEP = randn(6, 17, seed=8) > 0
LISTS = [[randn(n, seed=k + n) for n in (3, 1, 4)] for k in range(3)]
MASKS = [torch.tensor([1, 0, 1]), torch.tensor([0]), torch.ones(4, dtype=torch.long)]
CASES = [
    *(
        ("compute_approx_kl", [2 * randn(9), 3 * randn(9, seed=1), kind], 0)
        for kind in ("k1", "k2", "k3", "low_var_kl")
    ),
    *(
        ("compute_approx_kl", [randn(9), randn(9, seed=1), kind, randn(9, seed=2).exp()], 0)
        for kind in ("k2", "low_var_kl")
    ),
    ("compute_policy_loss", [0.5 * randn(40), randn(40, seed=1), 0.2, 0.28], 0),
    ("compute_policy_loss", [randn(40), randn(40, seed=1), 0.2, 0.28, 1.5], 0),
    ("compute_cispo_loss", [0.5 * randn(40), randn(40, seed=1), randn(40, seed=2), 0.2, 0.28], 1),
    ("compute_cispo_loss", [0.5 * randn(40), randn(40, seed=1), randn(40, seed=2), 5.0, 0.28], 1),
    ("compute_gspo_kl", [LISTS[0], LISTS[1], [x[:2] for x in LISTS[2]], MASKS], 0),
    ("vanilla_gae", [randn(3, 150), randn(3, 150, seed=1), 0.99, 0.9], None),
    ("chunked_gae", [randn(3, 150), randn(3, 150, seed=1), 0.99, 0.9, 32], None),
    ("chunked_discounted_returns", [randn(3, 150), 0.97], None),
    ("calculate_log_probs_and_entropy", [randn(6, 17), TOKENS, None], 0),
    ("calculate_log_probs_and_entropy", [randn(6, 17), TOKENS, None, True, 4], 0),
    ("calculate_log_probs_and_entropy", [randn(6, 17), TOKENS, None, True, -1, KEEP], 0),
    ("calculate_log_probs_and_entropy", [randn(6, 17), TOKENS, None, True, -1, KEEP, False], 0),
    ("calculate_log_probs_and_entropy", [randn(6, 17), TOKENS, None, True, -1, None, False], 0),
]


def run(function, arguments, at, dtype):
    """Values, and the gradient of the argument ``at`` for unequal upstream gradients."""
    arguments = [_cast(x, dtype) for x in arguments]
    leaves = []
    if at is not None:
        leaves = arguments[at] if isinstance(arguments[at], list) else [arguments[at]]
        for x in leaves:
            x.requires_grad_()
    found = function(*arguments)
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    moving = [x for x in found if x.requires_grad]
    if leaves:
        total = sum((x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in moving)
        found += torch.autograd.grad(total, leaves)
    assert bool(moving) == bool(leaves)
    return [x.detach().double() for x in found]


def _cast(x, dtype):
    if isinstance(x, list):
        return [_cast(y, dtype) for y in x]
    return x.detach().to(dtype).clone() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def hold(system, truth, dtype, rtol):
    for name, arguments, at in CASES:
        want = run(getattr(truth, name), arguments, at, torch.float64)
        got = run(getattr(system, name), arguments, at, dtype)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
def test_values_and_gradients_are_those_of_the_formulas(dtype, rtol):
    hold(slime, TRUTH, dtype, rtol)


def test_one_percent_of_error_is_noticed(monkeypatch):
    for name in ("kl_estimate", "policy_loss", "sequence_means", "gae", "discounted_returns", "token_logprobs"):
        right = getattr(slime, name)

        def wrong(*args, right=right, **kwargs):
            found = right(*args, **kwargs)
            return tuple(1.01 * x for x in found) if isinstance(found, tuple) else 1.01 * found

        monkeypatch.setattr(slime, name, wrong)
        with pytest.raises(AssertionError):
            hold(slime, TRUTH, torch.float64, 1e-3)
        monkeypatch.undo()


@pytest.mark.skipif(not INSTALLED, reason="slime is not installed")
def test_slimes_own_functions_agree_and_every_call_of_the_patched_ones_is_ours():
    module = importlib.import_module(slime.MODULE)
    # Its softmax is fp32 whatever it gets.
    hold(slime, module, torch.float64, 1e-5)
    names = [name for name, _, _ in CASES]
    before = [getattr(module, name) for name in slime.FUNCTIONS]
    try:
        assert len(slime.patch().replaced) == len(slime.FUNCTIONS)
        hold(module, TRUTH, torch.float64, 1e-11)
        assert slime.status().calls == {name: names.count(name) for name in names} and not slime.status().delegations
    finally:
        slime.unpatch()
    assert all(getattr(module, name) is x for name, x in zip(slime.FUNCTIONS, before, strict=True))


@pytest.fixture
def fake(monkeypatch):
    """A host with slime's signatures, and a module of it that took the functions by name."""

    def install(old="", new=""):
        for name in ("slime", "slime.utils", slime.MODULE, "slime.loss"):
            module = types.ModuleType(name)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
        exec(SOURCE.replace(old, new), vars(sys.modules[slime.MODULE]))
        vars(sys.modules["slime.loss"]).update({n: vars(sys.modules[slime.MODULE]).get(n) for n in slime.FUNCTIONS})
        return sys.modules["slime.loss"]

    yield install
    slime.unpatch()


def test_patch_reaches_modules_that_took_a_function_by_name_and_unpatch_leaves_no_trace(fake):
    user = fake()
    before = dict(vars(user))
    report = slime.patch()
    assert len(report.replaced) == 2 * len(slime.FUNCTIONS) and slime.patch() == report
    losses, _ = user.compute_policy_loss(torch.tensor([0.0, -1.0]), torch.tensor([2.0, 1.0]), 0.2, 0.2)
    torch.testing.assert_close(losses, torch.tensor([-2.0, -1.2]))
    assert slime.status().calls == {"compute_policy_loss": 1}
    slime.unpatch()
    assert vars(user) == before and slime.status().replaced == ()


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("vanilla_gae", [torch.ones(1, 2), torch.ones(1, 2).requires_grad_(), 1.0, 1.0], "an argument requires a"),
        ("compute_approx_kl", [torch.ones(2, device="meta"), torch.ones(2), "k1"], "a tensor is on the device meta"),
        (
            "calculate_log_probs_and_entropy",
            [torch.ones(2, 3), torch.zeros(2, dtype=torch.long), types.SimpleNamespace(size=lambda: 2)],
            "the vocabulary is shared by 2 ranks",
        ),
    ],
)
def test_a_call_outside_our_domain_raises_or_goes_to_the_original_and_is_counted(fake, name, arguments, reason):
    user = fake()
    slime.patch()
    with pytest.raises(RuntimeError, match=f"{name}: {reason}"):
        getattr(user, name)(*arguments)
    slime.patch(strict=False)
    assert getattr(user, name)(*arguments) == "host"
    ((seam, why), count), *others = slime.status().delegations.items()
    assert seam == name and why.startswith(reason) and count == 1 and not others


@pytest.mark.fault(110)
def test_an_unknown_signature_and_a_foreign_patch_are_refused(fake, monkeypatch):
    user = fake("eps_clip_c", "eps_clip_dual")
    before = dict(vars(user))
    with pytest.raises(RuntimeError, match=r"slime: .*compute_policy_loss takes .*nothing was patched"):
        slime.patch()
    assert vars(user) == before
    fake()
    monkeypatch.setattr(sys.modules[slime.MODULE], "vanilla_gae", lambda rewards, values, gamma, lambd: "foreign")
    with pytest.raises(RuntimeError, match="another library has patched it"):
        slime.patch()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: slime.compute_approx_kl(x, x, "k4"), "kl_loss_type must be one of k1, k2, k3, low_var_kl, got 'k4'"),
        (lambda x: slime.compute_policy_loss(x, x, 0.2, 0.2, 1.0), "eps_clip_c must be greater than 1, got 1.0"),
        (
            lambda x: slime.calculate_log_probs_and_entropy(x, x, types.SimpleNamespace(size=lambda: 4)),
            "tp_group has 4 ranks, expected 1",
        ),
    ],
)
def test_a_bad_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3))


def test_no_rows_give_no_numbers():
    found = slime.calculate_log_probs_and_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), None, True)
    assert [x.shape for x in found] == [(0,), (0,)]


def test_the_examples_of_the_docstrings_run():
    found = doctest.testmod(slime)
    assert found.attempted > 8 and not found.failed


def test_losses_refuse_what_they_would_broadcast_or_cannot_take_by_name():
    x = torch.zeros(3)
    for name, tensors in (("compute_policy_loss", 2), ("compute_cispo_loss", 3)):
        function = getattr(slime, name)
        with pytest.raises(TypeError, match=f"{name}: ppo_kl must be a torch.Tensor"):
            function(None, *[x] * (tensors - 1), 0.2, 0.2)
        with pytest.raises(ValueError, match=rf"{name}: .* has shape \(3,\), expected \(1,\)"):
            function(x[:1], *[x] * (tensors - 1), 0.2, 0.2)
    with pytest.raises(TypeError, match="compute_cispo_loss: eps_clip must"):
        slime.compute_cispo_loss(x, x, x, None, 0.2)
