"""Files and batches as messages of `rempart.v1`."""

from collections.abc import Mapping
from typing import Final

from rempart_platform.apis.batch_rules import window_text
from rempart_platform.batch.values import Batch, BatchStatus, StoredFile
from rempart_protos.v1 import batch_pb2

_STATUSES: Final[Mapping[BatchStatus, batch_pb2.BatchStatus]] = {
    BatchStatus.VALIDATING: batch_pb2.BATCH_STATUS_VALIDATING,
    BatchStatus.FAILED: batch_pb2.BATCH_STATUS_FAILED,
    BatchStatus.IN_PROGRESS: batch_pb2.BATCH_STATUS_IN_PROGRESS,
    BatchStatus.FINALIZING: batch_pb2.BATCH_STATUS_FINALIZING,
    BatchStatus.COMPLETED: batch_pb2.BATCH_STATUS_COMPLETED,
    BatchStatus.EXPIRED: batch_pb2.BATCH_STATUS_EXPIRED,
    BatchStatus.CANCELLING: batch_pb2.BATCH_STATUS_CANCELLING,
    BatchStatus.CANCELLED: batch_pb2.BATCH_STATUS_CANCELLED,
}


def file_message(file: StoredFile) -> batch_pb2.StoredFile:
    return batch_pb2.StoredFile(
        file_id=file.file_id,
        filename=file.filename,
        purpose=file.purpose,
        num_bytes=file.num_bytes,
        created_s=file.created_s,
        expires_s=file.expires_s,
    )


def batch_message(batch: Batch) -> batch_pb2.Batch:
    counts = batch.counts
    errors = [
        batch_pb2.InputError(code=each.code, message=each.message, param=each.param or "", line=each.line or 0)
        for each in batch.errors
    ]
    return batch_pb2.Batch(
        batch_id=batch.batch_id,
        status=_STATUSES[batch.status],
        endpoint=batch.endpoint,
        input_file_id=batch.input_file_id,
        completion_window=window_text(batch.completion_window_s),
        metadata=dict(batch.metadata),
        model=batch.model,
        errors=errors,
        counts=batch_pb2.LineCounts(total=counts.total, completed=counts.completed, failed=counts.failed),
        output_lifetime_s=batch.output_lifetime_s,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_s=batch.created_s,
        expires_s=batch.expires_s,
        in_progress_s=batch.in_progress_s,
        finalizing_s=batch.finalizing_s,
        completed_s=batch.completed_s,
        failed_s=batch.failed_s,
        expired_s=batch.expired_s,
        cancelling_s=batch.cancelling_s,
        cancelled_s=batch.cancelled_s,
    )
