from __future__ import annotations

import pytest
import torch

from mwm import ops

# Random123, tests/kat_vectors, philox4x32-10: counter, key -> words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_reference_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    assert torch.equal(ops.philox(_words(counter), _words(key)), _words(expected))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN[:2])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_random_words_give_the_published_answers(counter: str, key: str, expected: str, backend: str, isa: str) -> None:
    """The two vectors whose counters a word index can reach: block 0, and block 2^32 - 1 is out of reach, so id, epoch, tail only."""
    c, k = _words(counter), _words(key)
    c[0] = 0
    seed = int(k[0]) + (int(k[1]) << 32)
    found = ops.random_words(seed, c[1:2], int(c[2]), int(c[3]) & 0xFFFF, int(c[3]) >> 16, 4, backend=backend)
    truth = _words(expected) if counter == KNOWN[0][0] else ops.philox(c, k)
    assert torch.equal(found[0], truth)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_native_words_equal_the_reference(n: int, batch: int, isa: str) -> None:
    ids = torch.randint(0, 2**32, (batch,))
    arguments = (2**63 + 12345, ids, 2**32 - 1, 65535, 65535, n)
    found = ops.random_words(*arguments, backend="cpu")
    assert found.shape == (batch, n)
    assert torch.equal(found, ops.random_words(*arguments, backend="reference"))


def test_words_of_an_id_do_not_depend_on_the_batch_or_on_how_many_are_drawn() -> None:
    ids = torch.arange(9)
    all_words = ops.random_words(7, ids, 1, 0, 20, 40)
    assert torch.equal(ops.random_words(7, [3], 1, 0, 20, 10)[0], all_words[3, :10])
    assert torch.equal(ops.random_words(7, 3, 1, 0, 20, 10)[0], all_words[3, :10])


def test_every_argument_changes_the_words() -> None:
    base = ops.random_words(1, [1], 1, 1, 20, 4)
    for other in ((2, [1], 1, 1, 20), (1 + 2**32, [1], 1, 1, 20), (1, [2], 1, 1, 20), (1, [1], 2, 1, 20), (1, [1], 1, 2, 20), (1, [1], 1, 1, 21)):
        assert not torch.equal(ops.random_words(*other, 4), base)


def test_words_are_uniform() -> None:
    """Chi-square over 256 bins of 400,000 words; the limit is five sigma."""
    words = ops.random_words(0, torch.arange(1000), 0, 0, 20, 400)
    for shift in (0, 24):
        counts = torch.bincount(((words >> shift) & 255).flatten(), minlength=256).double()
        expected = words.numel() / 256
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, [0], 0, 0, 0, 1), "seed"),
        ((2**64, [0], 0, 0, 0, 1), "seed"),
        ((0, [2**32], 0, 0, 0, 1), "ids"),
        ((0, [-1], 0, 0, 0, 1), "ids"),
        ((0, [0], -1, 0, 0, 1), "epoch"),
        ((0, [0], 0, 65536, 0, 1), "view"),
        ((0, [0], 0, 0, 65536, 1), "stream"),
        ((0, [0], 0, 0, 0, -1), "n must"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_arguments_out_of_range_are_refused_by_name(arguments: tuple, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.random_words(*arguments, backend=backend)
    with pytest.raises(TypeError, match="ids must be integers"):
        ops.random_words(0, torch.zeros(1), 0, 0, 0, 1)
    with pytest.raises(TypeError, match="ids must be integers"):  # not cut to 1
        ops.random_words(0, [1.5], 0, 0, 0, 1, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.mwm.random_words.default, (1, torch.arange(3), 2, 0, 16, 5, backend))
