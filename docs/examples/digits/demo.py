"""The main job, end to end: measure, plan, train in waves on Ray, check against one process, look at the timeline.

make demo
python docs/examples/digits/demo.py --steps 300 --out demo-out
"""

import argparse
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from workload import (
    DIGITS,
    END,
    PAD,
    START,
    Pictures,
    Recordings,
    decode,
    lm,
    optimizer,
    padded,
    picture_prompt,
    speech,
    text,
    vision,
    workload,
)

import spindle
from spindle.files import formats
from spindle.planner.report.render import render
from spindle.planner.simulate import simulate
from spindle.timeline import render_page

console = Console(width=110, highlight=False)


def main() -> None:
    """Run all steps and say what each one found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--workers", type=int, default=max(2, min(4, os.cpu_count() or 2)), help="ranks, one a core")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the plan and the timeline")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    heading("1. The workload: five tasks that share a vision tower, a speech encoder and a language model")
    for name, task in workload.tasks.items():
        used = sorted({op.component for op in spindle.make_metagraph(workload) if op.task == name} - {"loss", "glue"})
        console.print(f"  {name:13} batch {task.batch_size:3}   {', '.join(used)}")

    heading("2. Measure its operators here, and plan")
    torch.set_num_threads(1)  # as the ranks will have it
    with progress("measuring") as bar:
        row = bar.add_task("")
        profile = spindle.make_profile(
            workload,
            num_devices=options.workers,
            optimizer=optimizer,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
        )
    cluster = f"1x{options.workers}:cpu"
    plan = spindle.make_plan(workload, cluster, profile=profile)
    formats.write(plan, options.out / "plan.json")
    console.print(render(plan), markup=False)

    heading(f"3. Train {options.steps} steps in waves on Ray, {options.workers} ranks")
    with progress("training") as bar:
        row = bar.add_task("", total=options.steps)
        result = spindle.train(
            workload,
            plan,
            optimizer=optimizer,
            steps=options.steps,
            launcher="ray",
            on_step=lambda step, losses: bar.update(row, completed=step, description=words(losses)),
        )
    table(result.losses)
    formats.write(result.trace, options.out / "trace.json")

    heading("4. Did it learn?")
    torch.manual_seed(0)
    quiz()

    heading("5. Is it exact? The same steps in one process, every gradient compared")
    report = spindle.verify(workload, plan, launcher="processes")
    console.print(f"  {report}")

    heading("6. Was the plan worth it?")
    compare(plan, profile, cluster, result.step_s)

    page = options.out / "timeline.html"
    formats.write_text(render_page(plan, predicted=simulate(plan), measured=result.trace, title="digits"), page)
    heading(f"Timeline, planned beside measured: {page}   ({time.monotonic() - started:.0f} s in all)")
    if not report.ok:
        raise SystemExit(1)


def heading(title: str) -> None:
    """A title line."""
    console.print(f"\n[bold]{title}[/bold]")


def progress(title: str) -> Progress:
    """A bar with the time left."""
    columns = (TextColumn(f"  {title}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}"), console=console, refresh_per_second=4)


def words(losses: dict[str, float]) -> str:
    """Losses of one step, short."""
    return " ".join(f"{loss:.2f}" for loss in losses.values())


def table(losses: tuple[dict[str, float], ...]) -> None:
    """Each task's loss, averaged over the first, middle and last tenth of the steps."""
    size = max(1, len(losses) // 10)
    middle = (len(losses) - size) // 2
    parts = (losses[:size], losses[middle : middle + size], losses[-size:])
    console.print(f"  {'loss':13} {'first':>8} {'middle':>8} {'last':>8}")
    for task in losses[0]:
        means = (sum(step[task] for step in part) / len(part) for part in parts)
        console.print(f"  {task:13} " + " ".join(f"{mean:8.4f}" for mean in means))


@torch.no_grad()
def quiz() -> None:
    """Test pictures and recordings that training has not seen, through the user's own modules."""
    pictures, recordings = Pictures(test=True), Recordings(test=True)
    images = vision(pixel_values=pictures.pixels).pooler_output
    captions = padded([f"a handwritten {digit}" for digit in DIGITS])
    written = text(input_ids=captions, attention_mask=(captions != PAD).long()).pooler_output
    by_text = torch.nn.functional.cosine_similarity(images[:, None], written[None], dim=-1).argmax(1)
    console.print(f"  picture -> caption, zero-shot   {accuracy(by_text, pictures.digit)}")
    spoken = speech.classify(speech(recordings.mel)).argmax(1)
    console.print(f"  recording -> digit              {accuracy(spoken, recordings.digit)}")
    by_voice = torch.nn.functional.cosine_similarity(images[:, None], speech(recordings.mel)[None], dim=-1)
    heard = recordings.digit[by_voice.argmax(1)]
    console.print(f"  picture -> nearest recording    {accuracy(heard, pictures.digit)}")
    for index in (0, 3, 7):
        console.print(
            f"  a picture of {DIGITS[int(pictures.digit[index])]:6} reads          '{caption(pictures, index)}'"
        )


def accuracy(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """Share of right answers."""
    return f"{float((got == wanted).float().mean()):6.1%} of {len(wanted)}"


def caption(pictures: Pictures, index: int) -> str:
    """The language model's most likely caption of one picture."""
    prompt, tokens = picture_prompt(pictures.pixels[index : index + 1]), [START]
    while tokens[-1] != END and len(tokens) < 8:
        words_in = lm.get_input_embeddings()(torch.tensor([tokens]))
        tokens.append(int(lm(inputs_embeds=torch.cat([prompt, words_in], 1)).logits[0, -1].argmax()))
    return decode(tokens)


def compare(plan: spindle.Plan, profile: spindle.Profile, cluster: str, step_s: float) -> None:
    """The baseline, all ranks on one task after another, run in the same manner."""
    usual = spindle.make_plan(workload, cluster, profile=profile, method="sequential")
    measured = spindle.train(workload, usual, optimizer=optimizer, steps=40, launcher="ray")
    predicted = usual.step_s / plan.step_s if plan.step_s else float("nan")
    console.print(f"  waves      {step_s * 1e3:7.1f} ms a step (predicted {plan.step_s * 1e3:.1f})")
    console.print(f"  sequential {measured.step_s * 1e3:7.1f} ms a step (predicted {usual.step_s * 1e3:.1f})")
    console.print(f"  gain       {measured.step_s / step_s:7.2f} x (predicted {predicted:.2f})")


if __name__ == "__main__":
    main()
