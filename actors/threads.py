"""How many threads the models compute with, and the environment that says so to OpenMP.

The environment must be there before torch is imported, so it is set on the processes that import it.
"""

from __future__ import annotations

import os
from typing import Literal

COMPUTE_ENVIRONMENT = {
    # Threads that wait for work must sleep: encoder, decoder, gateway and Redis share the cores, and a thread that
    # spins takes a core from the one it waits for.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    # Hugging Face's tokenizers start threads of their own otherwise.
    "TOKENIZERS_PARALLELISM": "false",
}


def choose_num_threads(asked: int, role: Literal["encoder", "decoder"], num_cpus: int | None = None) -> int:
    """Return the number of compute threads: `asked`, or when that is 0 what suits a machine of `num_cpus` cores.

    The encoder's work is large matrix products, which scale; the decoder's passes are short, and threads that meet
    hundreds of times a second cost more than they bring.
    """
    if asked:
        return asked
    cpus = num_cpus if num_cpus is not None else len(os.sched_getaffinity(0))
    if role == "encoder":
        return max(1, min(cpus, 2 if cpus <= 4 else cpus // 2))
    return max(1, min(4, cpus // 2))
