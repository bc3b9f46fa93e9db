"""verl itself: every function against verl's own, the patch and the way back, the plugin, verl's worker around ours."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import subprocesses
import torch
import verl_cases
from paths import ROOT

pytest.importorskip("verl", reason="pip install verl==0.9.1, and what it imports, behind this checkout")

import verl_originals  # noqa: E402
from verl.trainer.ppo import core_algos, rollout_corr_helper  # noqa: E402
from verl.utils import torch_functional  # noqa: E402
from verl.utils.experimental import torch_functional as experimental  # noqa: E402
from verl.utils.kernel import linear_cross_entropy as kernel  # noqa: E402
from verl.workers.utils import losses as worker  # noqa: E402

import rlkernels  # noqa: E402
from rlkernels.integrations import verl  # noqa: E402

SEEDS = int(os.environ.get("VERL_SEEDS", "24"))
CASES = verl_cases.cases(SEEDS)
KINDS = sorted({name.rsplit("-", 1)[0] for name in CASES})
MODULES = (core_algos, rollout_corr_helper, torch_functional, experimental, kernel, worker)


def held():
    """Everything that a patch may replace."""
    found = {(m.__name__, name): x for m in MODULES for name, x in vars(m).items() if callable(x)}
    for registry in (core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY):
        found |= {("registry", id(registry), name): x for name, x in registry.items()}
    return found


@pytest.fixture(autouse=True)
def unpatched():
    verl.unpatch()  # the plugin's names, where verl was imported with it
    before = held()
    yield
    verl.unpatch()
    after = held()
    assert after.keys() == before.keys() and all(after[key] is x for key, x in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_metrics_are_verls_own(kind):
    wrong = 0
    for name, case in CASES.items():
        if name.rsplit("-", 1)[0] != kind:
            continue
        truth = verl_originals.run(case)
        function = getattr(verl, case.name)
        exact = 1e-5 if "chunking" in name else 1e-6  # verl's chunks are fp32 for every input
        assert not verl_cases.differences(verl_originals.run(case, function=function), truth, exact), name
        found = verl_originals.run(case, torch.float32, function)
        assert not verl_cases.differences(found, truth, 2e-4), name
        for part in ("results", "gradients"):
            found[part] = [1.01 * x for x in found[part]]
        wrong += bool(verl_cases.differences(found, truth, 2e-4))
    assert wrong > SEEDS // 2, "an error of one percent passes"


def test_every_name_of_verls_registries_has_ours():
    verl.patch("names")
    for registry, extra in (
        (core_algos.POLICY_LOSS_REGISTRY, {"rlk_reinforce"}),
        (core_algos.ADV_ESTIMATOR_REGISTRY, set()),
    ):
        own = {name for name in registry if not name.startswith("rlk_")}
        assert {name for name in registry if name.startswith("rlk_")} == {f"rlk_{name}" for name in own} | extra
    assert core_algos.get_policy_loss_fn("rlk_vanilla") is not core_algos.get_policy_loss_fn("vanilla")


@pytest.mark.fault(108)
def test_a_patch_reaches_every_importer_and_twice_is_once():
    first = verl.patch()
    assert verl.patch() == first and first.host == "verl 0.9.1"
    assert worker.agg_loss is core_algos.agg_loss and "rlkernels" in core_algos.agg_loss.__globals__["__name__"]
    assert core_algos.ADV_ESTIMATOR_REGISTRY["grpo"] is core_algos.compute_grpo_outcome_advantage
    assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is core_algos.compute_policy_loss_vanilla
    assert verl_originals.original("compute_policy_loss_vanilla")  # never replaced
    assert (
        rlkernels.status()["verl"].replaced
        == verl.status().replaced
        == tuple(line.split(" -> ")[0] for line in first.replaced)
    )


@pytest.mark.parametrize(
    ("level", "module", "name"),
    [
        ("logits", torch_functional, "logprobs_from_logits"),
        ("fused", experimental, "FusedLinearForPPO"),
        ("losses", core_algos, "agg_loss"),
        ("advantages", core_algos, "compute_gae_advantage_return"),
        ("rollout", rollout_corr_helper, "compute_rollout_correction_weights"),
    ],
)
@pytest.mark.fault(108, 110)
def test_a_foreign_patch_and_an_unknown_signature_are_refused_and_nothing_is_replaced(level, module, name, monkeypatch):
    def foreign(*args):
        return args

    scope = dict(vars(module))
    exec(f"def {name}(renamed): return renamed", scope)
    for stranger, message in ((foreign, "another library has patched it"), (scope[name], "takes .'renamed',.")):
        monkeypatch.setattr(module, name, stranger)
        before = held()
        with pytest.raises(RuntimeError, match=f"verl 0.9.1: .*{name}.*{message}"):
            verl.patch()
        assert held() == before and not verl.status().replaced
        monkeypatch.undo()


def test_a_name_that_is_taken_is_refused(monkeypatch):
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "rlk_vanilla", print)
    with pytest.raises(RuntimeError, match="rlk_vanilla.*already"):
        verl.patch("names")


def test_an_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.import_module("verl"), "__version__", "0.11.0")
    with pytest.raises(RuntimeError, match="verl 0.11.0: known are 0.9.x; nothing was patched"):
        verl.patch()
    verl.patch(strict=False)


def worker_batch(seed):
    """A batch of verl's worker in the layout of its own tests: packed log-probabilities, padded columns."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    draw = torch.Generator().manual_seed(seed)
    rows, prompt, response = 5, 4, 9
    prompts = torch.randint(1, prompt + 1, (rows,), generator=draw)
    responses = torch.randint(1, response + 1, (rows,), generator=draw)
    responses[0] = response
    columns = torch.arange(prompt + response)
    attention = (columns >= prompt - prompts[:, None]) & (columns < prompt + responses[:, None])
    mask = attention[:, prompt:] & (torch.rand(rows, response, generator=draw) < 0.8)
    mask[:, 0] = True
    data = {name: torch.ones(rows, n, dtype=torch.long) for name, n in (("prompts", prompt), ("responses", response))}
    data |= {"attention_mask": attention.long(), "response_mask": mask.long()}
    for name in ("old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights", "values", "returns"):
        data[name] = torch.randn(rows, response, generator=draw)
    for name in ("old_log_probs", "ref_log_prob"):
        data[name] = -data[name].abs()
    data["rollout_is_weights"] = data["rollout_is_weights"].abs()
    batch = TensorDict(data, batch_size=rows)
    total = int((prompts + responses).sum())
    info = ({"dp_size": 1}, {"dp_size": 4, "batch_num_tokens": 123, "global_batch_size": 20})[seed % 2]
    for name in ("dp_size", "batch_num_tokens", "global_batch_size"):
        tensordict_utils.assign_non_tensor(batch, **{name: info.get(name)})
    logp = -3 * torch.rand(total, generator=draw)
    return logp, torch.rand(total, generator=draw), batch


def worker_loss(mode, seed):
    logp, entropy, batch = worker_batch(seed)
    settings = {
        **verl_cases.policy_case(mode.removeprefix("rlk_"), seed).settings,
        "loss_agg_mode": verl_cases.MODES[seed % 5],
        "entropy_coeff": 0.01,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_loss_type": ("low_var_kl", "k1", "k3+", "abs")[seed % 4],
        "global_batch_info": {},
    }
    settings["policy_loss"] = {**settings["policy_loss"], "loss_mode": mode}
    leaves = logp.requires_grad_(), entropy.requires_grad_()
    output = {"log_probs": leaves[0], "entropy": leaves[1]}
    loss, metrics = worker.ppo_loss(verl_originals.actor_config(settings), output, batch)
    loss.backward()
    found = {key: x.aggregate() if hasattr(x, "aggregate") else x for key, x in metrics.items()}
    return {"results": [loss.detach().double()], "gradients": [x.grad.double() for x in leaves], "metrics": found}


@pytest.mark.parametrize("mode", [name for name in verl_cases.LOSSES if name not in ("reinforce", "bypass_mode")])
def test_verls_worker_trains_the_same_with_our_loss_and_our_functions_below_it(mode):
    """``ppo_loss`` as it is: entropy bonus, KL term and metrics around the loss, in place on its result."""
    for seed in range(6):
        stock = worker_loss(mode, seed)
        verl.patch()
        ours = worker_loss(f"rlk_{mode}", seed)
        assert not verl_cases.differences(ours, stock, 1e-4), seed
        counts = verl.status()
        assert counts.calls[f"rlk_{mode}"] and counts.calls["kl_penalty"] and counts.calls["agg_loss"]
        assert not counts.delegations
        verl.unpatch()


def test_verls_critic_trains_the_same_with_our_functions():
    from verl.workers.config import CriticConfig

    def run(seed):
        values, _, batch = worker_batch(seed)
        values.requires_grad_()
        config = CriticConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=verl_cases.MODES[seed % 5]
        )
        loss, metrics = worker.value_loss(config, {"values": values}, batch)
        loss.backward()
        found = {key: x.aggregate() if hasattr(x, "aggregate") else x for key, x in metrics.items()}
        return {"results": [loss.detach().double()], "gradients": [values.grad.double()], "metrics": found}

    for seed in range(5):
        stock = run(seed)
        verl.patch("losses")
        assert not verl_cases.differences(run(seed), stock, 1e-4), seed
        assert verl.status().calls["compute_value_loss"]
        verl.unpatch()


@pytest.mark.fault(109)
def test_log_probabilities_that_are_one_percent_wrong_do_not_pass_in_verls_worker(monkeypatch):
    stock = worker_loss("vanilla", 0)
    verl.patch()
    padded = worker.no_padding_2_padding
    monkeypatch.setattr(worker, "no_padding_2_padding", lambda x, data: 1.01 * padded(x, data))
    assert len(verl_cases.differences(worker_loss("rlk_vanilla", 0), stock, 1e-3)) >= 3


def test_verls_advantages_are_the_same_through_its_own_dispatch():
    import numpy
    from verl.protocol import DataProto
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.ray_trainer import compute_advantage

    def run(name):
        draw = torch.Generator().manual_seed(3)
        mask = (torch.rand(8, 6, generator=draw) < 0.7).long()
        mask[:, 0] = 1
        tensors = {name: torch.randn(8, 6, generator=draw) for name in ("token_level_rewards", "values")}
        tensors["response_mask"] = mask
        if name.endswith("remax"):  # some of verl's own take no such argument
            tensors["reward_baselines"] = torch.randn(8, generator=draw)
        uid = numpy.array([f"u{i // 2}" for i in range(8)], dtype=object)
        data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": uid})
        config = AlgoConfig(gamma=0.9, lam=0.8)
        data = compute_advantage(data, name, gamma=0.9, lam=0.8, config=config)
        return torch.where(mask != 0, data.batch["advantages"].double(), 0.0)

    names = [n for n in core_algos.ADV_ESTIMATOR_REGISTRY if "optimal" not in n and n != "gdpo"]
    stock = {name: run(name) for name in names}
    verl.patch()
    for name, x in stock.items():
        torch.testing.assert_close(run(name), x, rtol=1e-4, atol=1e-5)
        if name != "gae":  # verl passes values to this name alone
            torch.testing.assert_close(run(f"rlk_{name}"), x, rtol=1e-4, atol=1e-5)
    calls = verl.status().calls
    assert all(calls[core_algos.ADV_ESTIMATOR_REGISTRY[name].__name__] for name in names)


def test_outside_of_our_domain_a_call_raises_or_goes_to_verls_own_and_is_counted():
    reference = torch.zeros(2, requires_grad=True)
    case = verl_cases.baseline_case("optimal_token_baseline", 0)
    case.args["handle_zero_tail"] = False
    truth = verl_originals.run(case)
    for strict in (True, False):
        verl.patch(strict=strict)
        if strict:
            with pytest.raises(RuntimeError, match=r"kl_penalty: a gradient of the reference.*patch\(strict=False\)"):
                core_algos.kl_penalty(torch.zeros(2), reference, "kl")
            continue
        core_algos.kl_penalty(torch.zeros(2), reference, "kl").sum().backward()
        assert reference.grad.tolist() == [-1.0, -1.0]
        function = core_algos.compute_optimal_token_baseline_advantage
        assert not verl_cases.differences(verl_originals.run(case, function=function), truth, 1e-12)
        hidden, weight, ids = torch.randn(3, 4), torch.randn(7, 4, dtype=torch.float64), torch.tensor([1, 2, 3])
        with pytest.raises(RuntimeError):  # verl's own refuses the two dtypes, too
            experimental.FusedLinearForPPO()(hidden, weight, ids)
    assert {name for name, _ in verl.status().delegations} == {
        "kl_penalty",
        "compute_optimal_token_baseline_advantage",
        "FusedLinearForPPO",
    }


def test_the_entropy_of_an_engine_compiles():
    """verl's engines bind ``torch.compile(entropy_from_logits, dynamic=True)`` when they are built."""
    verl.patch("logits")
    logits = torch.randn(4, 11, requires_grad=True)
    compiled = torch.compile(torch_functional.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
    found = compiled(logits)
    found.sum().backward()
    p = logits.detach().double().requires_grad_()
    truth = -(p.softmax(-1) * p.log_softmax(-1)).sum(-1)
    truth.sum().backward()
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.fault(109)
@pytest.mark.parametrize("variable", ["", "verl"])
def test_the_plugin_is_loaded_through_the_entry_point_of_our_metadata(tmp_path, variable):
    """A process of its own, with metadata that setuptools makes of pyproject.toml."""
    made = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    home = pathlib.Path(importlib.import_module("verl").__file__).parents[1]
    path = os.pathsep.join([str(tmp_path), subprocesses.PATH, str(home)])
    found = subprocesses.code(
        """
        import sys
        import torch
        import verl
        import verl.utils.torch_functional as functional
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, get_policy_loss_fn

        assert "rlkernels.integrations.verl.plugin" in sys.modules, "verl did not load the entry point"
        assert get_policy_loss_fn("rlk_gspo") and "rlk_rloo" in ADV_ESTIMATOR_REGISTRY
        from verl.workers.config import ActorConfig
        config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
        x = torch.full((2, 3), -1.0)
        losses = [get_policy_loss_fn(n)(x, x, x, x != 0, "token-mean", config)[0] for n in ("rlk_vanilla", "vanilla")]
        assert losses[0] == losses[1] == 1.0
        functional.logprobs_from_logits(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
        import rlkernels
        state = rlkernels.status()["verl"]
        print(state.calls, any("logprobs_from_logits" in label for label in state.replaced))
        """,
        PYTHONPATH=path,
        RLKERNELS_PATCH=variable,
    )
    assert found.returncode == 0, found.stderr
    patched = variable == "verl"
    calls = {"rlk_vanilla": 1, **({"logprobs_from_logits": 1} if patched else {})}
    assert all(f"'{name}': {count}" in found.stdout for name, count in calls.items()), found.stdout
    assert found.stdout.strip().endswith(str(patched)) and "not active" not in found.stderr
