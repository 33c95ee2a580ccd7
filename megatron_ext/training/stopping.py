"""When a run stops before its last iteration: a signal, a time limit, an interval."""

import time

from megatron_ext.config.training import TrainingConfig
from megatron_ext.platform.collective import max_over_ranks
from megatron_ext.training.signals import StopSignals


class Stopping:
    """Watches for reasons to stop and lets all ranks agree on them.

    From here on, what ``signals`` received asks for a save and an orderly end.
    """

    def __init__(self, config: TrainingConfig, signals: StopSignals):
        self.config, self.signals = config, signals
        self.start = time.time()
        signals.begin()

    def requested(self) -> bool:
        """Whether any rank was asked to stop; a collective call."""
        return bool(max_over_ranks([float(self.signals.received is not None)])[0])

    def reason(self, iteration: int) -> str | None:
        """Why all ranks stop now, or None; a collective call."""
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
