"""A training script with the `Trainer` of Hugging Face: a vision-language model learns to caption and to match.

python before.py
"""

from typing import Any

import transformers
from peft import PeftModel
from pieces import Collator, load, match_loss, pictures
from torch import Tensor


class CaptionAndMatch(transformers.Trainer):
    """Adds up two losses, since the `Trainer` takes one."""

    loss_is_scaled_for_ga = True  # each is divided in compute_loss, in its own way

    def compute_loss(
        self, model: PeftModel, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Captions count by their words in all batches of a step, matches by batches."""
        own = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
        caption = model(**own, num_items_in_batch=num_items_in_batch).loss
        match = match_loss(model, inputs) / self.current_gradient_accumulation_steps
        return caption + 0.5 * match


def train(model: PeftModel, processor: transformers.LlavaProcessor, folder: str) -> list[float]:
    """Train, write the adapters to `folder`, and return the loss of each step."""
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=1.0,
        seed=42,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator reads the pictures
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = CaptionAndMatch(model, arguments, data_collator=Collator(processor), train_dataset=pictures())
    trainer.train()
    trainer.save_model(folder)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    model, processor = load()
    train(model, processor, "trained-before")
