"""``--connection inline``: connection data for nodes that do not see the connection file, inside the batch script.

The script ends with a here-document that becomes the standard input of the pilot (of each, through srun), which keeps
it in memory: no file on the node, nothing in an argument, the environment or the output. bash passes it through a pipe;
one before 5.1 uses a file without a name. Templates say where (``connection``); what they render, and all that hpcq
prints, holds a placeholder, and the data take its place in the file that is submitted, and nowhere else.

**Who can read it.** It is what the connection file holds: who has it can be a pilot of the queue, gets its tasks and
can have its program unpickle what he likes, so is its user. It can be read by whoever can read the batch script:

- on the login node its owner (``jobs/…/script.sh``: 0700, below a directory 0700);
- Slurm: the job's owner, administrators and operators (``scontrol write batch_script``; with ``job_script`` among the
  ``AccountingStoreFlags`` for as long as the accounts are kept). The nodes' copy is the owner's, 0700;
- PBS: the job's owner and root (``server_priv/jobs``, ``mom_priv/jobs``);
- root of the nodes, who can read a pilot's memory anyway.

Not by other users. Those named could become the user without it; a site where this is not so (scripts kept in places
that more people read, a hook that copies them) is one not to use it on. The key is that of the queue: it is worthless
once the queue's ``identity.json`` is removed, which for a queue without a name happens when its program ends.

The data name the address and port of the program that runs at the submission: a program that is started again is found
only if it listens at the same (``port``), with the same queue name.
"""

from __future__ import annotations

import importlib
import re

from hpcq import state_dir

PLACEHOLDER = "hpcq-connection:only-in-what-is-submitted"
"""What a rendered script has where the connection data will be."""
_DATA = re.compile(r"hpcq-connection-\d+:\S+")


def fill_in(script: str, queue: str) -> str:
    """The script with the connection data of ``queue``. A secret.

    Raises:
        QueueNotFoundError: there is no connection file that could be used, or no program listens yet.
    """
    connection = importlib.import_module("hpcq.connection")  # slow, and few need it here
    return script.replace(PLACEHOLDER, connection.to_line(connection.read(state_dir.connection_file(queue))))


def conceal(script: str) -> str:
    """The script as it may be shown."""
    return _DATA.sub(PLACEHOLDER, script)
