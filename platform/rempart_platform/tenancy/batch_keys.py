"""Every Redis key of batch jobs and their files.

All share the hash tag `{batch}`, so that each transition is one script: jobs are few beside requests, and their lines
cost one small call each. Scripts make every key from the root, which is the only one they are given.

    rempart:{batch}:number              string  counts files and jobs: their order
    rempart:{batch}:file:<file>         hash    a file's record
    rempart:{batch}:files:<tenant>      zset    files of a tenant → number
    rempart:{batch}:users:<file>        set     open jobs that read it
    rempart:{batch}:uploads             zset    "<tenant> <file>" stored and not listed → when it is removed, s
    rempart:{batch}:expiring            zset    "<tenant> <file>" → when the file expires, s
    rempart:{batch}:job:<job>           hash    a job's record
    rempart:{batch}:jobs:<tenant>       zset    jobs of a tenant → number
    rempart:{batch}:open                zset    jobs that are not final → number
    rempart:{batch}:open:<tenant>       zset    those of a tenant → number
    rempart:{batch}:turns               zset    tenants with open jobs → when it was their turn, counted
    rempart:{batch}:turn                string  counts turns
    rempart:{batch}:work:<job>          stream  tasks of a job; the group "workers" holds what is being done
    rempart:{batch}:tasks:<job>         hash    "<task> holder", "<task> begun", "<task> deliveries", "<task> done",
                                                "<task> completed", "<task> failed"
    rempart:{batch}:lines:<job>:<task>  hash    line number → its answer, or only how it ended when that is large; until
                                                the whole task is stored
    rempart:{batch}:ended               zset    "<tenant> <job>" of final jobs → when they ended, s
    rempart:{batch}:kept                zset    those whose parts are gone, too → when they ended, s
    rempart:{batch}:dead                stream  tasks that were delivered in vain: job, task, tenant
"""

ROOT = "rempart:{batch}"
UPLOADS = f"{ROOT}:uploads"
EXPIRING = f"{ROOT}:expiring"
OPEN_JOBS = f"{ROOT}:open"
ENDED_JOBS = f"{ROOT}:ended"
KEPT_JOBS = f"{ROOT}:kept"
DEAD_TASKS = f"{ROOT}:dead"


def file_record(file_id: str) -> str:
    return f"{ROOT}:file:{file_id}"


def files_of(tenant: str) -> str:
    return f"{ROOT}:files:{tenant}"


def job_record(job_id: str) -> str:
    return f"{ROOT}:job:{job_id}"


def jobs_of(tenant: str) -> str:
    return f"{ROOT}:jobs:{tenant}"


def work_of(job_id: str) -> str:
    return f"{ROOT}:work:{job_id}"


def lines_of(job_id: str, task: str) -> str:
    return f"{ROOT}:lines:{job_id}:{task}"
