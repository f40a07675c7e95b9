"""Measure the machine's use during a run, as MLflow's system metrics. This module imports no torch.

MLflow is imported in functions, because importing it takes seconds.
"""

import os
import threading
from contextlib import suppress
from typing import Any

from t2i.tracking.mlflow_client import first_line, say


class SystemMetrics:
    """Use of processor, memory, disk, network and GPUs, measured by MLflow's own monitors and recorded as `system/…`.

    MLflow's own thread would ask the server at every sample, and end when the server fails. `SystemMetrics` only
    measures; the tracker writes the measurements to the spool.
    """

    def __init__(self) -> None:
        from mlflow.environment_variables import (
            MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING,
            MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
        )
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.interval_s = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10.0
        self.samples = MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
        self.monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # the machine has no GPU, or lacks the package that queries it
            self.monitors.append(GPUMonitor())

    def measure(self, ended: threading.Event) -> dict[str, float]:
        """Return the means of the machine's use over the next samples.

        Setting `ended` cuts the wait for samples short.
        """
        for _ in range(self.samples):
            for monitor in self.monitors:
                monitor.collect_metrics()
            if ended.wait(self.interval_s):
                break
        values = {f"system/{key}": value for part in self.monitors for key, value in part.aggregate_metrics().items()}
        for monitor in self.monitors:
            monitor.clear_metrics()
        return values


def requested_system_metrics() -> SystemMetrics | None:
    """Return the monitors if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING asks for them.

    If the monitors do not work, print the reason.
    """
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").strip().lower() not in ("true", "1"):
        return None
    try:
        return SystemMetrics()
    except Exception as error:  # an interval that is no number, or a monitor that this machine does not support
        say(f"warning: MLflow's system metrics are not recorded: {first_line(error)}")
        return None
