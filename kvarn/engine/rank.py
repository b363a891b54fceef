"""The process of one rank of tensor parallelism: python -m kvarn.engine.rank FD

FD is one end of a socket pair; rank 0 is at the other (`kvarn.runner.parallel`).
"""

import logging
import os
import sys
from multiprocessing.connection import Connection

from kvarn.core.config import Resolved
from kvarn.engine.assemble import assemble
from kvarn.kernels.collective import Group
from kvarn.models.precision import choose_device
from kvarn.runner.executor import Executor
from kvarn.runner.parallel import Ready, serve


def build(resolved: Resolved, group: Group) -> tuple[Executor, Ready]:
    """This rank's runner."""
    made = assemble(resolved, group)
    return made.runner, Ready(made.ledger.rows())


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(
        level=os.environ.get("KVARN_WORKER_LOG", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    serve(Connection(int(sys.argv[1])), choose_device, build)


if __name__ == "__main__":
    main()
