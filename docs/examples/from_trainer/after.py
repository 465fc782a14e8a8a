"""The training of before.py as a Spindle workload of two tasks, with the same losses in each step.

spindle train after.py:workload --steps 8 --checkpoints run
spindle export after.py:workload --checkpoint run/step-00000008 -o trained-after
"""

import re
from collections.abc import Iterable

import torch
import transformers
from accelerate.data_loader import SeedableRandomSampler
from pieces import Collator, load, match_loss, pictures
from torch import Tensor

import spindle

Batch = dict[str, Tensor]
NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")  # names without decay in the Trainer

model, processor = load()
workload = spindle.Workload("caption-and-match", accumulate=2, max_grad_norm=1.0)
workload.component("model", model)


def loader() -> torch.utils.data.DataLoader[Batch]:
    """Batches in the order of the Trainer, which draws it anew in each epoch from seed + epoch."""
    dataset = pictures()
    order = SeedableRandomSampler(dataset, data_seed=42)
    return torch.utils.data.DataLoader(dataset, 4, sampler=order, collate_fn=Collator(processor))


def words(batch: Batch) -> Tensor:
    """How many words a caption loss is the mean of; a causal model predicts all but the first."""
    return (batch["labels"][:, 1:] != -100).sum()


@workload.task("caption", batch_size=4, data=loader(), weigh=words)
def caption(batch: Batch) -> Tensor:
    """The next word of each caption, given the picture."""
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    loss: Tensor = model(**own).loss
    return loss


@workload.task("match", batch_size=4, data=loader(), weight=0.5)
def match(batch: Batch) -> Tensor:
    """Each picture beside its caption."""
    return match_loss(model, batch)


def optimizer(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW as the Trainer makes it: biases and norms do not decay."""
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in trained if not NO_DECAY.search(name.lower())]
    others = [(name, parameter) for name, parameter in trained if NO_DECAY.search(name.lower())]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=2e-3)


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The Trainer's own: warm-up, then half a cosine."""
    return transformers.get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=8)
