"""Training graphs: pcfast.training on them, generative models of digits, and --task on the command line."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from pages import DOCS, blocks_of_code
from torch import nn

import pcfast
from pcfast import datasets, networks, training
from pcfast.cli import pcfast as command
from pcfast.losses import half_squared_error
from pcfast.training.generation import draw_images, samples


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", shape="flat")


def test_a_generative_model_beats_principal_components(digits):
    """The worked example, at its length: reconstructions of the test images, against PCA of the same width."""
    (block,) = (b for b in blocks_of_code((DOCS / "graphs.md").read_text()) if "def train_decoder" in b)
    page: dict = {"__name__": "page"}
    exec(compile(block.split("\ndata = ")[0], "graphs.md", "exec"), page)
    x, test = digits.x_train, digits.x_test
    net, settings = page["train_decoder"](x)
    z = page["latents"](net, settings, test)
    with torch.no_grad():
        error = (net(z=z) - test).square().sum(1).mean()
    mean = x.mean(0)
    components = torch.linalg.svd(x - mean, full_matrices=False)[2][:16]
    principal = (test - mean - (test - mean) @ components.t() @ components).square().sum(1).mean()
    assert z.shape == (360, 16) and error < 0.95 * principal, float(error)
    drawn = page["sample"](net, page["latents"](net, settings, x), 200)
    # samples lie about as far from the nearest training image as test images do
    distances = [torch.cdist(rows, x).min(1).values.mean() for rows in (drawn, test, torch.rand(200, 64))]
    assert distances[0] < 1.5 * distances[1] < distances[2]


def test_train_takes_graphs_and_resumes(digits, tmp_path):
    small = digits._replace(x_train=digits.x_train[:200], y_train=digits.y_train[:200])

    def run(epochs, folder, resume=False):
        torch.manual_seed(0)
        net = networks.residual_mlp([64, 16, 16, 10])
        settings = {"batch_size": 50, "num_steps": 3, "node_precision": {"h1": 2.0}, "progress": False}
        history = training.train(net, small, epochs=epochs, out=tmp_path / folder, resume=resume, **settings)
        return net.state_dict(), history

    whole, history = run(2, "whole")
    run(1, "parts")
    resumed, _ = run(2, "parts", resume=True)
    assert history.of_classes and all(torch.equal(v, resumed[name]) for name, v in whole.items())
    net = networks.residual_mlp([64, 16, 16, 10])
    with pytest.raises(pcfast.ArgumentError, match="task"):
        training.train(net, small, epochs=1, task="dream", progress=False)
    with pytest.raises(pcfast.ArgumentError, match=r"with a pcfast\.Prior"):
        training.train(net, small, epochs=1, task="reconstruct", progress=False)
    with pytest.raises(pcfast.ArgumentError, match=r"settings|node_precision"):
        training.train(
            net,
            small,
            epochs=2,
            out=tmp_path / "whole",
            resume=True,
            batch_size=50,
            num_steps=3,
            progress=False,
        )


def cli(*arguments) -> str:
    result = CliRunner().invoke(command, ["train", *map(str, arguments)])
    return result.output + str(result.exception or "")


@pytest.mark.parametrize("task", ["reconstruct", "generate"])
def test_tasks_on_the_command_line(task, tmp_path):
    given = ("--task", task, "--widths", "12", "--latent", 3, "--num-steps", 4)
    whole = cli(*given, "--epochs", 2, "--out", tmp_path / "whole")
    assert "test R^2" in whole and (tmp_path / "whole" / "samples.png").read_bytes()[:4] == b"\x89PNG"
    cli(*given, "--epochs", 1, "--out", tmp_path / "parts")
    cli("--resume", "--epochs", 2, "--out", tmp_path / "parts")
    runs = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(v, runs[1]["model"][name]) for name, v in runs[0]["model"].items())
    assert runs[0]["config"]["kept"]["latent"] == 3 and ("h1.0.1.weight" in runs[0]["model"]) == (
        task == "generate"
    )


def test_what_decoders_have_no_use_for_is_refused(tmp_path):
    for wrong in (("--net", "cnn"), ("--preset", "pcx"), ("--loss", "mse")):
        assert "Its network is a decoder" in cli("--task", "generate", *wrong, "--out", tmp_path)
    assert "--latent with --task classify" in cli("--latent", 3, "--out", tmp_path)


def test_samples_have_the_latents_moments(tmp_path):
    net = pcfast.Graph({"z": pcfast.Prior(2), "x": (nn.Identity(), "z")})
    torch.manual_seed(0)
    z = torch.randn(4000, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.3]]) + torch.tensor([2.0, -1.0])
    drawn = samples(net, {"z": z}, 4000)
    torch.testing.assert_close(drawn.mean(0), z.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.t()), torch.cov(z.t()), atol=0.1, rtol=0)
    draw_images([torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)], tmp_path / "a.png", titles=["a", "b"])
    with pytest.raises(pcfast.ArgumentError, match="one length"):
        draw_images([torch.rand(2, 1, 4, 4), torch.rand(3, 1, 4, 4)], tmp_path / "a.png", titles=["a", "b"])


def test_reconstruction_loss_is_of_the_last_iteration(digits):
    from pcfast.autograd import reconstruction_loss
    from pcfast.problem.settings import Settings

    torch.manual_seed(0)
    net, y = networks.decoder(4, [8, 64]), digits.x_train[:6]
    settings = Settings(half_squared_error, "strict", 0.1, 9)
    loss, output = reconstruction_loss(settings, net, y, y, return_output=True)
    loss.backward()
    settled = pcfast.relax(net, y=y, loss=half_squared_error, num_steps=8)
    truth = net.x(settled.beliefs["h1"])
    torch.testing.assert_close(output, truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.detach(), half_squared_error(truth, y).detach(), rtol=1e-5, atol=1e-6)
    updates = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    pcfast.pc_loss(net, y=y, loss=half_squared_error, num_steps=9).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(updates, net.parameters(), strict=True))
