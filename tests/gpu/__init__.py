"""Everything that needs a GPU, in one command: `python -m tests.gpu --help`, from the checkout's root.

__main__.py      the command: parts, time limits, table
part.py          one part in a process of its own, with a time limit; its figures are on disk as soon as they are known
scale.py         full size or tiny; builds runs of the recipe on the repo's token ids
tokens.py        the token ids, and the command that makes them
environment.py   device, versions, attention kernels, TF32, bf16, torch.compile, Liger
throughput.py    the 180M with and without guards beside a bare loop and stock Trainer; sync.py counts host reads
guards.py        probes on the 180M, healthy and faulty runs of the zoo
correctness.py   losses beside the CPU's, bf16, resume; `python -m tests.gpu.correctness` records the CPU's
schedule.py      the first steps of the 180M's schedule
assertions.py    the tests marked `gpu`
results.py       RESULTS.md
"""
