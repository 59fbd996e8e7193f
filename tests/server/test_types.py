"""What many adapters and many tokens are made of costs Python's garbage collector nothing: it looks at all that it tracks, in mid-step."""

import gc

import msgspec

from server.types import Logprob, PackedAdapter, PackedSite, PackedTensor, SequenceOutput


def header(num_sites: int) -> PackedAdapter:
    """As large an adapter as PEFT makes them: A and B at every site."""
    sites = [PackedSite(i, 8, 2.0, PackedTensor(64 * i, (8, 4096)), PackedTensor(64 * i, (8, 4096)), group=i) for i in range(num_sites)]
    return PackedAdapter("hash", "fingerprint", "bfloat16", 8, 1 << 20, 32000, sites=sites)


def num_tracked(make) -> float:
    """Objects for the collector that each of some more of these is."""
    kept = [make() for _ in range(10)]
    gc.collect()  # tuples of numbers are let go by the first collection
    before = len(gc.get_objects())
    kept += [make() for _ in range(100)]
    gc.collect()
    return (len(gc.get_objects()) - before) / (len(kept) - 10)


def test_an_adapters_header_is_a_handful_of_objects_however_many_sites_it_has():
    packed = msgspec.msgpack.encode(header(224))
    assert msgspec.msgpack.decode(packed, type=PackedAdapter) == header(224)
    assert num_tracked(lambda: msgspec.msgpack.decode(packed, type=PackedAdapter)) < 10


def test_a_step_s_output_is_its_lists():
    output = msgspec.msgpack.encode(SequenceOutput("one", [5], logprobs=[Logprob(5, -0.5, [])]))
    assert num_tracked(lambda: msgspec.msgpack.decode(output, type=SequenceOutput)) < 4
