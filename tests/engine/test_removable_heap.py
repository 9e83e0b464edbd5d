from hypothesis import given
from hypothesis import strategies as st

from rempart_engine.core.removable_heap import RemovableHeap


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20))))
def test_the_least_key_comes_first_whatever_was_pushed_and_removed(uses: list[tuple[bool, int]]) -> None:
    heap: RemovableHeap[tuple[int], str] = RemovableHeap()
    present: set[int] = set()
    for pushes, number in uses:
        if number in present:
            assert heap.remove((number,)) == str(number)
            present.remove(number)
        elif pushes:
            heap.push((number,), str(number))
            present.add(number)
        assert len(heap) == len(present)
        assert heap.first() == (((min(present),), str(min(present))) if present else None)


def test_removed_keys_do_not_pile_up_behind_one_that_stays_first() -> None:
    heap: RemovableHeap[tuple[int], None] = RemovableHeap()
    heap.push((0,), None)
    for number in range(1, 10_000):
        heap.push((number,), None)
        heap.remove((number,))
    assert len(heap._heap) < 100
