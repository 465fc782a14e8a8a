"""The loop of StarVLA's co-training over the modules of model.py: one task after the other, then one optimizer step.

python docs/examples/vla_cotraining/loop.py
"""

import torch
from model import Batch, Scenes, action, action_head, llm, merger, questions, vision
from torch import Tensor, nn
from transformers import get_scheduler

LOSS_SCALE = 0.1  # of the questions; actions count whole


class Policy(nn.Module):
    """The model as one module, so that DistributedDataParallel can wrap it. It returns the loss of a task."""

    def __init__(self) -> None:
        super().__init__()
        self.qwen_vl_interface = nn.ModuleList([vision, merger, llm])
        self.action_model = action_head

    def forward(self, task: str, batch: Batch) -> Tensor:
        """`task`: "action" or "questions"."""
        return action(batch) if task == "action" else questions(batch)


class Loop:
    """What a step changes: the policy, its optimizer and its schedule."""

    def __init__(self, policy: nn.Module) -> None:
        """`policy`: a Policy, or what wraps one."""
        self.policy = policy
        inner = policy.module if hasattr(policy, "module") else policy
        groups = [
            {"params": list(inner.qwen_vl_interface.parameters()), "lr": 5e-4, "name": "qwen_vl_interface"},
            {"params": list(inner.action_model.parameters()), "lr": 5e-3, "name": "action_model"},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1.25e-3, betas=(0.9, 0.95), weight_decay=1e-8)
        end = {"min_lr": 5e-5}
        self.schedule = get_scheduler("cosine_with_min_lr", self.optimizer, 5, 1000, scheduler_specific_kwargs=end)

    def forward_backward(self, task: str, batch: Batch) -> float:
        """Add the gradients of a task; its loss, without its scale."""
        loss: Tensor = self.policy(task, batch)
        (loss if task == "action" else loss * LOSS_SCALE).backward()
        return float(loss.detach())

    def step(self, scenes: Batch, asked: Batch) -> dict[str, float]:
        """Train on a batch of actions and on one of questions; their losses."""
        self.optimizer.zero_grad()
        losses = {"action": self.forward_backward("action", scenes)}
        losses["questions"] = self.forward_backward("questions", asked)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return losses


if __name__ == "__main__":
    loop = Loop(Policy())
    for number, (scenes, asked) in enumerate(zip(Scenes(32, seed=1), Scenes(8, seed=2), strict=True), 1):
        losses = loop.step(scenes, asked)
        if number % 10 == 0:
            print(number, *(f"{task} {loss:.4f}" for task, loss in losses.items()))
