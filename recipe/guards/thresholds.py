"""Every number that decides whether a guard speaks, when, and on how much evidence: in the order of the map in
`recipe/guards/__init__.py`.

The comment at a number is its origin: measured (on what), derived (from what), or chosen. What is chosen and not
measured says so. `docs/findings.md` names most of them; a test holds it to the values here. Numbers elsewhere in the
package are sizes of the implementation, or choose the words of a finding.
"""

import math

import torch

# --- callback.py, optimization.py

# Steps; a look at the head's gradient in passing costs half a per cent of the demo's step (measured by
# `python -m tests.benchmarks guards`).
LISTEN_EVERY = 2
# And every 100th after the last. Chosen, not measured: ranks that begin apart are found at once, later drift in time.
CHECKSUM_STEPS = (1, 10, 100)

# Step before which the probes of loss and attention are asked once more: adapters and gates begin at zero. Chosen, not
# measured: Adam has moved a weight of zero 20 times by then.
ASK_AGAIN = 20

# --- listener.py

# Looked at in each row of a micro-batch, and in all of its rows: 4 rows of 18, of which 16 can be judged, since a
# position needs the two tokens after it. Chosen, not measured, to keep the look short.
POSITIONS, MAX_POSITIONS = 18, 72
# Micro-batches. Where a fused loss makes no logits, a look costs four heads of these positions. Chosen, not measured.
FUSED_EVERY = 8

# --- preflight.py

# What the probes look at, to be done in seconds and under training's memory: rows of the micro-batch (fewer of long
# ones, but two, so that one can be held against the other), and positions where the length makes no difference.
# Measured on the 180M: 2,048 tokens and rows of 256 halved time and memory against 4 whole rows.
PREFLIGHT_MAX_ROWS, PREFLIGHT_MIN_ROWS, PREFLIGHT_MAX_TOKENS = 4, 2, 2048
EVAL_ROWS, SHORT = 2, 256

# --- probes/targets.py

# Fewer clear positions than this in a row decide nothing. Derived: where 3 of a hundred hit by chance, independently,
# more than half of 8 do so once in 800,000 rows.
MIN_POSITIONS = 8
# A row is judged by the shift at which most of its targets lie. By chance a target equals another token of the row in
# two or three of a hundred positions (measured over forty model classes), so half is far from both sides.
MAJORITY = 0.5
# Targets at none of the shifts 0, 1, 2: a few may be chance or special handling, a tenth is not. Chosen, not measured,
# above the two or three of a hundred.
MAX_ELSEWHERE = 0.1
# Of the scored targets, equal to the labels of the next position: the loss follows the labels, so tokens were replaced
# on purpose. Chosen, not measured: all but ties by chance.
FOLLOWED = 0.95
# Of the sum of a gradient's positive entries, in its lowest one. Derived: cross entropy has one negative entry, as
# large as all the positive ones together; what label smoothing leaves once a model is sure is shared among many.
NEGATIVE_SHARE = 0.5
# Of the positions with a label: the loss depends on none of their logits. Chosen, not measured: a mask inside the loss
# that is wrong takes a large part, one at the ends of four shards 2.4 % of 128 positions (zoo). A model's own loss
# leaves out none; one that a user wrote may choose its positions, and is told of it as information.
MAX_UNSCORED = 0.01
# Of the sum of probabilities from 1: bf16 rounds each to 0.4 %.
SHARES_ERROR = 0.01
# Nats, mean over the scored positions. A gradient is zero too where softmax rounds to 1, at a loss of 1e-7. Chosen,
# not measured: a mean that a model with a tenth of its positions there stays far below.
SURE = 0.1
# Of a micro-batch, where the targets cost four heads. Chosen, not measured: enough for hundreds of positions a row.
MAX_FUSED_POSITIONS = 1024
# Share of the gradient that the best target leaves unexplained: 1e-7 in fp32, 1e-3 in bf16. Logits scaled by 2 leave
# up to 0.1, and the targets are still right; by 3, 0.3.
MAX_REMAINDER = 0.15

# --- probes/attention.py

# One row is asked and another must be there to leak; more only where they are cheap. Chosen, not
# measured, as in the preflight.
ATTENTION_MIN_ROWS, ATTENTION_MAX_ROWS, ATTENTION_MAX_TOKENS = 2, 4, 2048
# Of the largest gradient. Masked tokens get exactly zero (21 families, fp32 and bf16); only mixing by FFT would round,
# by eps * log2(length) = 1e-6 in fp32, which it needs, here with ten times the room. The tests' weakest leak is 2e-4.
ROUNDING = 1e-5
# Half of the logits moved by this many standard deviations though no gradient flows. Mixtures of experts round anew
# with the number of tokens an expert gets, and a rounding can turn a token to another expert: a few positions move far
# and the others by a few eps (bf16: 0.8 %). In fp32 such turns are rare and the others move by 1e-6, so a thousandth
# tells; leaks of a hundredth were missed by half a deviation.
UNPROVEN, UNPROVEN_FP32 = 0.5, 1e-3

# --- probes/equivalence.py

# One label in so many stays in the second micro-batch. Derived: a mean of means then weighs the tokens of the two
# 0.56 and 4.5 times, which is the 40 % below.
KEPT = 8
# Weights are compared by their median over a row's positions. bf16 keeps 8 bits, so one weight is good to 2 %; the
# faults looked for are off by 40 % and more.
WEIGHTS = 0.05
# Relative, of a loss. Most forward passes repeat bit for bit; all of bf16's rounding against fp32 moved the mean over
# 512 tokens by 1.6e-5 (6-layer Llama), dropout of 0.1 that over 4,096 by 5e-5 to 4e-4 (4-layer GPT-2).
REPEATED = 2e-5
# In fp32: the mean of fp32 losses is good to 1e-7. Dropout of 0.1 moves an untrained model's by 1e-5 only.
REPEATED_FP32 = 2e-6
# Relative: an evaluation in bf16 of a model in fp32 rounds far less, the faults looked for are factors.
EVALUATED = 0.01
# Relative: mean of batch means instead of tokens, last batch not full: a few percent (transformers #39241).
REPORTED = 0.05
# A factor is a whole number up to this (ranks, micro-batches, rows), or its inverse, to this share. Chosen, not
# measured: a mean that is off by chance is seldom within 2 % of one.
LARGEST_FACTOR, FACTOR_TOLERANCE = 64, 0.02
# Relative, of loss and of gradients. Inductor sums in another order: on a 2-layer Llama 0 and 1e-6 in fp32, 1e-7 and
# 9e-3 in bf16. TF32, which torch_compile turns on, rounds by 5e-4, and gradients gather rounding over the layers. For
# fp16 chosen between the two, not measured.
COMPILED = {torch.float32: (1e-3, 0.02), torch.bfloat16: (1e-2, 0.15), torch.float16: (5e-3, 0.1)}
# Of the whole gradient's norm: below, a parameter's gradient is mostly rounding (biases of keys: all of it).
SMALL = 0.01
# How much further a gradient's sum may be off than its norm. Derived: rounding errors are independent, so their sum is
# about as large as their norm; three times that is allowed.
SUM_ROOM = 3

# --- probes/gradient.py

# Share of the loss by which a step along the gradient should change it. Measured (21 families of the zoo in fp32, new
# and after 30 steps on one batch, losses of 0.1 to 6.2): curvature and rounding then take 0.23 % at most, 0.9 % after
# 1,000 steps; routing 0.9 and 10 %. Under bf16 autocast rounding takes 13 %, so it is done in fp32.
GRADIENT_STEP = 5e-4
# From 1, of what the change is to the one foretold: eight times the 0.23 % above.
GRADIENT_OFF = 0.02
# More is no auxiliary loss of small weight put into backward only. Chosen, not measured; one layer's backward that is
# wrong for half of its elements is off by 0.06 to 0.2 (3-layer Llama).
GRADIENT_FAR_OFF = 0.05
# Of that distance, between steps of three sizes: else the loss is not smooth. 30 of 31 bugs that were off had 0.05 and
# less (the other 0.5), routing (Mixtral) and rounded weights 0.3 to 10; they are known by their operations besides.
SAME_SLOPE = 0.1
# Share of the weights' norm that a step may move them. Healthy ones need 1e-3 and less. Chosen, not measured.
SMALL_MOVE = 0.02
# Relative, of a parameter's gradient with and without activation checkpointing. The same operations on the same
# numbers: equal bit for bit on CPU (Mixtral's routers, reentrant: 0.006). Dropout of 0.1 drawn anew: 0.6.
CHECKPOINTED = 0.1

# --- batches.py

# Tokens that are not scored: fewer are no prompt, such as the first token of a document. Chosen, not measured.
SHORTEST_PROMPT = 4

# --- watch.py

# Steps kept for windows, of which references name their own. Chosen, not measured.
HISTORY = 1000
# Scored labels, and the share that says what labels are in this run. Chosen, not measured: of 64 a share of 0.9 is
# known to 0.04.
LABELS_TO_LEARN, LABEL_CLEAR = 64, 0.9
# Of a row's labels. Chosen, not measured: label noise and denoising objectives stay far from it.
LABEL_MAJORITY = 0.5
# Of the positions looked at in passing, 16 a row: a few by chance are not a fault. Chosen as MAJORITY.
PASSING_MAJORITY = 0.5
# In a row; the first after a resume still has the rate of the schedule as it was when saved.
RATE_STEPS = 2
# In a row, before the weights of micro-batches are said to be uneven. Chosen, not measured.
WEIGHT_STEPS = 3
# Counts that differ by less give weights that differ by less than bf16 gradients can tell (0.4 %) x 10.
UNEVEN = 0.05
# Positions of one micro-batch that weigh differently by more: a loss weighted on purpose. Chosen, not measured.
WEIGHTED_LOSS = 1.2

# --- vitals.py

# A jump: all RECENT steps lie clear of everything in the JUMP_WINDOW steps before them. One batch is never enough
# (public 124M runs have single steps 8 sd off their trend), nor are two kinds of batches in one stream. Rate of false
# alarms on simulated healthy curves (power law, student-t noise down to 2 degrees of freedom, two kinds of batches,
# plateaus, sources that change by 0.7 nats): none in 19M steps; with AR(1) correlation up to 0.95 besides, 21 in 5M,
# all from shocks of 3 degrees of freedom that fade over 20 steps, as spikes do.
JUMP_WINDOW, RECENT = 50, 5
JUMP_SDS = 8  # robust, of the window; in the simulations above
RISE_NATS = 1.0  # spikes that cost something are larger; a change of the mixture of sources is smaller (0.7 above)
FALL_NATS, FALL_SHARE = 1.0, 1 / 3  # web text to code is 3.0 to 1.2 at most; a leak goes towards 0
NORM_FACTOR = 20  # healthy 124M run: norms fall 18-fold in 300 steps, single batches are 7-fold off (llm.c)
NORM_CLEAR = math.log(2)  # of all norms in the window: two kinds of batches have two levels. Chosen, not measured
ZERO_NORMS = 3  # one step may have every label masked. Chosen, not measured
# Copying with tied embeddings starts 0.47 below (7.85 of ln 4096); healthy public runs at most 0.01, and up to 1.5
# times the guess where the head is not scaled down. Chosen between these.
INIT_BELOW, INIT_ABOVE = 0.2, 2.0
RATE_TOLERANCE = 1e-3  # of the rate: learning rates kept as fp32 tensors are within 1e-7, wrong ones are per cents off
# Short batches end a pass: at most one step in five is excused. Chosen, not measured.
BUDGET_STEPS, BUDGET_SHARE = 20, 0.8
EOS_SEEN = 32  # documents that ended without EOS as target, before it is said. Chosen, not measured
EOS_ABSENT_TOKENS = 1_000_000  # longer than one document of any usual corpus, a hundred times over. Not measured
# Texts that begin with BOS, and the share of them that begin with exactly two. Derived: where the id is an ordinary
# token of share p, runs of two are p(1 - p) of all, a quarter at most: 13 of 16 by chance once in 260,000 times. Empty
# documents are a few per cent.
BOS_TEXTS, BOS_SHARE = 16, 0.8
PADDING_SCORED, PADDING_SHARE = 100, 0.01  # of the scored positions; less does no harm. Chosen, not measured
# Known faults start at 1.5 nats at the usual loss of 3 (eval divided by 2 steps of accumulation, torchtitan#1758; no
# causal mask: 2.7, entrenar#310). Code and web text differ by 1.8, so up to 2 nats it is information. Ratio and steps
# are chosen, not measured: the first of these faults has a ratio of 2.
GAP_NATS, GAP_WARNING, GAP_RATIO, GAP_STEPS = 1.2, 2.0, 1.5, 20
# Losses that a place in the block needs, and standard errors by which the loss must fall from the first place to the
# last: evidence beside a finding. Chosen, not measured.
POSITION_LOSSES, POSITION_ERRORS = 30, 3

# --- evaluation.py

# Rows of each eval set that are read before step 1, and for how long. Chosen, not measured: 2 % of a set is reported,
# which a thousand rows show.
EVAL_ROWS_READ, EVAL_SECONDS = 1024, 2.0

# Rows of so many tokens that are all the same, and scored: no text has them, blank stretches of code are shorter. So
# many, and this share of all rows. Chosen, not measured.
FILLED_TOKENS, FILLED_ROWS, FILLED_SHARE = 64, 4, 0.01

# --- updates.py, parameters.py

# Elements of a tensor sampled. Derived: a share of 0.5 is known to 0.01.
PER_TENSOR = 4096
# Zero-initialised projections and LoRA hide gradients for a step or two; routing finds every expert. Chosen, not
# measured.
FROZEN_STEPS = 8
# Of the elements that a step moved, still there at the next step. Chosen, not measured: nobody else writes to the
# weights of most runs; a projection after the step (to unit norm) takes back less than half of a move.
UNDONE_SHARE = 0.5
# Times the learning rate, and of the elements with a gradient, in a run's first FROZEN_STEPS steps. Derived: Adam's
# first step moves each against its gradient by the rate; of gradients that are noise 34 % have the other sign than
# their mean at the eighth (beta 0.9). An epsilon 20 times the gradient leaves a twentieth of a move.
SMALL_UPDATE, SMALL_SHARE = 0.05, 0.5
# Without gradient, after steps that had one. Chosen, not measured: routing finds every expert sooner.
STOPPED_STEPS = 16
# Derived: below it a step may be too small for a float32 weight of 1.0 (half its spacing is 3e-8).
MOVING_RATE = 1e-6
# Derived: above it a gradient is not damped by Adam's epsilon of 1e-8. A power of two: exact in float32.
PLAIN_GRADIENT = 2.0**-20
# Elements of a parameter: fewer may all sit still under small gradients. Chosen, not measured.
MOVING_ELEMENTS = 16
# Of a new model's parameters, excluded on purpose; fixed sinusoidal positions are below it. Chosen, not measured.
FROZEN_SHARE = 0.5
# A window. Chosen, not measured: long enough for rates of a usual run to add up to spacings of bf16 weights.
LOST_STEPS = 64
# An element is judged where LOST_STEPS times the rate is this many of its spacings. Adam's steps are at most the rate
# and change sign now and then, so the exact sum is a fifth of it at worst: one spacing, which stochastic rounding and
# Kahan summation bring to the weights.
# Measured (AdamW, rates 1e-6 to 1e-3, weights of sd 0.02 to 1): where rates are under a spacing plain bf16 moves 6 to
# 24 % of these elements; Kahan summation, stochastic rounding and fp32 copies move 65 to 99 %.
LOST_SPACINGS = 5
LOST_SHARE, LOST_ELEMENTS = 0.4, 1000  # between the two; of 1,000 elements a share is known to 0.016
# Of one pinned batch in eval mode, in nats. Rounding alone: fp32 sums in another order move a loss by 1e-6 to 1e-5;
# bf16 logits are good to 2^-8 of themselves, 1e-3 after the mean over a batch. Ten times that and more is no rounding.
RESUME_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}

# --- precision.py

# Columns of a weight whose casts are looked at, and the share of these elements that are not the weight's. Derived:
# casts are exact but for what a device flushes to zero; in fp16 that is 0.24 % of weights of sd 0.02.
CAST_COLUMNS, STALE_SHARE = 8, 0.01

# --- gradients.py

# Of the larger of two gradients: the sum of what micro-batches gave, and what the step is taken with. Equal bit for
# bit in fp32; half precision adds with 0.4 % a micro-batch. Faults leave out a micro-batch or add a step.
GRADIENT_ERROR = {False: 0.01, True: 0.2}
# Steps at fault before it is said, of the last ones: a training step may drop one bad batch on purpose. Chosen, not
# measured.
GRADIENT_STEPS, GRADIENT_WINDOW = 2, 20
# Without a change of the weights between steps, before one is reported. Chosen, not measured: who projects weights
# does so after each step or every few.
QUIET_STEPS = 16
# Times what clipping should leave; it is exact to rounding. Chosen, not measured.
UNCLIPPED = 1.1
# And of what clipping should leave. Chosen, not measured: loss scales are 2^10 and more, limits of one's own seldom.
CLIPPED_AWAY = 0.01

# --- adam.py

# Steps of a training that are looked at, and then every so many. Chosen, not measured: the first have rates near zero
# where they warm up, and a look at a few thousand elements is a fraction of a millisecond.
ADAM_STEPS, ADAM_EVERY = 12, 100
# Of the change. Derived: fp32 leaves 1e-6 of it, and ADAM_ROUNDING of the size (16 units in the last place of 6e-8);
# what is another algorithm (decay in the gradient, no correction of the bias) is off by 5 % and more (zoo).
ADAM_ERROR, ADAM_ROUNDING = 0.01, 1e-6

# --- envelope.py

ORDERS = 5  # of n-grams, of which the best is the floor; measured for 5, see the table in the module
# Beyond them a model may know more than counts. Bytes have been measured so far, to 1,200 tokens for each.
TOKENS_PER_TYPE = 1000
# Where it stops besides: grams (28 bytes each, 448 MiB in all) and tokens (40 MB in a checkpoint). Chosen, not
# measured, to bound memory.
MAX_GRAMS, MAX_ENVELOPE_TOKENS = 1 << 24, 20_000_000
BELOW_WINDOW = 10  # steps; that of the measurements in the module
BELOW_MARGIN = 0.3  # nats; on natural text a model stays 0.41 above the floor, on random tokens 0.01 under
# A new model starts at ln(vocabulary), one that copies with tied embeddings at 0.94 of it (7.85 of 8.32, 6M
# parameters), GPT-2 on web text at 0.3 of it. Chosen between these.
UNTRAINED_SHARE = 0.75
ABOVE_WINDOW = 50  # steps. Chosen, not measured: noise of single batches is gone from the mean
CONTEXT_HELPS = 0.3  # nats that the bigram is under the unigram; 0 on random tokens. Chosen, not measured
# Nats under the prequential unigram that need no context: to know the frequencies beforehand would save about
# V ln(N) / 2N, 0.05 for V = 4096 and N = 600k.
UNIGRAM_MARGIN = 0.05
# Nats from one window to the next; batch noise cancels, as the unigram saw the same tokens. Chosen, not measured.
STILL_FALLING = 0.01
# Adam moves a weight by about the learning rate a step, and weights begin at 0.02: at this sum they have gone 25 times
# their size. The demo leaves its plateau at the unigram at a sum of 0.1.
LEARNING_RATE_SUM = 0.5
ABOVE_MIN_STEPS = 300  # for optimizers with larger learning rates; the demo leaves its plateau near step 65

# --- trajectory.py

# How far a fact of the run may be from the reference's and still be the same config. Chosen, not measured: a few added
# tokens or another way of counting, and a rate that was rounded. Bands are in the references, with their origin.
TOLERANCES = {"parameters": 0.02, "learning_rate": 0.01}

# --- ledger.py

# Tokens of a window, and one window in so many is kept. Chosen, not measured: 64 is near the 50 tokens of Lee et al.
# below, and one in 16 keeps 1M windows of 16M tokens.
LEDGER_WINDOW, LEDGER_EVERY = 64, 16
# Kept windows and rows, after which fewer are kept. Chosen to bound memory: 128 MiB of windows, see the
# module.
LEDGER_MAX_WINDOWS, LEDGER_MAX_ROWS = 4 << 20, 4 << 20
# Rows judged together: a duplicated document of 10,000 tokens, which is natural, must stay a small share of them,
# here 8 %.
RECENT_ROWS, RECENT_TOKENS = 512, 1 << 17
# Before repetition is judged. Chosen, not measured: a share of less would be that of a document or two.
LEDGER_MIN_ROWS, LEDGER_MIN_TOKENS = 64, 16384
# Tokens in 50-token strings that occur twice: 0.8 to 7 % of LM1B, Wiki-40B and C4, 19 % of RealNews, where papers
# share agencies' news (Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better", whole corpora).
# Two workers or ranks that read the same give 50 %, a stream that begins again 100 %.
INFO_SHARE, WARN_SHARE = 0.10, 0.25
# Natural duplicates fall on the same place of two packed rows once in block_size times, and seldom lie within a few
# micro-steps: one rank of 16 that reads another's rows is no accident at 6 %. They must be spread over half of the
# recent tokens, so that one long document is not enough. Derived: with 25 % of the text doubled, rows of 64 tokens
# agree by chance in 0.4 %; 5 % let a twentieth of the rows come again unseen (zoo, development).
ALIGNED_SHARE, ALIGNED_ROWS, ALIGNED_SPREAD = 0.02, 8, 0.5
# The same at any distance. Text that runs in loops meets itself at many places of a row (5 % of the rows of a Markov
# source of 0.6 nats a token), so only where a token tells more. Chosen, not measured, but for that source.
WHOLE_SHARE, WHOLE_NATS = 0.04, 1.0
# Declared passes: in a new uniform order at most a tenth of the first documents lie within a tenth of a pass of their
# last use, fewer later. The share is chosen, not measured, clear of that tenth.
NEAR, WARN_SHARE_NEAR = 0.1, 0.30
# Rows after a resume, and the copied share of their tokens. Chosen, not measured: a replay copies all of them.
REPLAY_ROWS, REPLAY_SHARE = 16, 0.5
# Eval documents with a near-copy in train: 0.7 to 5 % of Wiki-40B, C4 and LM1B, 14 % of RealNews (same source). So 2 %
# is to be known, and an error is where no natural corpus reaches. Two rows at least: chosen, one may be an accident.
OVERLAP_ROWS, OVERLAP_WARN, OVERLAP_ERROR = 2, 0.02, 0.20
# An n-gram model that has learned nothing yet says ln V for any text. No more than this is believed; the shortest copy
# that counts has then 18 tokens at a million tokens seen. Chosen, not measured.
MAX_NATS = 2.0
# Derived: a copy counts when chance would give it less than e^-10 times among all pairs of positions.
CHANCE_NATS = 10
FEW_MICRO_STEPS = 16  # prefetching loaders seldom have more workers. Chosen, not measured

# --- journal.py

# A finding is over when its guard has been silent for so many judgments: a fault in some rows comes and goes. Chosen,
# not measured.
PATIENCE = 20
