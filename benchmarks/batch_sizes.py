"""Batch sizes that were not measured: python benchmarks/batch_sizes.py [--large] [-o FILE]

Single layers of six components, and a whole vision-language model forward and backward, told by the curves through
every second local batch size of a profile. `--large` takes sizes for a GPU. Needs neither Ray nor a solver.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from race.models import VOCABULARY, batches, next_word
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from spindle.capture import capture
from spindle.cost.measured.heldout import between
from spindle.runtime.profiling.profiler import measure_profile
from spindle.values.contract import contract
from spindle.values.metagraph import MetaGraph
from spindle.values.profile import Profile, ProfileEntry
from spindle.workload import Batch, Workload

BATCH, LAYER_LIMIT, MODEL_LIMIT = 16, 0.10, 0.15
USED, TOLD = (1, 4, 16), (2, 8)  # devices that share the batch: local batches 16, 4, 1 and 8, 2
TURNS = 15


@dataclass(frozen=True)
class Size:
    """Widths of all components, their layers, and lengths in tokens."""

    width: int
    layers: int
    pixels: int
    patch: int
    frames: int
    words: int


SMALL = Size(width=192, layers=4, pixels=96, patch=16, frames=128, words=64)
LARGE = Size(width=1024, layers=12, pixels=224, patch=14, frames=1500, words=512)


class Action(nn.Module):
    """A flow-matching head of plain Transformer layers: (B, T, width) to as many."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size.width, size.width // 64, 4 * size.width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(size.layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def common(size: Size, **more: Any) -> dict[str, Any]:
    """What most configurations name alike."""
    width, layers = size.width, size.layers
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    } | more


def build(size: Size) -> Workload:
    """A vision-language model that captions, and four more components on a task each."""
    torch.manual_seed(0)
    workload = Workload("batch-sizes")
    width = size.width
    vision = workload.component(
        "vision", CLIPVisionModel(CLIPVisionConfig(**common(size, image_size=size.pixels, patch_size=size.patch)))
    )
    lm = workload.component(
        "lm",
        Qwen2ForCausalLM(
            Qwen2Config(
                **common(size, vocab_size=VOCABULARY, num_key_value_heads=max(1, width // 128), use_cache=False)
            )
        ),
    )
    words = {"vocab_size": VOCABULARY, "max_position_embeddings": size.words, "bos_token_id": 1, "pad_token_id": 0}
    text = workload.component("text", CLIPTextModel(CLIPTextConfig(**common(size, **words, eos_token_id=2))))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = workload.component("bert", BertModel(BertConfig(**common(size, **words, **still)), add_pooling_layer=False))
    speech = workload.component(
        "speech",
        WhisperEncoder(
            WhisperConfig(
                d_model=width,
                encoder_layers=size.layers,
                encoder_attention_heads=width // 64,
                encoder_ffn_dim=4 * width,
                max_source_positions=size.frames // 2,
            )
        ),
    )
    action = workload.component("action", Action(size))

    @workload.task(
        "caption", batch_size=BATCH, data=batches(1, BATCH, tokens=(size.words,), pixels=(3, size.pixels, size.pixels))
    )
    def caption(batch: Batch) -> Tensor:
        seen = vision(pixel_values=batch["pixels"]).last_hidden_state
        read = lm.get_input_embeddings()(batch["tokens"])
        logits = lm(inputs_embeds=torch.cat([seen, read], 1)).logits[:, -size.words :]
        return next_word(logits, batch["tokens"])

    @workload.task("read", batch_size=BATCH, data=batches(1, BATCH, tokens=(size.words,)))
    def read(batch: Batch) -> Tensor:
        found: Tensor = text(input_ids=batch["tokens"]).last_hidden_state.square().mean()
        return found

    @workload.task("fill", batch_size=BATCH, data=batches(1, BATCH, tokens=(size.words,)))
    def fill(batch: Batch) -> Tensor:
        found: Tensor = bert(input_ids=batch["tokens"]).last_hidden_state.square().mean()
        return found

    @workload.task("hear", batch_size=BATCH, data=batches(1, BATCH, mel=(80, size.frames)))
    def hear(batch: Batch) -> Tensor:
        found: Tensor = speech(batch["mel"]).last_hidden_state.square().mean()
        return found

    @workload.task("act", batch_size=BATCH, data=batches(1, BATCH, state=(size.words, width)))
    def act(batch: Batch) -> Tensor:
        found: Tensor = action(batch["state"]).square().mean()
        return found

    return workload


def layer_rows(metagraph: MetaGraph, profile: Profile) -> Iterator[tuple[str, int, float, float]]:
    """Component, local batch, told and measured seconds of one layer of each component."""
    for metaop in metagraph:
        if len(metaop.operators) > 1:
            entries = profile.by_kind[metaop.operators[0].kind]
            for n in TOLD:
                yield metaop.component, BATCH // n, told_s(entries, n), entries[n].forward_s + entries[n].backward_s


def told_s(entries: dict[int, ProfileEntry], n: int) -> float:
    """Seconds of a layer on n devices from the counts that are used; what mixes samples does not get smaller."""
    total_s = {count: entry.forward_s + entry.backward_s for count, entry in entries.items()}
    low, high = max(c for c in USED if c < n), min(c for c in USED if c > n)
    return between(n, (low, total_s[low]), (high, total_s[high])) if high in total_s else total_s[1]


def model_s(workload: Workload, samples: int, device: torch.device) -> float:
    """Median seconds of the user's own caption task, forward and backward, on so many samples."""
    task = workload.tasks["caption"]
    batch = {name: value[:samples].to(device) for name, value in task.first_batch().items()}
    for component in workload.components.values():
        component.module.to(device)
    took = []
    for _ in range(TURNS):
        settle(device)
        started = time.perf_counter()
        torch.autograd.backward(task.function(batch))
        settle(device)
        took.append(time.perf_counter() - started)
    return statistics.median(took[2:])


def settle(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Print both tables; 1 when an error is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="sizes for a GPU")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = build(LARGE if options.large else SMALL)
    captured = capture(workload)
    metagraph = contract(captured.graph)
    profile = measure_profile(workload, captured, num_devices=1, most_devices=BATCH)
    lines = [
        "# Batch sizes that were not measured",
        "",
        f"`python benchmarks/batch_sizes.py{' --large' if options.large else ''}`: torch {torch.__version__}, "
        f"Python {platform.python_version()}, {profile.device}, {torch.get_num_threads()} threads.",
        f"Curves through local batches {', '.join(str(BATCH // n) for n in USED)}; forward and backward.",
        "",
        "| one layer of | local batch | told ms | measured ms | error |",
        "|---|--:|--:|--:|--:|",
    ]
    worst = {LAYER_LIMIT: 0.0, MODEL_LIMIT: 0.0}
    rows = [(LAYER_LIMIT, *row) for row in layer_rows(metagraph, profile)]
    parts = [metaop for metaop in metagraph if metaop.task == "caption"]
    for n in TOLD:
        whole_s = sum(len(m.operators) * told_s(profile.by_kind[m.operators[0].kind], n) for m in parts)
        rows.append(
            (MODEL_LIMIT, "whole vision-language model", BATCH // n, whole_s, model_s(workload, BATCH // n, device))
        )
    for limit, what, samples, told, measured in rows:
        worst[limit] = max(worst[limit], abs(told / measured - 1))
        lines.append(f"| {what} | {samples} | {1e3 * told:.2f} | {1e3 * measured:.2f} | {told / measured - 1:+.1%} |")
    said = [f"{error:.1%} (limit {limit:.0%})" for limit, error in worst.items()]
    lines += ["", f"Largest error of layers {said[0]}, of the whole model {said[1]}."]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")
    return int(any(error > limit for limit, error in worst.items()))


if __name__ == "__main__":
    raise SystemExit(main())
