"""Exit with 0 if the service of this machine answers at /healthz, with 1 if not. Needs nothing but Python.

The port is $SURTITLE_SERVICE__PORT, or 8321; the address 127.0.0.1, which every configuration of deploy/ listens on.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 2.0


def main() -> int:
    """Ask once."""
    port = int(os.environ.get("SURTITLE_SERVICE__PORT") or 8_321)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"127.0.0.1:{port} does not answer: {error}\n")
        return 1
    finally:
        connection.close()
    return 0 if status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
