from pkgutil import resolve_name
from typing import get_args

import pytest
import torch
from torch import nn

from vitcut.errors import ConfigError, ExactnessError
from vitcut.names import RuntimeName
from vitcut.runtimes import session as session_module
from vitcut.runtimes.session import RUNTIMES, prepare_sessions, require_parity, torch_threads
from vitcut.settings import require_runtime


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 4 * 4, 5))


IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def test_a_session_gives_the_logits_of_the_model_in_evaluation_mode():
    model = tiny_model()
    (session,) = prepare_sessions("torch", model, [IMAGES], threads=1)
    assert torch.equal(session.run(IMAGES), model.eval()(IMAGES))
    assert (session.runtime, session.batch, session.threads) == ("torch", 2, 1)


def test_preparing_leaves_the_model_as_it_was():
    model = tiny_model()
    prepare_sessions("torch", model, [IMAGES], threads=1)
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


def test_later_training_does_not_reach_a_session():
    model = tiny_model()
    (session,) = prepare_sessions("torch", model, [IMAGES], threads=1)
    before = session.run(IMAGES)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(session.run(IMAGES), before)


def test_an_unknown_runtime_is_refused_with_a_list_of_those_there():
    with pytest.raises(ConfigError, match="torch, torch-compile, onnxruntime, openvino, got 'pt2'"):
        require_runtime("pt2")


@pytest.mark.parametrize(
    ("name", "install"),
    [("onnxruntime", "onnx"), ("openvino", "openvino")],
)
def test_a_runtime_whose_package_is_missing_says_what_to_install(monkeypatch, name, install):
    def fail(_):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(session_module, "resolve_name", fail)
    with pytest.raises(ConfigError, match=rf'pip install "vitcut\[{install}\]"$'):
        prepare_sessions(name, tiny_model(), [IMAGES], threads=1)


def test_there_is_one_session_for_each_batch_size():
    sessions = prepare_sessions("torch", tiny_model(), [IMAGES[:1], IMAGES], threads=1)
    assert [session.batch for session in sessions] == [1, 2]


def test_no_example_is_refused():
    with pytest.raises(ConfigError, match="at least one example batch"):
        prepare_sessions("torch", tiny_model(), [], threads=1)


def test_no_threads_are_refused():
    with pytest.raises(ConfigError, match="threads must be between 1 and"):
        prepare_sessions("torch", tiny_model(), [IMAGES], threads=0)


def test_every_runtime_has_an_entry_that_prepares_sessions():
    assert set(RUNTIMES) == set(get_args(RuntimeName))
    assert all(callable(resolve_name(entry)) for entry in RUNTIMES.values())


def test_the_thread_count_comes_back_after_an_error():
    before = torch.get_num_threads()
    seen: list[int] = []

    def fail() -> None:
        with torch_threads(before + 1):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("scale", "difference", "accepted"),
    [(0.1, 0.9e-4, True), (0.1, 1.1e-4, False), (50.0, 4e-3, True), (50.0, 6e-3, False)],
)
def test_parity_allows_float32_rounding_of_the_largest_logit(scale, difference, accepted):
    expected = torch.tensor([[scale, 0.0]], dtype=torch.float64)
    got = expected + torch.tensor([[0.0, difference]])
    if accepted:
        require_parity(got, expected, runtime="onnxruntime")
        return
    with pytest.raises(ExactnessError, match="onnxruntime differs from torch"):
        require_parity(got, expected, runtime="onnxruntime")


def test_parity_refuses_nan_and_other_shapes():
    with pytest.raises(ExactnessError, match="NaN"):
        require_parity(torch.full((1, 2), torch.nan), torch.zeros(1, 2), runtime="onnxruntime")
    with pytest.raises(ExactnessError, match="shape"):
        require_parity(torch.zeros(1, 1), torch.zeros(1, 2), runtime="onnxruntime")
