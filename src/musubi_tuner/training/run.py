"""From flags to a finished run: checks, data, model, loop, summary."""

from __future__ import annotations

import time

from musubi_tuner.config.training import TrainNetworkConfig

from .dry_run import run_dry_run
from .plan import report_plan, run_facts
from .run_checks import CheckedRun, check_run
from .run_loop import Listeners, make_listeners, run_loop
from .run_parts import RunData, make_data, make_model, make_preview_parts
from .summary import RunSummary, written_files


def train(config: TrainNetworkConfig, explicit: frozenset[str]) -> int:
    """Run ``ltx2_train_network.py``.

    Raises:
        UserError: anything that the user can mend; before the model is loaded where possible.
    """
    checked = check_run(config, explicit)
    data = make_data(checked)
    previews = make_preview_parts(checked, data)
    model = make_model(checked, data)
    facts = run_facts(checked, data, model)
    report_plan(checked, data, model, facts)
    if checked.config.validation.dry_run:
        return run_dry_run(
            checked.config, model.transformer, model.parameters, data.loader.plan, model.task, data.memory
        )
    listeners = make_listeners(checked, data, model, previews, facts)
    first_step, started = checked.progress.global_step, time.time()
    run_loop(checked, data, model, listeners)
    _summary(checked, data, listeners, first_step, started).log()
    return 1 if listeners.previewer and listeners.previewer.failures else 0


def _summary(checked: CheckedRun, data: RunData, listeners: Listeners, first_step: int, started: float) -> RunSummary:
    save = checked.config.save
    return RunSummary(
        first_step=first_step,
        progress=checked.progress,
        seconds=time.time() - started,
        validation=listeners.validator.last if listeners.validator else {},
        files=written_files(save.output_dir, save.output_name, started),
        peak_memory=data.memory.peak(),
    )
