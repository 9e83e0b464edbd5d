"""What a router knows of an endpoint, as values: what it serves, how busy it is, whether it may be picked."""

from dataclasses import dataclass

from rempart_protos.v1 import engine_pb2


@dataclass(frozen=True, slots=True)
class EndpointModel:
    """What the engine behind an endpoint serves, and within which limits."""

    name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    max_num_rows: int = 0
    """Most sequences that the engine runs at once; 0 when it does not say."""

    @staticmethod
    def from_proto(info: engine_pb2.ModelInfo) -> "EndpointModel":
        return EndpointModel(
            name=info.model_name,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            eos_token_ids=tuple(info.eos_token_ids),
            block_size=info.block_size,
            max_num_rows=info.max_num_rows,
        )


@dataclass(frozen=True, slots=True)
class EndpointLoad:
    """The load that the engine pushed last. It counts the requests of all routers."""

    num_waiting: int = 0
    num_running: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_steps: int = 0
    is_draining: bool = False

    @staticmethod
    def from_proto(load: engine_pb2.EngineLoad) -> "EndpointLoad":
        return EndpointLoad(
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            num_waiting_tokens=load.num_waiting_tokens,
            num_free_blocks=load.num_free_blocks,
            num_blocks=load.num_blocks,
            num_steps=load.num_steps,
            is_draining=load.draining,
        )


@dataclass(frozen=True, slots=True)
class EndpointState:
    """One endpoint at one moment. `num_in_flight*` count this router's requests, which the load may not show yet."""

    address: str
    model: EndpointModel | None = None
    """None until the engine answered once."""
    is_ready: bool = False
    load: EndpointLoad = EndpointLoad()
    num_in_flight: int = 0
    num_in_flight_tokens: int = 0
    is_left_out: bool = False
    """Too many attempts in a row failed here; after a while one may probe."""
    full_rows: int = 0
    """The most sequences that were seen to run here while others waited; 0 while that was not seen."""
    is_leaving: bool = False
    """Its source says that it is terminating or gone."""

    @property
    def is_draining(self) -> bool:
        """Whether it gets nothing new and only ends what it runs."""
        return self.is_leaving or self.load.is_draining
