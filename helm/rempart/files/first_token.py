"""What `helm test` runs in a pod of the router's image: is it ready, and does a new key get a token?

Reads REMPART_HTTP (http://HOST:PORT), REMPART_ADDRESS (HOST:PORT of gRPC), REMPART_ADMIN_KEY and REMPART_MODEL.
Exit code 0: a token came; 1: it did not, and stderr says why.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

TENANT = "helm-test"
TIMEOUT_S = 600
"""A model that was scaled to zero has to load first."""


def ask(path: str, key: str = "", body: dict[str, object] | None = None) -> str:
    """The answer's body."""
    request = urllib.request.Request(os.environ["REMPART_HTTP"] + path)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def rempart(*args: str) -> Any:
    """Runs the admin's command line; what it prints."""
    done = subprocess.run(["rempart", *args, "--json"], stdout=subprocess.PIPE, check=True, timeout=60)
    return json.loads(done.stdout)


def main() -> int:
    try:
        ask("/readyz")
        if all(tenant["name"] != TENANT for tenant in rempart("tenant", "list")["tenants"]):
            rempart("tenant", "create", TENANT)
        key = rempart("key", "issue", TENANT, "--expires-in-days", "0.01")["key"]
        completion = ask(
            "/v1/completions", key, {"model": os.environ["REMPART_MODEL"], "prompt": "Hello", "max_tokens": 1}
        )
    except urllib.error.HTTPError as error:
        sys.stderr.write(f"{error.url}: {error.code} {error.read().decode()}\n")
        return 1
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(completion + "\n")
    return 0 if json.loads(completion)["usage"]["completion_tokens"] == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
