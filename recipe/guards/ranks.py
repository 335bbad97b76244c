"""How the guards of several ranks exchange data."""

from torch import distributed


class Ranks:
    """The ranks of a run, over the host's network (gloo): what is exchanged here never waits for a device."""

    def __init__(self, world_size: int, is_main: bool):
        self.world_size, self.is_main = world_size, is_main
        self._group = distributed.new_group(backend="gloo") if world_size > 1 else None

    def gather(self, payload) -> list:
        """Every rank's payload on rank 0; elsewhere this rank's alone."""
        if self._group is None:
            return [payload]
        payloads = [None] * self.world_size if self.is_main else None
        distributed.gather_object(payload, payloads, dst=0, group=self._group)
        return payloads if self.is_main else [payload]

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def close(self) -> None:
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None
