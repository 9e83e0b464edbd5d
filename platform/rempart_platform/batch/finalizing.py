"""The last task of a job: its answers become files. Done again, it makes the same files with the same ids."""

import hashlib
from collections.abc import AsyncIterator, Callable

from rempart_platform.batch.files import StoredFiles
from rempart_platform.batch.jobs import Job
from rempart_platform.batch.result_lines import split_results
from rempart_platform.batch.storage import BatchStorage, shard_path
from rempart_platform.batch.values import BatchLimits, StoredFile
from rempart_platform.batch.work_queue import Claim, WorkQueue

_PURPOSE = "batch_output"


async def finalize(
    claim: Claim, job: Job, queue: WorkQueue, storage: BatchStorage, files: StoredFiles, limits: BatchLimits
) -> bool:
    """Writes the files that are not empty, and ends the job. False when another worker has the task.

    Raises:
        RempartError: UNAVAILABLE; to be called again.
    """
    counts = job.batch.counts
    output_file_id = error_file_id = ""
    if counts.completed:
        output_file_id = await _write(job, "output", storage, files, limits, lambda is_success: is_success)
    if counts.failed:
        error_file_id = await _write(job, "error", storage, files, limits, lambda is_success: not is_success)
    return await queue.finish(claim, output_file_id, error_file_id)


async def _write(
    job: Job, kind: str, storage: BatchStorage, files: StoredFiles, limits: BatchLimits, holds: Callable[[bool], bool]
) -> str:
    batch = job.batch
    created_s = batch.finalizing_s or batch.created_s
    file = StoredFile(
        file_id=f"file-{hashlib.sha256(f'{batch.batch_id} {kind}'.encode()).hexdigest()[:32]}",
        tenant=batch.caller.tenant,
        filename=f"{batch.batch_id}_{kind}.jsonl",
        purpose=_PURPOSE,
        num_bytes=0,
        created_s=created_s,
        expires_s=limits.expiry_s(created_s, batch.output_lifetime_s),
    )
    await files.put(file, _lines(job, storage, holds))
    return file.file_id


async def _lines(job: Job, storage: BatchStorage, holds: Callable[[bool], bool]) -> AsyncIterator[bytes]:
    """One shard at a time."""
    for number in range(job.num_shards):
        stored = await storage.get(shard_path(job.batch.caller.tenant, job.batch.batch_id, number))
        shown = [result.json + b"\n" for result in split_results(stored) if holds(result.outcome.is_success)]
        if shown:
            yield b"".join(shown)
