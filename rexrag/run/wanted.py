"""The number of rollout actors that `rexrag scale` asked for, kept for a resume."""

from __future__ import annotations

import json
import logging

from rexrag.config import Config
from rexrag.files import write_atomic
from rexrag.reporting.log_file import log_instead
from rexrag.run_folder import RunFolder

LOG = logging.getLogger(__name__)


def note_wanted(run: RunFolder, config: Config, num_actors: int) -> None:
    """Keep what was asked for; a folder that cannot be written costs no more than that."""
    wanted = {"num_actors": num_actors, "instead_of": config.rollout.num_actors}
    with log_instead(OSError):
        write_atomic(run.wanted, json.dumps(wanted) + "\n")


def with_wanted(run: RunFolder, config: Config) -> Config:
    """The settings with what was asked for last, unless `rollout.num_actors` was set anew since."""
    try:
        wanted = json.loads(run.wanted.read_text(encoding="utf-8"))
        num_actors, instead_of = wanted["num_actors"], wanted["instead_of"]
    except (OSError, ValueError, TypeError, KeyError):
        return config
    if instead_of != config.rollout.num_actors or not isinstance(num_actors, int) or num_actors < 1:
        return config
    LOG.info("rollout.num_actors is %d, as rexrag scale asked for", num_actors)
    rollout = config.rollout.model_copy(update={"num_actors": num_actors})
    return config.model_copy(update={"rollout": rollout})
