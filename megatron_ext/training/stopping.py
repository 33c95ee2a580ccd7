"""When a run stops before its last iteration: a signal, a time limit, an interval."""

import time

from megatron_ext.config.training import TrainingConfig
from megatron_ext.platform.collective import max_over_ranks
from megatron_ext.training.signals import StopSignals


class Stopping:
    """Checks the reasons to stop, and makes all ranks agree on them.

    From its creation on, a signal requests a save and an orderly end.
    """

    def __init__(self, config: TrainingConfig, signals: StopSignals):
        self.config, self.signals = config, signals
        self.start = time.time()
        signals.begin()

    def requested(self) -> bool:
        """Whether any rank received a stop signal; a collective call."""
        return bool(max_over_ranks([float(self.signals.received is not None)])[0])

    def reason(self, iteration: int) -> str | None:
        """The reason why all ranks stop now, or None; a collective call."""
        limit, received = self.config.exit_duration_in_mins, self.signals.received
        late = limit is not None and time.time() - self.start > limit * 60
        signalled, overtime = max_over_ranks([float(received is not None), float(late)])
        if signalled:
            return f"received {received or 'a signal on another rank'}"
        if overtime:
            return f"ran for {limit} minutes (--exit-duration-in-mins)"
        interval = self.config.exit_interval
        if interval and iteration % interval == 0:
            return f"reached iteration {iteration} (--exit-interval)"
        return None
