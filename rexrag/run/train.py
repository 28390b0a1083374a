"""`rexrag train`, from a locked run folder to its end: prepares, starts Ray, makes and wires the parts, ends them.

The one module that builds all parts; the loop that they then run in is `run/controller.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
import torch
from ray.exceptions import RayError

from rexrag.buffer.recovery import books_from_log
from rexrag.buffer.replay_actor import ReplayActor, start_replay_actor
from rexrag.buffer.status import BufferPosition
from rexrag.config import Config
from rexrag.errors import CollapsedError, ConfigError, Interrupted, RexragError, RunFailure, counted, first_line
from rexrag.files import NO_ROOM, write_atomic
from rexrag.learner.learner_actor import LearnerActor, LearnerSpec, ask_progress, start_learner
from rexrag.model.fetching import is_hub_id
from rexrag.preparation.prepare import prepare
from rexrag.processes import num_cores
from rexrag.recipe import flatten
from rexrag.reporting.alarms import Alarms
from rexrag.reporting.board import Board
from rexrag.reporting.log_file import log_instead
from rexrag.reporting.reporter import Reporter
from rexrag.reporting.terminal import Progress
from rexrag.run.cluster import check_reachable, cluster_address, refusal
from rexrag.run.control import Desk
from rexrag.run.control_actor import run_name, start_control
from rexrag.run.controller import Controller
from rexrag.run.engine_choice import choose_engine
from rexrag.run.fleet import Fleet
from rexrag.run.identity import first_step_of
from rexrag.run.inputs import Inputs, model_path_of, read_inputs
from rexrag.run.layout import Layout, plan_machine
from rexrag.run.nodes import probe_paths, wait_for_layout
from rexrag.run.part_settings import (
    adapter_settings,
    device_of,
    learner_settings,
    loop_settings,
    rollout_settings,
    search_actor_settings,
)
from rexrag.run.plan import TrainRequest
from rexrag.run.ray_metrics import RayMetrics
from rexrag.run.remote import Handle, call, is_done_in, result_of
from rexrag.run.rewind import go_back, rate_factor
from rexrag.run.search_pool import SearchPool
from rexrag.run.signals import StopSignal
from rexrag.run.supervisor import Supervisor
from rexrag.run.wanted import note_wanted, with_wanted
from rexrag.run_folder import RunFolder
from rexrag.types import WeightVersion

LOG = logging.getLogger(__name__)


def check_startable(config: Config) -> None:
    """Refuse what could not start here, before a run folder is made and `[prepare]` takes minutes.

    Raises:
        ConfigError: the cluster cannot be reached, the engine is not installed, or this machine is too small; what a
            cluster has Ray will say.
    """
    check_reachable(cluster_address())
    choose_engine(config)
    if cluster_address() is None:
        plan_machine(config, num_cores=num_cores(), num_gpus=torch.cuda.device_count())


def train(request: TrainRequest, *, progress: Progress) -> None:
    """Train until the last step of the recipe.

    Raises:
        UserError: settings or files that cannot be used; nothing was started.
        RunFailure: a part of the run died or stalled; the last checkpoint is intact.
        Interrupted: a stop signal came; a checkpoint of all finished steps was saved.
    """
    config, run = request.config, request.run
    with StopSignal().installed() as stop:
        num_threads = config.learner.threads or num_cores()
        prepare(config, folder=run.prepared, num_threads=num_threads, progress=progress)
        inputs = read_inputs(request)
        for note in inputs.notes:
            progress.note(note)
        while True:
            try:
                _train_once(request, inputs=inputs, stop=stop, progress=progress)
            except OSError as error:
                if error.errno in NO_ROOM or isinstance(error, BrokenPipeError):
                    raise
                raise RunFailure(f"{error}; look at the run's storage, and give the command again") from error
            except CollapsedError as collapse:
                request = go_back(request, collapse)
                inputs = replace(inputs, model_path=model_path_of(request))
                progress.note(
                    f"{collapse}; the run goes back to step {request.start_step}, and on at "
                    f"{rate_factor(run) * config.optimizer.learning_rate:g} as its learning rate"
                )
            else:
                return


def _train_once(request: TrainRequest, *, inputs: Inputs, stop: StopSignal, progress: Progress) -> None:
    """All steps that are left, with parts, Ray and TensorBoard of their own.

    Raises:
        CollapsedError: the policy breaks.
    """
    progress.stage("starting Ray")
    purge_step = request.start_step + 1 if request.resumed else None
    with _ray(), Board(request.run, purge_step=purge_step, settings=flatten(request.config)) as board:
        stop.be_graceful()
        _train(request, inputs=inputs, stop=stop, board=board, progress=progress)


def _train(request: TrainRequest, *, inputs: Inputs, stop: StopSignal, board: Board, progress: Progress) -> None:
    config, run = request.config, request.run
    layout = _layout(request, inputs=inputs, stop=stop, progress=progress)
    pool = _started_pool(request, layout=layout, stop=stop, progress=progress)
    progress.stage("starting the learner and the rollout actors")
    learner = start_learner(_learner_spec(request, layout=layout, inputs=inputs), share=layout.learner)
    bound_s = config.train.stall_timeout_s
    nodes = _nodes_of(learner, stall_timeout_s=bound_s, stop=stop)
    buffer = _started_buffer(request, inputs=inputs, node_id=next(iter(nodes), None))
    position = _opened(buffer, stall_timeout_s=bound_s, stop=stop)
    for damage in position.damages:
        progress.note(f"warning: {damage}")
    first = WeightVersion(incarnation=position.incarnation, step=request.start_step)
    fleet = _start_fleet(request, layout=layout, inputs=inputs, first=first, buffer=buffer)
    reporter = _reporter(request, board=board, progress=progress)
    desk = Desk(
        start_control(run.root),
        run_folder=run.root,
        num_steps=config.train.steps,
        reporter=reporter,
        fleet=fleet,
        buffer=buffer,
        retriever=config.retriever.kind,
        on_scale=lambda num_actors: note_wanted(run, config, num_actors),
    )
    supervisor = Supervisor(
        fleet=fleet,
        parts={"replay buffer": buffer.__ray_ready__.remote, "learner": partial(ask_progress, learner)},
        stop=stop,
        stall_timeout_s=bound_s,
        desk=desk,
        learner_nodes=nodes,
        pool=pool,
    )
    controller = Controller(
        loop_settings(config),
        run_folder=run,
        first=first,
        checkpoint=request.checkpoint,
        buffer=buffer,
        learner=learner,
        fleet=fleet,
        supervisor=supervisor,
        reporter=reporter,
        dev=inputs.dev,
        test=inputs.test,
    )
    try:
        with _findable(run):
            _run(controller)
    except BaseException:
        # Whatever goes wrong here has less to say than what ended the run.
        with log_instead(OSError, RexragError):
            _write_accounting(run)
        with log_instead(RayError):
            _stop(fleet, pool)
        raise
    _write_accounting(run)
    _stop(fleet, pool)


def _reporter(request: TrainRequest, *, board: Board, progress: Progress) -> Reporter:
    """On a cluster the metrics go to Ray's, too."""
    record = None if cluster_address() is None else RayMetrics(run_name(request.run.root)).record
    alarms = Alarms(by_shares=request.config.correction.mixture == "normalized")
    return Reporter(board=board, progress=progress, record=record, alarms=alarms)


def _started_pool(request: TrainRequest, *, layout: Layout, stop: StopSignal, progress: Progress) -> SearchPool:
    """The search actors, before anybody searches; none but with `retriever.kind = "ray"`."""
    config = request.config
    settings = search_actor_settings(config, log_file=request.run.log)
    pool = SearchPool(settings, num_actors=layout.num_searchers, share=layout.searcher)
    if layout.num_searchers:
        progress.stage(f"starting {counted(layout.num_searchers, 'search actor')}")
        pool.await_ready(timeout_s=config.train.stall_timeout_s, stop=stop)
    return pool


def _stop(fleet: Fleet, pool: SearchPool) -> None:
    fleet.stop()
    pool.stop()


def _layout(request: TrainRequest, *, inputs: Inputs, stop: StopSignal, progress: Progress) -> Layout:
    config = with_wanted(request.run, request.config)
    if cluster_address() is None:
        room = {"num_cores": num_cores(), "num_gpus": torch.cuda.device_count()}
        try:
            return plan_machine(config, **room)
        except ConfigError as error:
            if config is request.config:
                raise
            progress.note(f"what rexrag scale asked for last does not fit, the recipe's number is taken: {error}")
            return plan_machine(request.config, **room)
    paths = {"retriever.path": config.retriever.path}
    if not is_hub_id(inputs.model_path):  # each node takes that from its own cache, or fetches it
        paths["model.path"] = Path(inputs.model_path)
    paths |= {"probe.hints": config.probe.hints, "env.prompt_file": config.env.prompt_file}
    read = {setting: path for setting, path in paths.items() if path is not None}
    while True:
        layout = wait_for_layout(config, progress=progress, stop=stop)
        if probe_paths(read, writable=request.run.root):
            return layout


def _start_fleet(
    request: TrainRequest, *, layout: Layout, inputs: Inputs, first: WeightVersion, buffer: Handle[ReplayActor]
) -> Fleet:
    config, log = request.config, request.run.log
    return Fleet(
        rollout_settings(config, model_path=inputs.model_path, num_threads=layout.actor.threads, log_file=log),
        num_actors=layout.num_actors,
        num_groups=layout.num_groups,
        num_fitting=layout.num_fitting,
        share=layout.actor,
        version=first,
        buffer=buffer,
        on_death=lambda actor_id: call(buffer, ReplayActor.release, actor_id),
        hang_timeout_s=config.train.stall_timeout_s / 2,
    )


@contextmanager
def _findable(run: RunFolder) -> Iterator[None]:
    """Says in the run folder which Ray the run goes on in, for as long as it does."""
    address = ray.get_runtime_context().gcs_address
    write_atomic(run.cluster, json.dumps({"address": address}) + "\n")
    try:
        yield
    finally:
        with log_instead(OSError):
            run.cluster.unlink(missing_ok=True)


def _run(controller: Controller) -> None:
    try:
        controller.run()
    except Interrupted:
        controller.save()
        raise
    except CollapsedError:
        raise  # what is finished is what the run goes back from
    except (OSError, RexragError, RayError):
        with log_instead(OSError, RexragError, RayError):
            controller.rescue()
        raise


def _nodes_of(learner: Handle[LearnerActor], *, stall_timeout_s: float, stop: StopSignal) -> list[str]:
    """Where the learner's ranks have found places: the buffer goes to the first, with which it exchanges each batch.

    Empty: the run has this machine alone.
    """
    if cluster_address() is None:
        return []
    what = "the run waits for nodes with room for its learner"
    nodes = call(learner, LearnerActor.node_ids)
    if not is_done_in(nodes, timeout_s=stall_timeout_s, what=what, stop=stop):
        raise RunFailure(f"{what}: none in {stall_timeout_s:.0f} s (train.stall_timeout_s)")
    return result_of(nodes, what=what)


def _started_buffer(request: TrainRequest, *, inputs: Inputs, node_id: str | None) -> Handle[ReplayActor]:
    is_new = not request.resumed
    return start_replay_actor(inputs.replay, resume_step=request.start_step, is_new=is_new, node_id=node_id)


def _opened(buffer: Handle[ReplayActor], *, stall_timeout_s: float, stop: StopSignal) -> BufferPosition:
    what = "the run waits for the replay buffer to read its log"
    opened = call(buffer, ReplayActor.open)
    if not is_done_in(opened, timeout_s=stall_timeout_s, what=what, stop=stop):
        raise RunFailure(f"{what}: not done in {stall_timeout_s:.0f} s (train.stall_timeout_s)")
    return result_of(opened, what=what)


@contextmanager
def _ray() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, else a local Ray that ends with this process.

    The namespace is this process's own, so runs on one cluster do not meet.
    """
    address = cluster_address()
    logging.getLogger("ray").setLevel(logging.ERROR)  # its advice on token authentication is no concern of a run's
    try:
        ray.init(
            address=address or "local",  # without an address Ray would join any head of this machine
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except Exception as error:  # fault boundary: Ray raises bare ones, too
        if address is not None:  # it was there when the run was checked, hours ago it may be
            raise RunFailure(f"{refusal(address, first_line(error))}; give the command again once it is") from error
        raise RunFailure(
            f"Ray could not be started on this machine ({first_line(error)}); where it is only busy, give the "
            "command again"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _learner_spec(request: TrainRequest, *, layout: Layout, inputs: Inputs) -> LearnerSpec:
    config = request.config
    assert config.model.path is not None, "the recipe was checked: a run has a model"
    device = device_of(layout.learner.gpus)
    return LearnerSpec(
        model=Path(config.model.path) if request.checkpoint is None or config.learner.lora else request.checkpoint,
        settings=learner_settings(config, rate_factor=rate_factor(request.run)),
        device=device,
        hints=[inputs.hints.ids(index) for index in range(len(inputs.hints))],
        kept=[inputs.hints.kept(index) for index in range(len(inputs.hints))],
        threads=layout.learner.threads,
        seed=config.train.seed,
        evidence_folder=request.run.root,
        checkpoint=request.checkpoint,
        adapters=adapter_settings(config),
        reference=Path(config.model.path) if config.loss.kl_coef > 0 and not config.learner.lora else None,
        canary=inputs.canary,
        log_file=request.run.log,
        num_ranks=config.learner.num_ranks,
        rank_timeout_s=config.train.stall_timeout_s,
    )


def _write_accounting(run: RunFolder) -> None:
    """`accounting.json`, from the log alone."""
    accounting, damages = books_from_log(run.buffer, first_step=first_step_of(run))
    write_atomic(run.accounting, json.dumps({**accounting, "damages": damages}, indent=1) + "\n")
