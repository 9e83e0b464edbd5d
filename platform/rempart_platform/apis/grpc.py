# ruff: noqa: N802 - gRPC names methods as the proto does
"""The `Inference` service over gRPC: who asks, validation, dispatch, one message per event."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from rempart_platform import validation
from rempart_platform.apis.echo import echo_deltas
from rempart_platform.apis.grpc_call import Context, answer, metadata_of, write
from rempart_platform.apis.grpc_limits import GrpcLimits
from rempart_platform.apis.grpc_render import admitted, render
from rempart_platform.apis.services import ApiServices
from rempart_platform.generation import Caller, Delta, GenerationRequest
from rempart_platform.validation import Arrival
from rempart_protos.v1 import inference_pb2, inference_pb2_grpc

_T = TypeVar("_T")


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Every method needs a key. A call that ends early, for whatever reason, ends its generation."""

    def __init__(self, services: ApiServices, limits: GrpcLimits | None = None) -> None:
        self._services = services
        self._limits = limits or GrpcLimits()

    # Writing to the context instead of yielding: a cancelled call then unwinds the dispatcher here and now, and not
    # when a generator is collected.
    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> None:  # type: ignore[override] # above
        async def serve(caller: Caller) -> None:
            arrival = self._arrival(caller, context)
            model = self._services.catalog.get(request.model, arrival.session(request.options))
            await self._generate(await validation.chat(request, model, self._services.limits, arrival), (), context)

        await self._answer(context, serve)

    async def Complete(  # type: ignore[override] # above
        self, request: inference_pb2.CompleteRequest, context: Context
    ) -> None:
        async def serve(caller: Caller) -> None:
            arrival = self._arrival(caller, context)
            model = self._services.catalog.get(request.model, arrival.session(request.options))
            valid = await validation.complete(request, model, self._services.limits, arrival)
            await self._generate(valid, echo_deltas(request, valid, model), context)

        await self._answer(context, serve)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        async def serve(caller: Caller) -> inference_pb2.TokenizeResponse:
            model = self._services.catalog.get(request.model, validation.session_of(caller, request))
            token_ids = await validation.tokenize(request, model, self._services.limits)
            return inference_pb2.TokenizeResponse(
                token_ids=token_ids, max_model_len=model.max_model_len, model=model.name
            )

        return await self._answer(context, serve)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        async def serve(_: Caller) -> inference_pb2.ListModelsResponse:
            models = [
                inference_pb2.Model(name=model.name, max_model_len=model.max_model_len, created_s=model.created_s)
                for model in self._services.catalog.listed()
            ]
            return inference_pb2.ListModelsResponse(models=models)

        return await self._answer(context, serve)

    async def _answer(self, context: Context, serve: Callable[[Caller], Awaitable[_T]]) -> _T:
        return await answer(self._services.authenticator, context, serve)

    def _arrival(self, caller: Caller, context: Context) -> Arrival:
        deadline: float | None = context.time_remaining()
        return Arrival(
            request_id=validation.mint_request_id(),
            caller=caller,
            created_s=int(self._services.clock()),
            seed=validation.mint_seed(),
            timeout_s=deadline,
            client_request_id=validation.client_label(metadata_of(context, "x-request-id")),
        )

    async def _generate(self, request: GenerationRequest, preface: tuple[Delta, ...], context: Context) -> None:
        async with self._services.dispatcher.admit(request) as generation:
            ids = [("x-request-id", request.request_id)]
            if request.client_request_id:
                ids.append(("x-client-request-id", request.client_request_id))
            headers = (*ids, *generation.headers.items())
            context.set_trailing_metadata(headers)
            await context.send_initial_metadata(headers)
            await self._write(context, admitted(request))
            for delta in preface:
                await self._write(context, render(delta))
            async for event in generation.events():
                await self._write(context, render(event))

    async def _write(self, context: Context, event: inference_pb2.GenerationEvent) -> None:
        await write(context, event, self._limits)
