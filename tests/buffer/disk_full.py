"""Run by a test: appends until the log may not grow any more, then once more with space again."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from replay_helpers import Clock, make_ipc, make_settings

from rexrag.buffer.log_writer import LogWriteError
from rexrag.buffer.recovery import open_buffer
from rexrag.types import WeightVersion


def main() -> None:
    replay = make_settings(Path(sys.argv[1]), num_questions=50, groups_per_step=20)
    state, _ = open_buffer(replay, resume_step=None, clock=Clock())
    version = WeightVersion(incarnation="run", step=0)
    state.publish(version)
    leases = state.lease("a", num=50, held=version)
    acknowledged: list[str] = []
    said: dict[str, object] = {"acknowledged": acknowledged}
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    for lease in leases:
        try:
            state.append("a", lease=lease.key, ipc=make_ipc(lease))
        except LogWriteError as error:
            said["error"] = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said["retried"] = state.append("a", lease=lease.key, ipc=make_ipc(lease))
        acknowledged.append(lease.group_id)
        if "error" in said and len(acknowledged) % 10 == 0:
            break
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
