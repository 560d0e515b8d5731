"""What every logged tag means: one table for the dashboard's text tab, the reports' glossary and the charts' axes.

A pattern is a tag with places: ``<name>`` and ``K`` stand for one part between slashes, ``...`` at the end for all
that follows. The first pattern that fits decides. What a tag is measured on, and its step, are said here once, so that
no chart draws values over the number of iterations beside values over tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast, get_args

__all__ = ["VALIDATION", "VOCABULARY", "Meaning", "describe", "glossary"]

Step = Literal["experience", "iteration", "classes", "once"]
Better = Literal["higher", "lower", "none"]
VALIDATION = "validation/"
"""In front of the figures of a run that is evaluated on validation images."""


@dataclass(frozen=True)
class Meaning:
    """The definition of the tags that a pattern covers.

    Attributes:
        pattern: see the module.
        definition: a sentence without full stop.
        unit: of the values; "fraction" is in [0, 1] unless the definition says otherwise, "nats" is a natural
            logarithm's.
        step: what the values are plotted over: index of the experience (from 0), training iterations since the
            beginning, number of classes learnt, or nothing ("once": one value at step 0, or an image).
        better: which direction is good; "none" where neither is.
        title: short readable name, for columns of tables; the tag itself where it is empty.
    """

    pattern: str
    definition: str
    unit: str
    step: Step
    better: Better = "none"
    title: str = ""

    def covers(self, tag: str) -> bool:
        """Whether the pattern fits the tag."""
        return _compiled(self.pattern).fullmatch(tag) is not None


# A line with pattern, unit, step, what is better and perhaps a title, then the definition, indented.
_TABLE = """
accuracy/last | fraction | experience | higher | last accuracy
    top-1 accuracy over the pooled evaluated samples of all classes seen so far
accuracy/average | fraction | experience | higher | average accuracy
    mean over the tasks seen so far of the accuracy on each, whatever their sizes
accuracy/incremental | fraction | experience | higher | incremental accuracy
    mean over the tasks trained so far of accuracy/last
accuracy/task-K | fraction | experience | higher
    accuracy on task K
accuracy/matrix | fraction | once | none
    image: accuracy on every task after every task
accuracy/within-task | fraction | experience | higher | accuracy of the task
    share of the pooled evaluated samples of all classes seen whose predicted class lies in their own task; absent
    where tasks share classes
accuracy/confusion | fraction | once | none
    image: to the classes of which task the samples of each task were assigned
forgetting/average | fraction | experience | lower | forgetting
    mean over earlier tasks of the best accuracy so far minus the present one, unless evaluation.forgetting names
    another variant; not defined after the first task
transfer/backward | fraction, -1 to 1 | experience | higher | backward transfer
    mean over earlier tasks of the present accuracy minus that right after the task; negative where it was forgotten
transfer/forward | fraction, -1 to 1 | experience | higher | forward transfer
    mean accuracy on tasks right before they are trained minus that of the initial model; needs
    evaluation.streams=all
transfer/<optimizer>/continual | fraction | classes | higher
    of transfer experiments: mean accuracy over the classes learnt so far
continual/accuracy... | fraction | classes | higher
    of transfer experiments: mean accuracy over the classes learnt so far, mean over trials
task-il/accuracy/task-K | fraction | experience | higher
    accuracy on task K among its own classes: this uses task identity
task-il/accuracy/matrix | fraction | once | none
    image: accuracy with the true task given
task-il/forgetting/average | fraction | experience | lower
    forgetting/average with the arg-max among the classes of the true task: this uses task identity
task-il/... | fraction | experience | higher
    the figure of that name with the arg-max among the classes of the true task: this uses task identity
probe/<adaptation>/matrix | fraction | once | none
    image: accuracy per task after adaptation
probe/<adaptation>/task-K | fraction | experience | none
    accuracy on task K after adaptation to it
probe/<adaptation>/forgetting-<kind> | fraction | experience | lower
    mean over earlier tasks of an earlier accuracy after adaptation minus the present one: right after the task
    (diag), the best so far (max-seen), the best of all (max-all)
probe/<adaptation>/backward | fraction, -1 to 1 | experience | higher
    mean over earlier tasks of the present accuracy after adaptation minus that right after the task
probe/<adaptation>/forward | fraction, -1 to 1 | experience | higher
    mean accuracy after adaptation on tasks before they are trained minus that of the initial model
probe/<adaptation> | fraction | experience | higher
    accuracy after adapting to each task's few images; classes compete within their task where it is task-aware;
    mean over the tasks seen so far
drift/cka | fraction | experience | higher | drift: CKA
    linear CKA of the features of fixed images with those of the initial backbone; 1: no drift
drift/cka-previous | fraction | experience | higher
    linear CKA of the features of fixed images with those after the task before; 1: no drift
drift/cka/<block> | fraction | experience | higher
    linear CKA of a block's output with that of the initial backbone
drift/weights | ratio | experience | lower | drift: weights
    distance of the backbone's weights from the initial ones, relative to the norm of these; left out where
    parameters were added
drift/weights-previous | ratio | experience | lower
    distance of the backbone's weights from those after the task before, relative to the norm of these
lr/<group> | per step | iteration | none
    learning rate of a parameter group in the epoch
phase/<name> | 0 or 1 | iteration | none
    1 while the phase of that name lasts, 0 from its end
loss/train | nats | iteration | lower
    mean training loss of the epoch
loss/running | nats | iteration | lower
    mean training loss since the last point
loss/task | nats | iteration | lower
    LoRAC: loss per step without the orthogonality penalty, mean over an epoch
loss/orthogonality | nats | iteration | lower
    LoRAC: the orthogonality penalty per step, weight included, mean over an epoch
loss/contrastive | nats | iteration | lower
    CILA: the contrastive term of the training loss, mean over an epoch
loss/distillation | nats | iteration | lower
    CILA: the distillation term of the training loss, mean over an epoch
loss/<term> | nats | iteration | lower
    a term of the training loss, mean over an epoch
classifier/loss | nats | experience | lower
    loss of the classifier stage's last epoch on its draws
classifier/accuracy | fraction | experience | higher
    accuracy of the classifier stage's last epoch on its draws
slca/alignment/loss-first | nats | experience | lower
    mean loss of the first epoch of the classifier alignment, on features drawn from the classes' Gaussians, with
    logit normalisation where it is on; from the second task on
slca/alignment/loss-last | nats | experience | lower
    mean loss of the last epoch of the classifier alignment, otherwise as loss-first
slca/alignment/head-change | ratio | experience | none
    distance of the classifier's weights after the alignment from those before it, relative to the norm of these
slca/... | see its name | experience | none
    a quantity of SLCA's alignment after a task
lorac/task-inference | fraction | experience | higher | task inference
    share of the evaluated samples of seen classes that were sent to their own task; mean over the tasks seen
lorac/frozen | matrices | experience | none | frozen matrices
    number of frozen matrices after a task
lorac/overlap/largest | products of weights | experience | lower
    over the free matrices, the largest entry of |A_i' A_j| between two tasks
lorac/overlap/cosine | cosine | experience | lower
    over the free matrices, the largest |cosine| between columns of two tasks
lorac/overlap/mean-cosine | cosine | experience | lower
    over the free matrices, the mean |cosine| between columns of two tasks
lorac/importance/largest | score | experience | none
    largest importance score (sensitivity times uncertainty) of the matrices that were free during the task
lorac/importance/mean | score | experience | none
    mean importance score of the matrices that were free during the task
lorac/importance/frozen-share | fraction | experience | none
    share of the free matrices' summed scores that lies in those frozen after the task
lorac/... | see its name | experience | none
    a quantity of LoRAC-IPC after a task
cila/contrastive | nats | experience | lower
    contrastive loss of a task per sample, average over the batches that average_over names, without the factor of
    base_temperature
cila/distillation | nats | experience | lower
    distillation loss of a task per sample, average over the batches that average_over names
cila/coefficient | ratio | experience | none
    weight of the distillation in a task
cila/ratio | ratio | experience | none
    the raw ratio that the coefficient of a task comes from
cila/floor-active | 0 or 1 | experience | none
    1 where the floor decided the coefficient
cila/bound/measured | nats | experience | lower
    held-out contrastive loss of one positive against K negatives, mean over the tasks seen
cila/bound/ceiling | nats | experience | none
    the largest contrastive loss possible; no bound above it says anything
cila/bound/old-distillation | nats | experience | lower
    held-out distillation loss on the earlier tasks, from the model before the task to the one after it
cila/bound/... | nats | experience | lower
    what the bound of that name (one-step, chained, training-loss) allows for the measured contrastive loss
cila/certificate/... | nats | experience | lower
    contrastive loss with all positives on images of the earlier tasks (loss), and the ends that it is certified to
    lie between (lower, upper)
lp/loss | nats | experience | lower
    loss of the linear probe over the classes of its task
lp/loss-all-rows | nats | experience | lower
    loss of the linear probe over all rows of the classifier, where fine-tuning starts
lp/accuracy | fraction | experience | higher
    training accuracy of the linear probe
lp/loss-bn-train | nats | experience | lower
    loss of the linear probe with BatchNorm in training mode
lp/head-norm | norm of weights | experience | none
    norm of the probed rows of the classifier
lp/l2 | per squared weight | experience | none
    penalty that the linear probe was fitted with
zap/rows | rows | iteration | none
    rows of the classifier that were redrawn at this point
zap/inner-loss-first | nats | iteration | lower
    loss of the first image of ASB's sequences while they are learnt, mean over an epoch
zap/inner-loss-last | nats | iteration | lower
    loss of the last image of ASB's sequences while they are learnt, mean over an epoch
zap/... | see its name | iteration | none
    a quantity of zapping
dynamics/loss | nats | iteration | lower
    mean over all tasks of the loss on their probe images
dynamics/accuracy | fraction | iteration | higher
    mean over all tasks of the accuracy on their probe images
dynamics/learning | nats | iteration | higher | learning
    what training a task took off its own loss, sum over the tasks so far
dynamics/interference | nats | iteration | lower | interference
    what training a task added to the losses of earlier ones, sum so far
dynamics/synergy | nats | iteration | higher | synergy
    what training a task took off the losses of earlier ones (recovery), sum so far
dynamics/forgetting | nats | once | lower
    loss of a task at the end minus that right after it was trained, mean over tasks
dynamics/update-cosine/... | cosine | iteration | higher
    cosine of the update really applied with minus the gradient of the current or of past tasks
dynamics/predicted-change-past | nats | iteration | lower
    first-order change of the past tasks' loss by the update
dynamics/... | nats | once | none
    image: change or course of every task's loss
landscape/<optimizer> | nats | once | none
    image: loss around the path of the continual transfer
efficiency/images-per-second | images per second | iteration | higher | images per second
    training images per second of training time, evaluation not counted
efficiency/seconds | seconds | experience | lower
    training time of a task with everything that belongs to training, evaluation not counted
efficiency/run-seconds | seconds | once | lower | seconds
    time of the whole run, evaluation included
efficiency/peak-memory-MiB | MiB | experience | lower | peak memory MiB
    largest memory so far; of the device, on a CPU of the process
efficiency/trainable-parameters | parameters | experience | lower | trainable parameters
    numbers that the optimizer changed in the task
config | text | once | none
    text: the resolved configuration of the run
Top1_Acc_Exp/... | fraction | iteration | higher
    Avalanche's accuracy on one experience
Top1_Acc_Stream/... | fraction | iteration | higher
    Avalanche's accuracy on the stream
Loss_Exp/... | nats | iteration | lower
    Avalanche's mean loss on one experience
Loss_Stream/... | nats | iteration | lower
    Avalanche's mean loss on the stream
"""


def _read(table: str) -> tuple[Meaning, ...]:
    found = []
    for entry in re.split(r"\n(?! )", table.strip()):
        head, *definition = entry.splitlines()
        pattern, unit, step, better, *title = (cell.strip() for cell in head.split(" | "))
        if step not in get_args(Step) or better not in get_args(Better):
            raise ValueError(f"vocabulary: {head!r} is no line of pattern, unit, step and what is better")
        text = " ".join(line.strip() for line in definition)
        found.append(Meaning(pattern, text, unit, cast(Step, step), cast(Better, better), "".join(title)))
    return tuple(found)


VOCABULARY: tuple[Meaning, ...] = _read(_TABLE)
"""All meanings; the first that covers a tag is its own."""


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    open_end = pattern.endswith("...")
    parts = re.split(r"(<[^>]+>|(?<=-)K\b)", pattern.removesuffix("..."))
    text = "".join(
        r"\d+" if part == "K" else r"[^/]+" if part.startswith("<") else re.escape(part) for part in parts if part
    )
    return re.compile(text + ".*" * open_end)


@cache
def describe(tag: str) -> Meaning | None:
    """What a tag means; None for one that is none of ours. ``validation/`` in front of it changes nothing."""
    plain = tag.removeprefix(VALIDATION)
    return next((meaning for meaning in VOCABULARY if meaning.covers(plain)), None)


def glossary(tags: Iterable[str]) -> list[Meaning]:
    """The meanings of those tags, each once, in the order of the vocabulary; unknown tags are left out."""
    found = {meaning.pattern for tag in tags if (meaning := describe(tag)) is not None}
    return [meaning for meaning in VOCABULARY if meaning.pattern in found]
