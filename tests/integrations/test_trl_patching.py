"""What ``patch`` accepts and refuses, that it is all or nothing, and that ``unpatch`` leaves no trace."""

import importlib
import sys
import types

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1.15")  # test_trl_parity.py takes older ones, too

from trl.trainer import reward_trainer, utils  # noqa: E402

from rlkernels.integrations import trl as integration  # noqa: E402

SEAMS = [
    (utils, "_ChunkedLogProbFunction"),
    (importlib.import_module("trl.kernels"), "ChunkedLogProbFunction"),
    (reward_trainer, "nn"),
]


@pytest.fixture(autouse=True)
def unpatched():
    before = [getattr(*seam) for seam in SEAMS]
    yield
    integration.unpatch()
    assert all(getattr(*seam) is held for seam, held in zip(SEAMS, before, strict=True))


@pytest.mark.fault(108)
def test_patching_twice_is_patching_once():
    first = integration.patch()
    held = [getattr(*seam) for seam in SEAMS]
    assert integration.patch() == first
    assert all(getattr(*seam) is ours for seam, ours in zip(SEAMS, held, strict=True))
    assert integration.status().replaced == tuple(line.split(" -> ")[0] for line in first.replaced)


def test_levels_are_patched_one_by_one():
    original = utils._ChunkedLogProbFunction
    integration.patch(level="pairs")
    assert utils._ChunkedLogProbFunction is original and reward_trainer.nn is not torch.nn
    integration.patch(level="fused")
    assert utils._ChunkedLogProbFunction is not original
    integration.unpatch()
    assert reward_trainer.nn is torch.nn
    with pytest.raises(ValueError, match="level must be one of .*got 'loss'"):
        integration.patch(level="loss")


@pytest.mark.fault(108)
def test_patching_over_another_library_raises_and_replaces_nothing(monkeypatch):
    class Foreign:
        apply = staticmethod(lambda *args: None)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Foreign)
    with pytest.raises(RuntimeError, match="another library has patched it"):
        integration.patch()
    assert (
        utils._ChunkedLogProbFunction is Foreign
        and reward_trainer.nn is torch.nn
        and integration.status().replaced == ()
    )
    monkeypatch.undo()
    monkeypatch.setattr(reward_trainer, "nn", types.SimpleNamespace(functional=torch.nn.functional))
    with pytest.raises(RuntimeError, match=r"reward_trainer\.nn is .* not torch\.nn"):
        integration.patch()
    assert isinstance(utils._ChunkedLogProbFunction, type)


@pytest.mark.fault(108)
def test_a_foreign_patch_over_ours_is_reported_and_left_alone(monkeypatch):
    integration.patch()
    ours, foreign = utils._ChunkedLogProbFunction, object()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", foreign)
    for action in (integration.patch, integration.unpatch):
        with pytest.raises(
            RuntimeError, match="was replaced by .* after our patch; undo that one first, nothing was changed"
        ):
            action()
        assert utils._ChunkedLogProbFunction is foreign and reward_trainer.nn is not torch.nn
    assert "trl.trainer.utils._ChunkedLogProbFunction" not in integration.status().replaced
    monkeypatch.undo()
    assert utils._ChunkedLogProbFunction is ours


@pytest.mark.fault(109)
def test_a_name_bound_before_or_after_the_patch_is_ours_and_is_restored(monkeypatch):
    original = utils._ChunkedLogProbFunction
    early, late = types.ModuleType("trl.experimental.early"), types.ModuleType("trl.experimental.late")
    early.Head = original
    monkeypatch.setitem(sys.modules, early.__name__, early)
    report = integration.patch()
    late.Head = utils._ChunkedLogProbFunction
    monkeypatch.setitem(sys.modules, late.__name__, late)
    assert early.Head is late.Head is not original
    assert "trl.experimental.early.Head -> rlkernels (fused)" in report.replaced
    integration.unpatch()
    assert early.Head is late.Head is original


def fake_trl(monkeypatch, version, parameters):
    """Modules named like TRL's whose head takes ``parameters``."""
    scope = {}
    exec(f"class Head:\n    @staticmethod\n    def forward({', '.join(parameters)}): ...\n", scope)
    scope["Head"].__module__ = "trl.kernels.chunked_logprob"
    package, trainer, fake = (types.ModuleType(name) for name in ("trl", "trl.trainer", "trl.trainer.utils"))
    package.__version__, fake._ChunkedLogProbFunction = version, scope["Head"]
    for module in (package, trainer, fake):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


KNOWN = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)


# A renamed parameter, one argument fewer (TRL 1.12), and one more at the end: each has happened between two releases.
@pytest.mark.fault(110)
@pytest.mark.parametrize("parameters", [("ctx", "hidden", "head", *KNOWN[3:]), KNOWN[:-2], (*KNOWN, "row_mask")])
def test_an_unknown_signature_is_refused_and_nothing_is_replaced(monkeypatch, parameters):
    fake = fake_trl(monkeypatch, "1.16.9", parameters)
    before = fake._ChunkedLogProbFunction
    for strict in (True, False):
        with pytest.raises(RuntimeError) as error:
            integration.patch(strict=strict)
        message = str(error.value)
        assert (
            "TRL 1.16.9" in message
            and str(parameters) in message
            and str(KNOWN) in message
            and "nothing was patched" in message
        )
    assert (
        fake._ChunkedLogProbFunction is before and integration.status().replaced == () and reward_trainer.nn is torch.nn
    )


@pytest.mark.fault(110)
def test_a_reward_loss_without_logsigmoid_is_refused_and_the_head_stays(monkeypatch):
    original = utils._ChunkedLogProbFunction
    scope = dict(vars(reward_trainer))
    exec("def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None): ...", scope)
    monkeypatch.setattr(trl.RewardTrainer, "compute_loss", scope["compute_loss"])
    with pytest.raises(RuntimeError, match="does not call nn.functional.logsigmoid of its module; nothing was patched"):
        integration.patch()
    assert utils._ChunkedLogProbFunction is original


@pytest.mark.fault(110)
def test_unknown_versions_are_refused_unless_newer_and_asked_for(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.11.0")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"TRL 1\.11\.0: known are 1\.12\.x, .*, 1\.16\.x; nothing was patched"):
            integration.patch(strict=strict)
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    with pytest.raises(RuntimeError, match=r"TRL 1\.99\.0.*strict=False"):
        integration.patch()
    assert reward_trainer.nn is torch.nn
    assert integration.patch(strict=False).host == "TRL 1.99.0"
