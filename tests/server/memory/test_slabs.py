"""Host memory in slabs: runs do not overlap, are reused, and empty slabs are given up."""

import threading

from server.memory.slabs import UNIT_BYTES, HostSlabs


def test_runs_do_not_overlap_and_are_reused():
    slabs = HostSlabs(pinned=False, slab_bytes=4 * UNIT_BYTES)
    runs = [slabs.allocate(UNIT_BYTES + 1) for _ in range(3)]  # two units each: two to a slab
    for value, run in enumerate(runs):
        run.data.fill_(value)
    assert [int(run.data.min()) for run in runs] == [int(run.data.max()) for run in runs] == [0, 1, 2]
    assert slabs.total_bytes == 8 * UNIT_BYTES
    at = runs[0].data.data_ptr()
    runs[0].release()
    assert slabs.allocate(2 * UNIT_BYTES).data.data_ptr() == at


def test_what_is_larger_than_a_slab_gets_its_own():
    slabs = HostSlabs(pinned=False, slab_bytes=UNIT_BYTES)
    run = slabs.allocate(5 * UNIT_BYTES)
    assert run.data.numel() == 5 * UNIT_BYTES
    run.release()
    slabs.allocate(1)
    assert slabs.total_bytes == 5 * UNIT_BYTES  # the empty one was kept, and is used


def test_empty_slabs_are_given_up_but_one():
    slabs = HostSlabs(pinned=False, slab_bytes=UNIT_BYTES)
    runs = [slabs.allocate(UNIT_BYTES) for _ in range(4)]
    for run in runs:
        run.release()
    assert slabs.total_bytes == UNIT_BYTES


def test_readers_and_the_engine_at_once():
    slabs, wrong = HostSlabs(pinned=False, slab_bytes=8 * UNIT_BYTES), []

    def work(value):
        for size in (1, 3, 2, 5) * 10:
            run = slabs.allocate(size * UNIT_BYTES)
            run.data.fill_(value)
            if int(run.data[:: UNIT_BYTES // 2].min()) != value or int(run.data[:: UNIT_BYTES // 2].max()) != value:
                wrong.append(value)
            run.release()

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
