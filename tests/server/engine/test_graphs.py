"""Which steps are captured at which sizes; the captures themselves run in test_gpu.py."""

import pytest

from server.engine.captures import MAX_MIXED_ROWS, Captures, Variant, decode_sizes, first_sizes, mixed_sizes, variants_of
from server.model.attention import ATTENTION_NAME
from tests.server.engine.tiny_models import make_engine, make_model


@pytest.mark.parametrize("max_rows", [1, 2, 5, 8, 64, 65, 256, 300])
def test_every_number_of_decode_rows_has_a_size(max_rows):
    sizes = [size.num_rows for size in decode_sizes(max_rows)]
    assert sizes == sorted(set(sizes)) and sizes[-1] == max(2, max_rows) and sizes[0] == 2
    for rows in range(1, max_rows + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(8, rows / 2)


@pytest.mark.parametrize("max_rows", [1, 15, 16, 17, 100, 512, 1000, 2048, 8192])
@pytest.mark.parametrize("max_sequences", [1, 32, 256])
def test_steps_with_prompts_are_padded_by_little_and_have_room_for_every_sequence(max_rows, max_sequences):
    sizes = mixed_sizes(max_rows, max_sequences)
    numbers = [size.num_rows for size in sizes]
    assert numbers == sorted(set(numbers)) and (numbers[-1] == min(max_rows, MAX_MIXED_ROWS) if max_rows >= 16 else not numbers)
    for rows in range(2, numbers[-1] + 1) if numbers else ():
        size = next(size for size in sizes if size.num_rows >= rows)
        assert size.num_rows - rows < max(16, rows / 4)
        # A step of so many rows has at most so many sequences.
        assert size.num_sequences >= min(rows, max_sequences)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_whatever_adapters_touch_some_variant_covers_it_and_noughts_are_few(num_slots):
    variants = variants_of(num_slots)
    assert variants[0] == Variant() and len(set(variants)) == len(variants)
    for slots in range(1 << num_slots):
        first = next(v for v in variants if not v.has_gains and not slots & ~v.slots)
        assert first == min((v for v in variants if not v.has_gains and not slots & ~v.slots), key=lambda v: v.slots.bit_count())
    assert Variant(1) in variants and Variant((1 << num_slots) - 1, has_gains=True) in variants


@pytest.mark.parametrize("sizes", [decode_sizes(1), decode_sizes(5), decode_sizes(100), decode_sizes(256), mixed_sizes(2048, 256)])
def test_what_an_engine_starts_with_stands_in_for_every_size_and_is_little(sizes):
    first = first_sizes(sizes)
    assert first[0] == sizes[-1] and first[-1] == sizes[0] and sorted(first, reverse=True) == first
    numbers = [size.num_rows for size in sizes]
    for size in first[1:]:  # a step whose own size is missing takes the next of these
        above = next(one.num_rows for one in reversed(first) if one.num_rows > size.num_rows)
        assert above <= max(2.5 * min(number for number in numbers if number > size.num_rows), size.num_rows + 3)
    assert len(first) <= 2 + numbers[-1].bit_length()


def captures_of(max_sequences=64, max_rows=512) -> Captures:
    return Captures(decode_sizes(max_sequences), mixed_sizes(max_rows, max_sequences), variants_of(4))


def test_a_larger_graph_stands_in_until_its_own_is_captured_and_what_steps_want_comes_first():
    captures, plain = captures_of(), Variant()
    for key in captures.first():
        captures.add(key, f"graph {key}")
    assert captures.num_left() > 0 == captures.num_left(only_wanted=True) and captures.next(only_wanted=True) is None
    (size, variant) = captures.find(39, plain, is_decode=True)
    assert size.num_rows == 64 and variant == plain
    assert captures.find(300, Variant(0b100), is_decode=False)[0].num_rows == 512
    assert captures.find(39, plain, is_decode=True)[0].num_rows == 64  # again: one wish
    assert captures.num_left(only_wanted=True) == 2  # one wish of each: 40 and 320 rows
    wanted = captures.next(only_wanted=True)
    assert wanted == captures.next() and (wanted[0].num_rows, wanted[1]) == (40, plain)
    num_left = captures.num_left()
    captures.add(wanted, "its own")
    assert captures.find(39, plain, is_decode=True) == wanted and captures.num_left() == num_left - 1
    assert captures.find(33, plain, is_decode=True) == wanted
    while (key := captures.next()) is not None:
        captures.add(key, "graph")
    assert not captures.num_left() and not captures.num_left(only_wanted=True)
    for rows in range(1, 65):
        assert captures.find(rows, plain, is_decode=True)[0] == next(size for size in decode_sizes(64) if size.num_rows >= rows)


def test_every_size_and_variant_is_captured_once_the_first_ones_first():
    captures, seen = captures_of(), []
    first = captures.first()
    while (key := captures.next()) is not None:
        captures.add(key, None)
        seen.append(key)
    assert seen[: len(first)] == first and len(seen) == len(set(seen))
    decode, mixed = decode_sizes(64), mixed_sizes(512, 64)
    assert len(seen) == 4 * len(decode) + 3 * len(mixed)  # steps with prompts and gains run uncaptured
    assert captures.find(20, Variant(1, has_gains=True), is_decode=False) is None
    for part in (seen[: len(first)], seen[len(first) :]):
        assert [size.num_rows for size, _ in part] == sorted((size.num_rows for size, _ in part), reverse=True)


def test_what_is_given_up_is_wanted_no_more():
    captures = captures_of()
    for key in captures.first():
        captures.add(key, None)
    captures.find(39, Variant(), is_decode=True)
    captures.give_up()
    assert captures.find(39, Variant(), is_decode=True)[0].num_rows == 64
    assert captures.next() is None and not captures.num_left() and not captures.num_left(only_wanted=True)


@pytest.fixture
def served():
    pytest.importorskip("triton")
    return make_engine(make_model("llama", attention=ATTENTION_NAME), num_blocks=64, kernels="triton")


def test_groups_at_one_place_of_every_layer_are_one_slot(served):
    _, base = served
    state, shapes = base.state, base.group_shapes
    per_layer = len(shapes) // len(base.layers)
    assert len(state.slots) == per_layer == 4
    for position, slot in enumerate(state.slots.values()):
        assert slot.groups == sum(1 << index for index in range(position, len(shapes), per_layer))
    assert state.slots_touched(0) == 0 and state.slots_touched(1 << per_layer | 1 << 2) == 0b101
    state.set_apart(0b101)
    assert [slot.apart for slot in state.slots.values()] == [True, False, True, False]
    assert state.touched == sum(slot.groups for slot in state.slots.values() if slot.apart)
    state.clear()
    assert not any(slot.apart for slot in state.slots.values()) and state.touched == -1


def test_a_shortened_pass_meets_every_kind_of_layer(served):
    for base, num in ((served[1], 2), (make_engine(make_model("gemma2", attention=ATTENTION_NAME), num_blocks=64)[1], 3)):
        whole = list(base.decoder.layers)
        with base.layers.shortened():
            assert list(base.decoder.layers) == base.layers.modules[:num]
        assert list(base.decoder.layers) == whole and len(whole) >= num
