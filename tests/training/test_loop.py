"""The local loop: the right gradient, the right schedule, the same bits."""

from __future__ import annotations

import gc
import math
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feddm_flwr.compute import cuda_graph, device
from feddm_flwr.config import RunConfig, parse
from feddm_flwr.data.images import Images
from feddm_flwr.data.node_data import NodeData, load_node
from feddm_flwr.models import networks, parameters
from feddm_flwr.training import loop, step
from feddm_flwr.training.examples import Pixels
from feddm_flwr.training.gradient_terms import Proximal
from feddm_flwr.training.loop import Progress
from feddm_flwr.training.objectives import Denoising
from feddm_flwr.vector import Vector

CPU = torch.device("cpu")
SMALL = {"model.preset": "tiny", "train.local-steps": 12, "train.batch-size": 16, "train.warmup-steps": 0}


def config(**keys: object) -> RunConfig:
    return parse({**SMALL, **{k.replace("__", "."): v for k, v in keys.items()}})


def node_of_four(c: RunConfig) -> NodeData:
    return load_node(c.data, c.seed, (0, 4), None, Path(tempfile.gettempdir()) / "feddm-tests")


def objective(c: RunConfig, images: Images) -> Denoising:
    pixels = Pixels(np.array(images), c.data.flip, CPU)
    return Denoising(c, pixels, np.zeros(len(images), np.int64), CPU)


def trained(c: RunConfig, name: str = "node-0", number: int = 1) -> tuple[Vector, loop.Trained]:
    network = networks.build(c, {})
    data = node_of_four(config())
    result = loop.train(network, objective(c, data.train), c, name, Progress(number, 0), CPU)
    return parameters.to_vector(network), result


def test_the_proximal_gradient_is_that_of_the_objective() -> None:
    """autograd of F(w) + mu/2 ||w - w_t||^2 equals F's gradient plus what we add."""
    mu = 0.37
    w = [torch.randn(5, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
    received = [torch.randn_like(p) for p in w]
    distance = sum((p - q).square().sum() for p, q in zip(w, received, strict=True))
    objective = sum((p**3).sum() for p in w) + mu / 2 * distance
    expected = torch.autograd.grad(objective, w)
    sum((p**3).sum() for p in w).backward()
    term = Proximal(mu)
    term.start(received)
    term.add(w)
    for p, gradient in zip(w, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_a_strong_proximal_term_holds_the_weights_back() -> None:
    initial = parameters.to_vector(networks.build(config(), {}))
    free, held = (
        np.linalg.norm(trained(c)[0] - initial) for c in (config(), config(strategy="feddm-prox", train__mu=100.0))
    )
    assert held < 0.7 * free


def test_the_loss_falls() -> None:
    losses = [trained(config(**{"train__local-steps": n}))[1].loss for n in (5, 60)]
    assert losses[1] < 0.85 * losses[0]


def test_the_same_seed_gives_the_same_bits_and_others_do_not() -> None:
    vector = trained(config())[0].tobytes()
    assert trained(config())[0].tobytes() == vector
    assert trained(config(), name="node-1")[0].tobytes() != vector
    assert trained(config(), number=2)[0].tobytes() != vector
    assert trained(config(seed=1))[0].tobytes() != vector


def test_dropout_is_seeded_and_leaves_the_global_generator_alone() -> None:
    c = config(model__dropout=0.3)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    vector = trained(c)[0].tobytes()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert trained(c)[0].tobytes() == vector


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_objective_trains(prediction: str, precision: str) -> None:
    c = config(
        diffusion__prediction=prediction,
        diffusion__schedule="cosine" if prediction == "flow" else "linear",
        train__precision=precision,
        data__flip=True,
        **{"diffusion__min-snr-gamma": 5.0},
    )
    vector, result = trained(c)
    assert np.isfinite(vector).all()
    assert result.steps == 12


@pytest.mark.parametrize("count", [1, 2, 5, 35])
def test_a_held_out_loss_is_of_all_noise_levels_however_few_images_there_are(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, seen = config(), []

    def predict(self: Denoising, network: object, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.extend(drawn[1].tolist())
        return drawn[0], drawn[0]

    monkeypatch.setattr(Denoising, "_predict", predict)
    objective(c, node_of_four(c).held_out).fixed_losses(networks.build(c, {}), count, "node")
    assert len(seen) == count
    assert np.mean(seen) == pytest.approx(499.5, abs=1)
    assert np.diff([0, *seen, 999]).max() <= math.ceil(1000 / count)


def test_epochs_are_passes_over_the_images() -> None:
    images = len(node_of_four(config()).train)
    c = config(**{"train__local-steps": 0, "train__local-epochs": 2, "train__batch-size": 50})
    assert trained(c)[1].steps == 2 * math.ceil(images / 50)
    order = loop._batches(10, 4, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(order) for _ in range(3)]) for _ in range(2)]
    assert all(sorted(e.tolist()) == list(range(10)) for e in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_slow_node_stops_in_time_and_says_how_far_it_came() -> None:
    _, whole = trained(config(**{"train__local-steps": 3, "train__max-seconds": 1000.0}))
    _, part = trained(config(**{"train__local-steps": 100_000, "train__max-seconds": 0.5}))
    assert whole.steps == 3
    assert 1 <= part.steps < 100_000
    assert math.isfinite(part.loss)


def test_a_process_serves_one_run_after_another_with_the_settings_of_each() -> None:
    before = torch.get_num_threads()
    try:
        device.prepare_process(config(train__threads=3, train__deterministic=True).train)
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
        device.prepare_process(config().train)
        assert torch.get_num_threads() == device._CORES
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(before)


def test_a_loss_that_is_not_finite_stops_the_node() -> None:
    with pytest.raises(FloatingPointError, match="the training loss of node-0 became"):
        trained(config(**{"train__learning-rate": 1e25, "train__precision": "fp32"}))


def test_the_learning_rate_goes_on_across_rounds() -> None:
    c = config(**{"train__warmup-steps": 30, "num-server-rounds": 5, "train__learning-rate": 1.0})
    rates = [loop.learning_rate(c, Progress(r, 12 * (r - 1)), s, 12) for r in range(1, 6) for s in range(12)]
    top = int(np.argmax(rates))
    assert 20 <= top <= 32
    assert np.all(np.diff(rates[: top + 1]) > 0)
    assert np.all(np.diff(rates[top:]) < 0)
    assert rates[-1] < 0.01
    flat = config(**{"train__warmup-steps": 0, "train__lr-schedule": "constant", "train__learning-rate": 0.5})
    assert {loop.learning_rate(flat, Progress(r, 0), s, 12) for r in (1, 5) for s in (0, 11)} == {0.5}


def test_evaluation_leaves_parameters_that_can_be_trained() -> None:
    """Also where evaluation moves or replaces their storage, as a move to a GPU does."""
    c, data = config(), node_of_four(config())
    network = networks.build(c, {})._apply(lambda p: p.clone())
    objective(c, data.held_out).held_out(network, 256, "node-0")
    assert not any(p.is_inference() for p in network.parameters())
    loop.train(network, objective(c, data.train), c, "node-0", Progress(1, 0), CPU)


def test_held_out_loss_is_the_same_every_time_and_knows_a_better_model() -> None:
    c = config(**{"train__local-steps": 60})
    held_out = objective(c, node_of_four(c).held_out)
    network = networks.build(c, {})
    first = held_out.held_out(network, 256, "node-0")
    assert held_out.held_out(network, 256, "node-0") == first
    loop.train(network, objective(c, node_of_four(c).train), c, "node-0", Progress(1, 0), CPU)
    assert held_out.held_out(network, 256, "node-0").loss < 0.8 * first.loss
    assert np.mean(first.levels) == pytest.approx(first.loss, rel=0.05)
    assert math.isnan(held_out.held_out(network, 0, "node-0").loss)


def test_pieces_of_a_batch_give_its_gradient_and_memory_that_runs_out_makes_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(config(train__precision="fp32"))[0]
    pieces = trained(config(train__precision="fp32", **{"train__micro-batch": 5}))[0]
    np.testing.assert_allclose(pieces, whole, atol=2e-4)
    losses = Denoising.losses

    def little_memory(self: Denoising, network: torch.nn.Module, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if len(drawn[0]) > 5:
            raise torch.OutOfMemoryError
        return losses(self, network, drawn)

    monkeypatch.setattr(Denoising, "losses", little_memory)
    np.testing.assert_allclose(trained(config(train__precision="fp32"))[0], whole, atol=2e-4)
    assert caplog.text.count("out of memory") == 2  # 16 to 8 to 4, once for all steps


def test_what_a_piece_held_is_gone_when_smaller_ones_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, whole, alive = Denoising.losses, [], []

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise torch.OutOfMemoryError

    def backward_fails(self: Denoising, network: torch.nn.Module, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        alive.extend(graph() is not None for graph in whole)
        loss: torch.Tensor = losses(self, network, drawn)
        if len(drawn[0]) > 8:
            loss = Full.apply(loss)
            whole.append(weakref.ref(loss.grad_fn))
        return loss

    monkeypatch.setattr(Denoising, "losses", backward_fails)
    trained(config(train__precision="fp32", **{"train__local-steps": 1}))
    assert alive == [False, False]


def test_what_a_training_held_is_gone_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when garbage is collected: on a GPU it is a graph, and the memory of a whole step."""
    held: list[weakref.ref[Any]] = []
    before = step.Step.__init__

    def init(self: step.Step, *inputs: Any) -> None:
        before(self, *inputs)
        held.extend([weakref.ref(self), weakref.ref(self._recording)])

    monkeypatch.setattr(step.Step, "__init__", init)
    gc.disable()
    try:
        trained(config())
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


def test_a_recording_that_fails_half_way_leaves_no_gradients_to_the_step_that_is_done_instead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = config(train__precision="fp32", **{"train__local-steps": 3, "train__micro-batch": 8})
    expected, take = trained(c)[0], cuda_graph.CudaGraph.__call__

    def fails(self: cuda_graph.CudaGraph, function: Any, *inputs: torch.Tensor) -> torch.Tensor:
        own = function.__self__
        own._objective.losses(own._model, inputs).sum().backward()  # what was recorded until then
        return take(self, function, *inputs)

    monkeypatch.setattr(cuda_graph.CudaGraph, "__call__", fails)
    np.testing.assert_array_equal(trained(c)[0], expected)


def test_what_was_not_recorded_yet_is_not_given_up() -> None:
    """Memory that runs out in the first step must not cost the recording of the others."""
    one = cuda_graph.CudaGraph(CPU)
    one._left = 1
    assert not one.drop()
    assert one._left == 1


def test_memory_that_a_recording_holds_is_given_up_before_a_batch_is_cut(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c, losses, held = config(train__precision="fp32"), Denoising.losses, [True]
    expected = trained(c)[0]

    def full(self: Denoising, network: torch.nn.Module, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if held[0]:
            raise torch.OutOfMemoryError
        return losses(self, network, drawn)

    def drop(_: cuda_graph.CudaGraph) -> bool:
        was, held[0] = held[0], False
        return was

    monkeypatch.setattr(Denoising, "losses", full)
    monkeypatch.setattr(cuda_graph.CudaGraph, "drop", drop)
    np.testing.assert_array_equal(trained(c)[0], expected)
    assert "without a CUDA graph" in caplog.text
    assert "images at a time" not in caplog.text


def test_a_compiled_network_trains_like_the_one_that_it_was_compiled_from(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c = config(train__precision="fp32", **{"train__micro-batch": 5})  # and a piece of 1, which is not compiled
    expected = trained(c)[0]
    compiler = torch.compile(dynamic=False, backend="aot_eager")  # all of it but the making of kernels
    monkeypatch.setattr(step, "_compiled", lambda network, *_: compiler(network))
    np.testing.assert_allclose(trained(c)[0], expected, atol=2e-4)
    assert "train.compile" not in caplog.text


def test_a_network_that_cannot_be_compiled_or_not_well_is_trained_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c = config(train__precision="fp32")
    expected = trained(c)[0]

    def broken(*_: Any) -> Any:
        raise RuntimeError("no C compiler")

    def wrong(network: torch.nn.Module) -> Any:
        """Its gradients below the last convolution are 0, as torch 2.13 has them on a CPU below the upsampling."""
        last = network.get_submodule("conv_out")

        def forward(*inputs: Any) -> Any:
            hook = last.register_forward_pre_hook(lambda _, x: tuple(one.detach() for one in x))
            try:
                return network(*inputs)
            finally:
                hook.remove()

        return forward

    for compiled, why in ((lambda _: broken, "no C compiler"), (wrong, "times what they should be")):
        monkeypatch.setattr(step, "_compiled", lambda network, *_, make=compiled: make(network))
        np.testing.assert_array_equal(trained(c)[0], expected)
        assert why in caplog.text
