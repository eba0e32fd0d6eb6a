"""The sanitizer finds every planted fault, names it, and leaves kernels without one alone."""

from __future__ import annotations

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from interpreter import MissingOther, OutOfBounds, Race


@pytest.fixture(autouse=True)
def _no_declarations():
    yield
    interpreter.clear_extents()


@triton.jit
def add_one(x, y, n, step, SIZE: tl.constexpr):
    """y = x + 1 in blocks of SIZE; a step other than SIZE makes them overlap or leaves gaps."""
    r = tl.program_id(0) * step + tl.arange(0, SIZE)
    tl.store(y + r, tl.load(x + r, mask=r < n, other=0.0) + 1, mask=r < n)


@triton.jit
def move(source, target, source_first, target_first, SIZE: tl.constexpr):
    """SIZE elements from source[source_first] on to target[target_first] on, one program."""
    r = tl.arange(0, SIZE)
    tl.store(target + target_first + r, tl.load(source + source_first + r))


# ---- bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_clean_kernel_passes(dtype):
    x = torch.arange(40).to(dtype)
    y = torch.zeros_like(x)
    add_one[(3,)](x, y, 40, 16, 16)
    assert torch.equal(y, x + 1)


def test_a_load_past_the_end():
    x, y = torch.zeros(40), torch.zeros(48)
    with pytest.raises(OutOfBounds) as caught:
        add_one[(3,)](x, y, 48, 16, 16)
    assert str(caught.value) == (
        "add_one, program (2, 0, 0): 8 of 16 addresses to load are outside x (shape (40,), float32): "
        "elements 40 to 47"
    )


def test_a_store_past_the_end():
    with pytest.raises(OutOfBounds, match=r"1 of 16 addresses to store are outside y .*elements 15 to 15"):
        add_one[(1,)](torch.zeros(16), torch.zeros(15), 16, 16, 16)


def test_a_load_before_the_start():
    with pytest.raises(OutOfBounds, match=r"2 of 4 addresses to load are outside source .*elements -2 to -1"):
        move[(1,)](torch.zeros(8), torch.zeros(8), -2, 0, 4)
    with pytest.raises(OutOfBounds, match="outside target"):
        move[(1,)](torch.zeros(8), torch.zeros(8), 0, -(1 << 30), 4)


def test_an_argument_does_not_reach_into_its_neighbour():
    both = torch.zeros(64)
    with pytest.raises(OutOfBounds, match="outside target"):
        move[(1,)](both[:32], both[32:48], 0, 16, 16)
    move[(1,)](both[:32], both[32:48], 16, 0, 16)


def test_a_view_ends_at_its_last_element():
    view = torch.zeros(4, 16)[:, :10]
    move[(1,)](view, torch.zeros(2), 3 * 16 + 8, 0, 2)
    with pytest.raises(OutOfBounds, match="elements 58 to 58"):
        move[(1,)](view, torch.zeros(2), 3 * 16 + 9, 0, 2)


def test_masked_lanes_may_point_anywhere():
    x, y = torch.zeros(3), torch.zeros(3)
    add_one[(1,)](x, y, 3, 1 << 20, 16)
    assert y.tolist() == [1.0, 1.0, 1.0]


def test_an_empty_tensor_has_no_elements():
    with pytest.raises(OutOfBounds, match="elements 0 to 0"):
        move[(1,)](torch.zeros(0), torch.zeros(1), 0, 0, 1)


@triton.jit
def as_int64(x, first):
    tl.store((x + first).to(tl.pointer_type(tl.int64)), tl.full((), 0, tl.int64))


def test_a_misaligned_address():
    x = torch.ones(8)
    as_int64[(1,)](x, 2)
    assert x.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    with pytest.raises(OutOfBounds, match="misaligned in x"):
        as_int64[(1,)](x, 3)
    with pytest.raises(OutOfBounds, match="outside x"):
        as_int64[(1,)](x, 7)


@triton.jit
def through_a_table(table, n):
    target = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(target + tl.arange(0, 4), 1.0, mask=tl.arange(0, 4) < n)


@triton.jit
def through_a_table_of_arguments(table, buffers, n):
    target = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(target + tl.arange(0, 4), 1.0, mask=tl.arange(0, 4) < n)


def test_addresses_that_are_loaded_must_belong_to_an_argument():
    buffers = (torch.zeros(3), torch.zeros(3))
    table = torch.tensor([b.data_ptr() for b in buffers])
    through_a_table_of_arguments[(2,)](table, buffers, 3)
    assert all(b.tolist() == [1.0] * 3 for b in buffers)
    with pytest.raises(OutOfBounds, match="1 of 4 addresses to store are no argument's"):
        through_a_table_of_arguments[(2,)](table, buffers, 4)
    with pytest.raises(OutOfBounds, match="3 of 3 addresses to store are no argument's"):
        through_a_table[(2,)](table, 3)


@triton.jit
def halves_of_a_pair(pair, choose):
    first = tl.where(tl.arange(0, 4) < choose, pair[0] + tl.arange(0, 4), pair[1] + tl.arange(0, 4))
    tl.store(first, 2.0)


def test_one_store_into_two_arguments():
    pair = (torch.zeros(4), torch.zeros(4))
    halves_of_a_pair[(1,)](pair, 2)
    assert [t.tolist() for t in pair] == [[2, 2, 0, 0], [0, 0, 2, 2]]
    with pytest.raises(OutOfBounds, match=r"1 of 2 addresses to store are outside pair\[1\]"):
        halves_of_a_pair[(1,)]((torch.zeros(4), torch.zeros(3)), 2)


@triton.jit
def doubled_rows(source, target, m, n, BLOCK: tl.constexpr):
    rows = tl.make_tensor_descriptor(source, (m, n), (n, 1), (BLOCK, BLOCK))
    out = tl.make_tensor_descriptor(target, (m, n), (n, 1), (BLOCK, BLOCK))
    at = tl.program_id(0) * BLOCK
    out.store((at, 0), rows.load((at, 0)) * 2)


def test_tensor_descriptors():
    x, y = torch.randn(20, 8), torch.zeros(20, 8)
    doubled_rows[(2,)](x, y, 20, 8, 16)
    assert torch.equal(y, 2 * x)
    with pytest.raises(OutOfBounds, match="outside target"):
        doubled_rows[(2,)](x, y[:19], 20, 8, 16)


# ---- arenas


def test_a_gap_in_an_arena_is_out_of_bounds():
    arena = torch.zeros(64)
    interpreter.extents(arena, [(0, 10), (16, 16), (32, 8)])
    move[(1,)](arena, arena, 0, 16, 8)
    move[(1,)](arena, arena, 24, 32, 8)
    move[(1,)](arena, arena, 28, 16, 8)  # adjacent ranges join
    with pytest.raises(
        OutOfBounds, match=r"2 of 4 .*load are outside the declared extents of source .*10 to 11"
    ):
        move[(1,)](arena, arena, 8, 16, 4)
    with pytest.raises(
        OutOfBounds, match=r"1 of 4 .*store are outside the declared extents of target .*15 to 15"
    ):
        move[(1,)](arena, arena, 0, 15, 4)
    with pytest.raises(OutOfBounds, match="elements 40 to 43"):
        move[(1,)](arena, arena, 0, 40, 4)


def test_ranges_may_overlap():
    arena = torch.zeros(64)
    interpreter.extents(arena, [(0, 16), (2, 2), (8, 12)])
    move[(1,)](arena, arena, 0, 4, 16)
    with pytest.raises(OutOfBounds, match="elements 20 to 20"):
        move[(1,)](arena, arena, 0, 5, 16)


def test_a_gap_is_out_of_bounds_through_a_view_of_another_type():
    arena = torch.zeros(64)
    interpreter.extents(arena[8:], [(0, 8), (24, 8)])
    halves = arena[32:].view(torch.bfloat16)
    move[(1,)](halves, halves, 0, 8, 8)
    with pytest.raises(OutOfBounds, match="elements 16 to 17"):
        move[(1,)](halves, halves, 0, 10, 8)


def test_declarations_end():
    arena = torch.zeros(64)
    with interpreter.extents(arena, [(0, 4)]), pytest.raises(OutOfBounds):
        move[(1,)](arena, arena, 0, 4, 4)
    move[(1,)](arena, arena, 0, 4, 4)
    interpreter.extents(arena, [])
    with pytest.raises(OutOfBounds):
        move[(1,)](arena, arena, 0, 4, 4)
    interpreter.clear_extents()
    move[(1,)](arena, arena, 0, 4, 4)


# ---- races


def test_an_overlap_by_one():
    x, y = torch.zeros(46), torch.zeros(46)
    with pytest.raises(Race) as caught:
        add_one[(3,)](x, y, 46, 15, 16)
    assert str(caught.value) == (
        "add_one, program (1, 0, 0): 1 of 16 elements to store were stored by program (0, 0, 0) in the same launch: "
        "y (shape (46,), float32), element 15"
    )


@triton.jit
def shifted(x, y, n, shift, SIZE: tl.constexpr):
    r = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    at = r + shift
    tl.store(y + r, tl.load(x + at, mask=(at >= 0) & (at < n), other=0.0), mask=r < n)


def test_reading_what_another_program_wrote():
    x = torch.zeros(32)
    with pytest.raises(
        Race, match=r"program \(1, 0, 0\): 1 of 16 elements to load were stored by program \(0, 0, 0\)"
    ):
        shifted[(2,)](x, x, 32, -1, 16)


def test_writing_what_another_program_read():
    x = torch.zeros(32)
    with pytest.raises(
        Race, match=r"program \(1, 0, 0\): 1 of 16 elements to store were loaded by program \(0, 0, 0\)"
    ):
        shifted[(2,)](x, x, 32, 1, 16)


def test_views_of_one_storage_are_one_memory():
    both = torch.zeros(64)
    shifted[(2,)](both[:32], both[32:], 32, -1, 16)
    with pytest.raises(Race, match=r"x \(shape \(32,\), float32\), element 16"):
        shifted[(2,)](both[:32], both[1:33], 32, 0, 16)


@triton.jit
def two_sizes(words, halves, first):
    program = tl.program_id(0)
    if program == 0:
        tl.store(words, tl.full((), 0, tl.int64))
    else:
        tl.store(halves + first + program, 1.0)


def test_views_of_one_storage_may_differ_in_element_size():
    halves = torch.zeros(8)
    two_sizes[(3,)](halves.view(torch.int64), halves, 1)
    with pytest.raises(Race, match=r"stored by program \(0, 0, 0\) .* halves .*element 1"):
        two_sizes[(3,)](halves.view(torch.int64), halves, 0)


@triton.jit
def first_of_all(x, out, TARGET: tl.constexpr):
    tl.store(out + tl.program_id(0), tl.load(x))
    if tl.program_id(0) == TARGET:
        tl.store(x, 1.0)


def test_many_programs_may_read_and_none_may_write():
    first_of_all[(4,)](torch.zeros(1), torch.zeros(4), 9)
    with pytest.raises(Race, match="were loaded by several programs"):
        first_of_all[(4,)](torch.zeros(1), torch.zeros(4), 3)


def test_the_next_launch_starts_anew():
    x, y = torch.zeros(32), torch.zeros(32)
    add_one[(2,)](x, y, 32, 16, 16)
    shifted[(2,)](y, x, 32, -1, 16)
    shifted[(1,)](x, x, 32, 1, 32)  # one program cannot race


@triton.jit
def accumulate(total, x, MODE: tl.constexpr):
    program = tl.program_id(0)
    tl.atomic_add(total, tl.load(x + program))
    if MODE == "load":
        tl.store(x + program, tl.load(total))
    if MODE == "store":
        tl.store(total, 0.0)


def test_atomics_do_not_race_among_themselves():
    total, x = torch.zeros(1), torch.ones(4)
    accumulate[(4,)](total, x, "none")
    assert total.item() == 4.0
    with pytest.raises(Race, match="to atomic were loaded by"):
        accumulate[(4,)](total, x, "load")
    with pytest.raises(Race, match="to atomic were stored by"):
        accumulate[(4,)](total, x, "store")


@triton.jit
def atomics(total, lock, offset):
    tl.atomic_max(total + offset, 5)
    tl.atomic_max(total + 100, 5, mask=offset > 1)
    tl.atomic_cas(lock + offset, 0, 7)


def test_atomics_within_bounds():
    total, lock = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    atomics[(3,)](total, lock, 0)
    assert (total.item(), lock.item()) == (5, 7)
    with pytest.raises(OutOfBounds, match="to atomic are outside total"):
        atomics[(1,)](total, lock, 1)
    with pytest.raises(OutOfBounds, match="to atomic are outside lock"):
        atomics[(1,)](torch.zeros(2, dtype=torch.int32), lock, 1)


@triton.jit
def scatter(x, targets, out, SIZE: tl.constexpr):
    r = tl.arange(0, SIZE)
    tl.store(out + tl.load(targets + r), tl.load(x + r))


def test_one_store_must_not_write_an_element_twice_with_different_values():
    targets, out = torch.tensor([2, 0, 1, 2]), torch.zeros(3)
    scatter[(1,)](torch.tensor([5.0, 6.0, 7.0, 5.0]), targets, out, 4)
    assert out.tolist() == [6.0, 7.0, 5.0]
    with pytest.raises(Race, match=r"writes 1 elements of out .* twice, with other values: element 2"):
        scatter[(1,)](torch.tensor([5.0, 6.0, 7.0, 8.0]), targets, out, 4)


# ---- undefined lanes


@triton.jit
def no_other(x, out, n, SIZE: tl.constexpr):
    r = tl.arange(0, SIZE)
    tl.store(out + r, tl.load(x + r, mask=r < n), mask=r < n)


def test_a_masked_load_needs_other():
    x = torch.zeros(16)
    no_other[(1,)](x, x, 16, 16)
    with pytest.raises(
        MissingOther, match=r"no_other, program \(0, 0, 0\): load with 6 of 16 lanes masked off"
    ):
        no_other[(1,)](x, x, 10, 16)


@triton.jit
def calls_no_other(x, out, n, SIZE: tl.constexpr):
    no_other(x, out, n, SIZE)


def test_a_fault_in_a_device_function_is_reported_as_it_is():
    with pytest.raises(MissingOther, match="calls_no_other, program"):
        calls_no_other[(1,)](torch.zeros(16), torch.zeros(16), 10, 16)
