"""Fast paths that are asked for and slow: nothing that is computed changes, so no other tool can see it."""

import os

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

# Large enough to be bound by matrix products: 1.6M weights in linear layers.
LARGE = Setting(sizes={"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}, steps=6, batch=2)


@bug("slow_path", "precision", "bf16 on a processor without it", "seen with the recipe", LARGE)
def bf16_without_units(run: Run):
    """bf16 is asked for on a processor that emulates it: 4 to 30 times slower than fp32."""
    run.took_effect()
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"  # this run's process has made no product yet
    run.arguments |= {"bf16": True}


HEALTHY = {"1.6M weights in fp32": LARGE}
