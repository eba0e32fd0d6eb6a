"""FlipAndCrop against every image that it may give, and normalized against float64."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from pcfast.datasets import Data, FlipAndCrop, normalized
from pcfast.errors import ArgumentError, ArgumentTypeError

SHAPE = (3, 4, 5)  # of a sample


def pixel(image: Tensor, fill: tuple[float, ...], channel: int, row: int, column: int) -> float:
    """Of the image continued in every direction by its fill."""
    inside = 0 <= row < image.shape[1] and 0 <= column < image.shape[2]
    return image[channel, row, column].item() if inside else fill[channel]


def changed(image: Tensor, mirrored: bool, top: int, left: int, padding: int, fill=(0.0, 0.0, 0.0)) -> Tensor:
    """One sample, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.empty_like(image)
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                r, c = row + top - padding, column + left - padding
                out[channel, row, column] = pixel(image, fill, channel, r, width - 1 - c if mirrored else c)
    return out


def candidates(image: Tensor, padding: int, fill=(0.0, 0.0, 0.0)) -> dict[tuple, Tensor]:
    places = range(2 * padding + 1)
    return {
        (mirrored, top, left): changed(image, mirrored, top, left, padding, fill)
        for mirrored in (False, True)
        for top in places
        for left in places
    }


def draws_by_content(known: dict[tuple, Tensor]) -> dict[bytes, tuple]:
    """The draw that gives an image, by the image's bytes."""
    by_content = {image.numpy().tobytes(): draw for draw, image in known.items()}
    assert len(by_content) == len(known)
    return by_content


def images(count: int, dtype=torch.float32) -> Tensor:
    """No two pixels alike, none 0."""
    return torch.arange(1, 1 + count * 60).reshape(count, *SHAPE).to(dtype)


@pytest.mark.parametrize("fill", [None, (0.5, -2.0, 7.25)])
@pytest.mark.parametrize("padding", [0, 1, 2, 6])
def test_planted_draws(padding, fill, monkeypatch):
    """Each sample by its own draws, whatever the others drew."""
    count, generator = 40, np.random.default_rng(padding)
    draws = {below: [generator.integers(0, below, count) for _ in range(2)] for below in {2, 2 * padding + 1}}
    to_come = {below: list(values) for below, values in draws.items()}
    monkeypatch.setattr(
        torch, "randint", lambda below, size, device: torch.from_numpy(to_come[below].pop(0)[: size[0]])
    )
    batch = images(count)
    kept = batch.clone()
    result = FlipAndCrop(padding, fill)(batch)
    mirrored, (tops, lefts) = draws[2][0], draws[2 * padding + 1]
    for sample in range(count):
        expected = changed(
            batch[sample], mirrored[sample] == 1, tops[sample], lefts[sample], padding, fill or (0.0,) * 3
        )
        assert torch.equal(result[sample], expected), sample
    assert torch.equal(batch, kept)


@pytest.mark.parametrize("fill", [None, (0.5, -2.0, 7.25)])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_all_candidates_and_each_as_often(padding, fill):
    """Chi-square, with the images of one batch and of many: p = 0.001 at a fixed seed."""
    image = images(1)
    known = draws_by_content(candidates(image[0], padding, fill or (0.0,) * 3))
    times = 200 * len(known)
    torch.manual_seed(11)
    augment = FlipAndCrop(padding, fill)
    in_one = augment(image.expand(times, *SHAPE))
    in_many = torch.cat([augment(image) for _ in range(times)])
    for result in (in_one, in_many):
        counts = dict.fromkeys(known.values(), 0)
        for one in result:
            counts[known[one.numpy().tobytes()]] += 1
        freedom = len(known) - 1
        statistic = sum((n - 200) ** 2 / 200 for n in counts.values())
        # Wilson and Hilferty (1931): (chi2 / k)^(1/3) is nearly normal
        normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
        assert abs(normal) < 3.3, counts


def test_neighbours_draw_apart():
    """No two samples of a batch share a draw, nor one sample its three: pairs are as frequent as they should be."""
    torch.manual_seed(5)
    batch, padding = images(2), 1
    known = [draws_by_content(candidates(image, padding)) for image in batch]
    augment, pairs = FlipAndCrop(padding), set()
    for _ in range(3000):
        pairs.add(tuple(by[image.numpy().tobytes()] for by, image in zip(known, augment(batch), strict=True)))
    assert len(pairs) > 300  # of 324; 324 (1 - exp(-3000 / 324)) = 323.97 are expected


def test_seeds_and_states_repeat():
    batch, augment = images(64), FlipAndCrop()
    torch.manual_seed(3)
    first, second = augment(batch), augment(batch)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(augment(batch), first)
    state = torch.get_rng_state()
    assert torch.equal(augment(batch), second)
    torch.set_rng_state(state)
    assert torch.equal(augment(batch), second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_shape_and_layout(dtype):
    batch = images(2, torch.float64).div(64).to(dtype)
    for fill in (None, [1, 2, 3]):
        for given in (batch, batch.to(memory_format=torch.channels_last), batch[:0]):
            result = FlipAndCrop(1, fill)(given)
            assert result.dtype == dtype and result.shape == given.shape and result.is_contiguous()
    meta = FlipAndCrop(1, (1.0, 2.0, 3.0))(batch.to("meta"))
    assert meta.device.type == "meta" and meta.dtype == dtype


def test_it_is_a_value_that_prints_as_its_settings():
    assert repr(FlipAndCrop()) == "FlipAndCrop(padding=4, fill=None)"
    for fill in ([0, 1.5, -2], (0.0, 1.5, -2.0), torch.tensor([0, 1.5, -2]), np.array([0, 1.5, -2])):
        augment = FlipAndCrop(2, fill)
        assert repr(augment) == "FlipAndCrop(padding=2, fill=(0.0, 1.5, -2.0))"
        assert augment == FlipAndCrop(2, (0.0, 1.5, -2.0)) and hash(augment) == hash(copy.deepcopy(augment))
        assert pickle.loads(pickle.dumps(augment)) == augment != FlipAndCrop(2)


@pytest.mark.parametrize(
    ("settings", "argument", "kind"),
    [
        ({"padding": -1}, "padding", ArgumentError),
        ({"padding": 1.0}, "padding", ArgumentTypeError),
        ({"padding": True}, "padding", ArgumentTypeError),
        ({"fill": 0.5}, "fill", ArgumentTypeError),
        ({"fill": "123"}, "fill", ArgumentTypeError),
        ({"fill": ()}, "fill", ArgumentError),
        ({"fill": (0.0, None)}, "fill", ArgumentTypeError),
        ({"fill": (0.0, float("nan"))}, "fill", ArgumentError),
        ({"fill": torch.tensor([[1.0]])}, "fill", ArgumentTypeError),
    ],
)
def test_settings_that_are_none(settings, argument, kind):
    with pytest.raises(kind, match=f"^{argument}: got ") as caught:
        FlipAndCrop(**settings)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(2, 3072),
        torch.zeros(2, 3, 0, 4),
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 1, 4, 4),  # fill has three channels
        np.zeros((2, 3, 4, 4)),
    ],
    ids=lambda batch: f"{type(batch).__name__} {tuple(batch.shape)} {batch.dtype}",
)
def test_batches_that_do_not_fit(batch):
    with pytest.raises(ArgumentError, match=r"^batch: got ") as caught:
        FlipAndCrop(1, (0.0, 0.0, 0.0))(batch)
    assert isinstance(caught.value, ArgumentTypeError) == isinstance(batch, np.ndarray)


# ---------------------------------------------------------------------------------------------------- normalized

MEAN, STD = (0.5071, 0.4867, -3.0), (0.2675, 2.5, 100.0)


def data(dtype=torch.float32, flat: bool = False) -> Data:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(7, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    x = x.flatten(1) if flat else x
    y = torch.arange(7)
    return Data(x[:5], y[:5], x[5:], y[5:])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_normalized_value_by_value(dtype, flat):
    given = data(dtype, flat)
    kept = [tensor.clone() for tensor in given]
    found = normalized(given, MEAN, torch.tensor(STD, dtype=torch.float64))
    assert isinstance(found, Data) and found.y_train is given.y_train and found.y_test is given.y_test
    for before, after in ((given.x_train, found.x_train), (given.x_test, found.x_test)):
        assert after.dtype == dtype and after.shape == before.shape
        for sample, result in zip(before, after, strict=True):
            for channel, (m, s) in enumerate(zip(MEAN, STD, strict=True)):
                x, z = sample.reshape(3, 20)[channel].double(), result.reshape(3, 20)[channel].double()
                # rounding of m, of the difference, of s and of the quotient
                allowed = 4 * torch.finfo(dtype).eps * ((x.abs() + abs(m)) / s)
                assert ((z - (x - m) / s).abs() <= allowed).all()
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(given, kept, strict=True))


def test_normalized_by_its_own_statistics():
    given = data(torch.float64)
    channels = given.x_train.transpose(0, 1).flatten(1)
    result = (
        normalized(given, channels.mean(1), channels.std(1, correction=0)).x_train.transpose(0, 1).flatten(1)
    )
    torch.testing.assert_close(result.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(result.std(1, correction=0), torch.ones(3, dtype=torch.float64))


def test_one_channel_is_the_whole_of_a_flat_sample():
    given = data(flat=True)
    assert torch.equal(normalized(given, [0.5], [2]).x_test, (given.x_test - 0.5) / 2)


@pytest.mark.parametrize(
    ("mean", "std", "argument", "kind"),
    [
        (MEAN, STD[:2], "mean, std", ArgumentError),
        (MEAN, (1.0, 0.0, 1.0), "std", ArgumentError),
        (MEAN, (1.0, -1.0, 1.0), "std", ArgumentError),
        (MEAN, (1.0, float("inf"), 1.0), "std", ArgumentError),
        ((0.0, float("nan"), 0.0), STD, "mean", ArgumentError),
        ((), (), "mean", ArgumentError),
        (0.5, 0.5, "mean", ArgumentTypeError),
        (MEAN, ("1", "1", "1"), "std", ArgumentTypeError),
        (MEAN[:2], STD[:2], "data", ArgumentError),
        ((*MEAN, 0.0, 0.0, 0.0), (*STD, 1.0, 1.0, 1.0), "data", ArgumentError),
    ],
)
def test_statistics_that_do_not_fit(mean, std, argument, kind):
    with pytest.raises(kind, match=f"^{argument}: got ") as caught:
        normalized(data(), mean, std)
    assert caught.value.argument == argument


def test_inputs_that_have_no_such_channels():
    given = data(flat=True)
    with pytest.raises(
        ArgumentError, match=r"^data: got x_train \(5, 60\) of torch.float32; needed: 7 channels"
    ):
        normalized(given, [0.0] * 7, [1.0] * 7)
    image = data()
    with pytest.raises(ArgumentError, match=r"^data: got x_test \(2, 3, 20\)"):
        normalized(image._replace(x_test=image.x_test.flatten(2)), MEAN, STD)
    with pytest.raises(ArgumentError, match=r"^data: got x_train .*torch.uint8; needed: floating point"):
        normalized(image._replace(x_train=image.x_train.byte()), MEAN, STD)
