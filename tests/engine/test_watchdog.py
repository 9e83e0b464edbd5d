from rempart_engine.watchdog import SilenceWatch


def _num_ticks_until_hung(watch: SilenceWatch, elapsed_s: float) -> int:
    num_ticks = 1
    while not watch.is_hung(elapsed_s):
        num_ticks += 1
    return num_ticks


def test_silence_of_the_whole_timeout_counts_as_hung() -> None:
    watch = SilenceWatch(4.0)
    assert _num_ticks_until_hung(watch, watch.tick_s) == 4


def test_a_sign_of_life_starts_the_count_anew() -> None:
    watch = SilenceWatch(4.0)
    assert not any(watch.is_hung(1.0) for _ in range(3))
    watch.heard()
    assert _num_ticks_until_hung(watch, 1.0) == 4


def test_time_in_which_the_front_itself_did_not_run_is_not_blamed_on_the_core() -> None:
    watch = SilenceWatch(60.0)
    assert not watch.is_hung(3600.0)
