"""How the guards of several ranks talk to each other."""

from torch import distributed


class Ranks:
    """The ranks of a run, over the host's network (gloo): what is exchanged here never waits for a device."""

    def __init__(self, world_size: int, is_main: bool):
        self.world_size, self.is_main = world_size, is_main
        self._group = distributed.new_group(backend="gloo") if world_size > 1 else None

    def gather(self, told) -> list:
        """What every rank has to tell, on rank 0; elsewhere this rank's alone."""
        if self._group is None:
            return [told]
        ranks = [None] * self.world_size if self.is_main else None
        distributed.gather_object(told, ranks, dst=0, group=self._group)
        return ranks if self.is_main else [told]

    def share(self, word):
        """Rank 0's word, on every rank."""
        if self._group is None:
            return word
        words = [word]
        distributed.broadcast_object_list(words, src=0, group=self._group)
        return words[0]

    def close(self) -> None:
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None
