"""What the engine core finds in its environment."""

from rempart_engine.core_client import core_environ


def test_threads_are_numbered_and_do_not_spin_unless_told_to() -> None:
    environ = core_environ({"HOME": "/h"}, num_threads=3)
    assert (environ["HOME"], environ["OMP_NUM_THREADS"], environ["GOMP_SPINCOUNT"]) == ("/h", "3", "1000")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        asked = core_environ({name: "ACTIVE"}, num_threads=3)
        assert asked[name] == "ACTIVE"
        assert len({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & asked.keys()) == 1
