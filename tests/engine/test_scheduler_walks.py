"""Random walks: whatever comes in whatever order, every stream is the one that the model alone would give."""

from collections import deque

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rempart_engine.core.request import FinishReason, Request, RequestId, SamplingParams
from rempart_engine.core.scheduler import Scheduler
from rempart_engine.core.step import ErrorCode, StepResult, TokenEvent
from rempart_engine.core.testing import HashModel, SimulatedRunner, make_config, make_request, with_drafts

PREFIXES = ([7] * 12, [7] * 6 + [8] * 6, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
MAX_MODEL_LEN = 30


class SchedulerWalk(RuleBasedStateMachine):
    """Adds, aborts, expires, fails and steps; up to two plans are in flight."""

    @initialize(
        num_blocks=st.integers(1, 16),
        block_size=st.integers(1, 5),
        max_num_rows=st.integers(1, 5),
        max_step_tokens=st.integers(2, 16),
        watermark=st.sampled_from([0.0, 0.3]),
        enable_prefix_cache=st.booleans(),
        num_speculative_tokens=st.integers(0, 3),
        max_speculative_rows=st.integers(1, 5),
        draft_percent=st.sampled_from([0, 60, 100]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_num_rows: int,
        max_step_tokens: int,
        watermark: float,
        enable_prefix_cache: bool,
        num_speculative_tokens: int,
        max_speculative_rows: int,
        draft_percent: int,
    ) -> None:
        config = make_config(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_rows=max_num_rows,
            max_step_tokens=max_step_tokens,
            max_model_len=MAX_MODEL_LEN,
            max_num_waiting=12,
            watermark=watermark,
            enable_prefix_cache=enable_prefix_cache,
        )
        self.config = with_drafts(config, num_speculative_tokens, max_speculative_rows=max_speculative_rows)
        self.scheduler = Scheduler(self.config)
        self.runner = SimulatedRunner(self.config, draft_percent=draft_percent)
        self.model = HashModel()
        self.results: deque[StepResult] = deque()
        self.requests: dict[RequestId, Request] = {}
        self.outputs: dict[tuple[RequestId, int], list[int]] = {}
        self.endings: dict[tuple[RequestId, int], FinishReason] = {}
        self.failed_rows = 0
        self.now = 0.0

    @rule(
        prefix=st.sampled_from(PREFIXES),
        num_shared=st.integers(1, 12),
        num_own=st.integers(0, 3),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.one_of(st.none(), st.integers(1, 14)),
        ignore_eos=st.booleans(),
        priority=st.integers(-1, 1),
        timeout=st.one_of(st.none(), st.integers(1, 5)),
        cache_salt=st.sampled_from([b"a", b"b"]),
        wants_prompt_logprobs=st.booleans(),
        wants_logprobs=st.booleans(),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
        min_tokens=st.sampled_from([0, 0, 1, 4]),
        num_emitted=st.integers(0, 3),
    )
    def add(
        self,
        prefix: list[int],
        num_shared: int,
        num_own: int,
        n: int,
        max_tokens: int | None,
        ignore_eos: bool,
        priority: int,
        timeout: int | None,
        cache_salt: bytes,
        wants_prompt_logprobs: bool,
        wants_logprobs: bool,
        presence_penalty: float,
        min_tokens: int,
        num_emitted: int,
    ) -> None:
        name = f"r{len(self.requests)}"
        sampling = SamplingParams(
            seed=num_own,
            n=n,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            prompt_logprobs=0 if wants_prompt_logprobs else None,
            logprobs=0 if wants_logprobs else None,
            presence_penalty=presence_penalty,
            min_tokens=min(min_tokens, max_tokens or min_tokens),
        )
        prompt = prefix[:num_shared] + [len(self.requests) % 30 + 1] * num_own
        num_tokens = len(prompt) + (max_tokens or 1)
        request = make_request(
            name,
            prompt,
            sampling=sampling,
            priority=priority,
            deadline=None if timeout is None else self.now + timeout,
            cache_salt=cache_salt,
        )
        if n == 1 and num_tokens <= self.config.max_sequence_tokens:
            request = self.replayed(request, num_emitted)
        self.accept(request, fits=num_tokens <= self.config.max_sequence_tokens)

    def replayed(self, request: Request, num_emitted: int) -> Request:
        """The same request as another engine's survivor: part of its output is out already."""
        output, _ = self.model.stream(request, 0, self.config)
        emitted = output[: min(num_emitted, len(output) - 1)]
        return make_request(
            request.request_id,
            [*request.prompt_token_ids, *emitted],
            sampling=request.sampling,
            priority=request.priority,
            deadline=request.deadline,
            cache_salt=request.cache_salt,
            num_emitted_tokens=len(emitted),
        )

    def accept(self, request: Request, *, fits: bool) -> None:
        num_waiting = self.scheduler.load().num_waiting
        events = self.scheduler.add(request)
        if fits and num_waiting + request.sampling.n <= self.config.max_num_waiting:
            assert events == []
            self.requests[request.request_id] = request
            return
        [event] = events
        assert event.finish_reason is FinishReason.ERROR
        assert event.error is not None
        assert event.error.code is (ErrorCode.RESOURCE_EXHAUSTED if fits else ErrorCode.INVALID_ARGUMENT)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(list(self.requests)))
        live = {
            (request_id, choice)
            for choice in range(self.requests[request_id].sampling.n)
            if (request_id, choice) not in self.endings
        }
        events = self.scheduler.abort(request_id)
        assert {(event.request_id, event.choice) for event in events} == live
        assert all(event.finish_reason is FinishReason.ABORT for event in events)
        self.record(events)

    @rule()
    def expire(self) -> None:
        self.now += 1.0
        events = self.scheduler.expire(self.now)
        for event in events:
            deadline = self.requests[event.request_id].deadline
            assert deadline is not None
            assert deadline <= self.now
        self.record(events)

    @precondition(lambda self: len(self.results) < 2)
    @rule()
    def launch(self) -> None:
        """Schedule and execute, perhaps ahead of a commit."""
        self.runner.release_rows(self.scheduler.take_released_rows())
        plan = self.scheduler.schedule()
        self.runner.release_rows(self.scheduler.take_released_rows())
        if plan is not None:
            self.results.append(self.runner.launch(plan).result())
            while len(self.results) > 0 and self.results[-1].is_lost:  # nothing may build upon it
                self.commit()
        elif not self.results:
            assert not self.scheduler.has_work, "work, but no plan"

    @precondition(lambda self: self.results)
    @rule()
    def commit(self) -> None:
        self.record(self.scheduler.commit(self.results.popleft()))

    @precondition(lambda self: self.scheduler.load().num_running)
    @rule(row=st.integers(0, 4))
    def fail_a_row(self, row: int) -> None:
        self.runner.failing_rows = {row}

    @rule()
    def lose_the_next_step(self) -> None:
        self.runner.num_steps_to_lose = 1

    @rule(num_steps=st.integers(1, 8))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if len(self.results) < 2:
                self.launch()
            if self.results:
                self.commit()

    def record(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = (event.request_id, event.choice)
            assert key not in self.endings, "an event after the last"
            request = self.requests[event.request_id]
            is_first = key not in self.outputs
            output = self.outputs.setdefault(key, [])
            assert event.index == request.num_emitted_tokens + len(output), "indices are contiguous"
            output += event.token_ids
            assert len(event.logprobs) == (0 if request.sampling.logprobs is None else len(event.token_ids))
            if event.token_ids:
                wanted = request.sampling.prompt_logprobs is not None and event.choice == 0
                num_prompt_logprobs = len(request.prompt_token_ids) - 1 if wanted else 0
                if is_first and not request.num_emitted_tokens:
                    assert [-logprob.logprob for logprob in event.prompt_logprobs] == list(
                        range(1, num_prompt_logprobs + 1)
                    )
                else:
                    assert event.prompt_logprobs == ()
            if event.finish_reason is not None:
                self.endings[key] = event.finish_reason
                self.check_stream(key)

    def check_stream(self, key: tuple[RequestId, int]) -> None:
        expected, reason = self.model.stream(self.requests[key[0]], key[1], self.config)
        output = tuple(self.outputs[key])
        if self.endings[key] in (FinishReason.STOP, FinishReason.LENGTH):
            assert (output, self.endings[key]) == (expected, reason)
        else:
            assert output == expected[: len(output)]

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(500):
            if not self.scheduler.has_work:
                break
            self.run(1)
            self.scheduler.check_integrity()
        every = {(request_id, choice) for request_id, r in self.requests.items() for choice in range(r.sampling.n)}
        assert set(self.endings) == every, "every choice ends"
        load = self.scheduler.load()
        assert (load.num_free_blocks, load.num_running, load.num_waiting) == (load.num_blocks, 0, 0)
        assert load.num_waiting_tokens == 0


TestSchedulerWalk = SchedulerWalk.TestCase
TestSchedulerWalk.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
