"""The prompt's own text before the output, when a client asks for it."""

from rempart_platform.generation import Delta, GenerationRequest
from rempart_platform.models import ServedModel
from rempart_protos.v1 import inference_pb2


def echo_deltas(
    message: inference_pb2.CompleteRequest, request: GenerationRequest, model: ServedModel
) -> tuple[Delta, ...]:
    """One delta for each choice, without tokens: echoed text is no output."""
    if not message.echo:
        return ()
    is_text = message.WhichOneof("prompt") == "text"
    text = message.text if is_text else model.tokenizer.decode(request.prompt_token_ids)
    return tuple(Delta(choice, text) for choice in range(request.num_choices))
